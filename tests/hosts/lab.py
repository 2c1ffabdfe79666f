"""Hosts on one machine: network, process, mount, name and IPC namespaces of their own on one bridge. Needs root.

Each host has its own address, name, /dev/shm, /tmp and /etc/hosts. The rest of the file system is the machine's. A
host's first process takes all others of the host along when it ends; it ends with the process that made the
laboratory. A laboratory holds a lock while it is in use: what one without its lock has left behind is removed by the
next. Nothing is looked up by the name of a process: a host is the child that this process has started.

    lab = Lab(directory)
    first, second = lab.up(2)
    second.run("ping", "-c1", first.address)
    lab.cut(1)         # packets from and to the host vanish, and nobody is told
"""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from tests.paths import ROOT

TOOLS = ("ip", "tc", "nsenter", "unshare", "setpriv", "mount")
MOST = 64
"""Laboratories at a time on one machine."""
START_S = 10.0
_INIT = """
set -e
hostname "$1"
mount -t tmpfs tmpfs /dev/shm
private="$2"
shift 2
for path in "$@"; do mkdir -p "$private$path" && mount --bind "$path" "$private$path"; done
mount --rbind "$private/tmp" /tmp
trap : CHLD
sleep infinity &
echo up
while :; do wait $!; done
"""
"""The first process of a host: name, private folder, and the folders of /tmp that it shares. It reaps what is left."""


class LabUnavailable(Exception):
    """This machine does not let us make such hosts."""


class HostDown(Exception):
    """The host was killed and not revived."""


class HostProcess(subprocess.Popen[str]):
    """A process in a host. Signals go to it, not to the nsenter that waits for it."""

    def send_signal(self, sig: int) -> None:
        if self.poll() is None:
            for child in _children(self.pid):
                os.kill(child, sig)


@dataclass(slots=True)
class Host:
    """One host. `name` is its host name; `namespace` its network namespace; `port` its end of the cable."""

    number: int
    name: str
    address: str
    namespace: str
    port: str
    private: Path
    """Its folder on the machine; `tmp` in it is the host's /tmp."""
    init: subprocess.Popen[str] | None = None
    """unshare, whose child is the host's first process."""
    processes: list[HostProcess] = field(default_factory=list)
    """What `popen` has begun."""

    @property
    def pid(self) -> int:
        """The host's first process, as the machine numbers it. Raises HostDown."""
        if self.init is None or self.init.poll() is not None:
            raise HostDown(f"{self.name} is down")
        [child] = _children(self.init.pid)
        assert _is_in(child, self.namespace), f"process {child} is not of {self.name}"
        return child

    def command(self, *words: str, env: Mapping[str, str] | None = None) -> list[str]:
        """The machine's command that runs `words` in the host."""
        settings = {"HOME": "/tmp", "TMPDIR": "/tmp", **(env or {})}
        enter = ["nsenter", "-t", str(self.pid), "-m", "-u", "-i", "-n", "-p", "--"]
        return [*enter, "env", *(f"{name}={value}" for name, value in settings.items()), *words]

    def run(self, *words: str, timeout_s: float = 60, **env: str) -> str:
        """Run a command in the host. Returns what it printed; raises AssertionError with that if it fails."""
        command = self.command(*words, env=env)
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)
        assert done.returncode == 0, f"{self.name}: {' '.join(words)}: {done.stdout}{done.stderr}"
        return done.stdout

    def popen(
        self,
        *words: str,
        log: Path | None = None,
        env: Mapping[str, str] | None = None,
        cwd: Path = Path("/"),
    ) -> HostProcess:
        """Begin a command in the host. Its output goes to `log`. It ends with the host at the latest."""
        sink: IO[Any] | int = subprocess.DEVNULL if log is None else log.open("a")
        try:
            process = HostProcess(
                self.command(*words, env=env),
                stdout=sink,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                text=True,
                cwd=cwd,
                start_new_session=True,
            )
        finally:
            if not isinstance(sink, int):
                sink.close()
        self.processes.append(process)
        return process

    def runs(self, pid: int) -> bool:
        """Whether the host has a process of this number (its own) that has not ended."""
        states = dict(line.split() for line in self.run("ps", "-e", "-o", "pid=,stat=").splitlines())
        return not states.get(str(pid), "Z").startswith("Z")


class Lab:
    """See the module. The methods take the number of a host. Use `up` once, and `down` at the end."""

    def __init__(self, directory: Path, *, shared: Sequence[Path] = ()) -> None:
        """directory: for the hosts' private files. shared: folders below /tmp that the hosts see too, besides this
        project and its Python."""
        self.hosts: list[Host] = []
        self._directory = directory
        wanted = (ROOT, Path(sys.prefix), directory, *shared)
        self._shared = sorted({str(path.resolve()) for path in wanted if path.resolve().is_relative_to("/tmp")})
        self._number = 0
        self._lock: int | None = None

    def up(self, count: int) -> list[Host]:
        """Make `count` hosts. Raises LabUnavailable with the reason where this machine does not permit it."""
        if os.geteuid() != 0:
            raise LabUnavailable("hosts are made of namespaces, which needs root")
        missing = [tool for tool in TOOLS if shutil.which(tool) is None]
        if missing:
            raise LabUnavailable(f"hosts are made of namespaces, which needs {', '.join(missing)}")
        self._take_a_number()
        try:
            self._make_bridge()
            for number in range(count):
                self._make_host(number, count)
        except BaseException:
            self.down()
            raise
        return self.hosts

    def down(self) -> None:
        """End every process of the hosts, and remove the hosts. May be called twice."""
        for host in self.hosts:
            _end(host)
        if self._lock is not None:
            _sweep(self._number)
            os.close(self._lock)
            self._lock = None
        self.hosts = []

    # --- What can be done to a host -----------------------------------------------------------------------------

    def cut(self, number: int) -> None:
        """A silent partition: packets from and to the host vanish, and nobody is told."""
        _do("ip", "link", "set", self.hosts[number].port, "down")

    def mend(self, number: int) -> None:
        _do("ip", "link", "set", self.hosts[number].port, "up")

    def limit(self, number: int, mbit: float | None) -> None:
        """Limit what the host sends and receives, each to `mbit` Mbit/s; None lifts the limit."""
        host = self.hosts[number]
        for where, device in ((("-n", host.namespace), "eth0"), ((), host.port)):
            _do("tc", *where, "qdisc", "del", "dev", device, "root", fail=False)
            if mbit is not None:
                # the burst is what a millisecond sends, and a few packets at least
                burst = max(16_000, int(mbit * 125))
                words = ("tbf", "rate", f"{mbit:g}mbit", "burst", str(burst), "latency", "400ms")
                _do("tc", *where, "qdisc", "add", "dev", device, "root", *words)

    def kill_host(self, number: int, *, silently: bool = False) -> None:
        """kill -9 of every process of the host. silently: it sends nothing from then on, as a machine without power;
        otherwise its kernel lives on for a moment and closes the connections. `revive` brings it back, empty."""
        if silently:
            self.cut(number)
        _end(self.hosts[number])

    def revive(self, number: int) -> None:
        """Start a host again that was killed. Nothing runs on it."""
        host = self.hosts[number]
        self.mend(number)
        self._boot(host)

    def misname(self, number: int, *, undo: bool = False) -> None:
        """The host resolves its own name to 127.0.1.1, as Debian does unless told otherwise."""
        host = self.hosts[number]
        hosts = _etc(host.namespace) / "hosts"
        right, wrong = f"{host.address} {host.name}\n", f"127.0.1.1 {host.name}\n"
        hosts.write_text(hosts.read_text().replace(*((wrong, right) if undo else (right, wrong))))

    # --- Making it ----------------------------------------------------------------------------------------------

    def _take_a_number(self) -> None:
        for number in range(1, MOST):
            lock = os.open(f"/tmp/emoe-lab-{number}.lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                os.close(lock)
                continue
            self._number, self._lock = number, lock
            _sweep(number)
            return
        raise LabUnavailable(f"{MOST} laboratories are in use on this machine")

    def _make_bridge(self) -> None:
        bridge = f"emoebr{self._number}"
        try:
            _do("ip", "link", "add", bridge, "type", "bridge")
        except AssertionError as error:
            raise LabUnavailable(f"this machine permits no bridge: {error}") from None
        _do("ip", "addr", "add", f"10.77.{self._number}.1/24", "dev", bridge)
        _do("ip", "link", "set", bridge, "up")

    def _make_host(self, number: int, count: int) -> None:
        names = {n: f"eh{n}" for n in range(count)}
        host = Host(
            number=number,
            name=names[number],
            address=self._address(number),
            namespace=_namespace(self._number, number),
            port=f"emoev{self._number}-{number}",
            private=self._directory / f"host{number}",
        )
        try:
            _do("ip", "netns", "add", host.namespace)
        except AssertionError as error:
            raise LabUnavailable(f"this machine permits no network namespace: {error}") from None
        _do("ip", "link", "add", host.port, "type", "veth", "peer", "name", "eth0", "netns", host.namespace)
        _do("ip", "link", "set", host.port, "master", f"emoebr{self._number}")
        _do("ip", "link", "set", host.port, "up")
        _do("ip", "-n", host.namespace, "addr", "add", f"{host.address}/24", "dev", "eth0")
        for device in ("lo", "eth0"):
            _do("ip", "-n", host.namespace, "link", "set", device, "up")
        _etc(host.namespace).mkdir(parents=True, exist_ok=True)
        lines = ["127.0.0.1 localhost", *(f"{self._address(n)} {name}" for n, name in names.items())]
        (_etc(host.namespace) / "hosts").write_text("\n".join(lines) + "\n")
        self.hosts.append(host)
        self._boot(host)

    def _address(self, number: int) -> str:
        return f"10.77.{self._number}.{10 + number}"

    def _boot(self, host: Host) -> None:
        shutil.rmtree(host.private, ignore_errors=True)
        (host.private / "tmp").mkdir(parents=True, mode=0o1777)
        # ends with this process: setpriv hands the wish on to unshare, and unshare to its child
        host.init = subprocess.Popen(
            [
                *("setpriv", "--pdeathsig", "KILL", "ip", "netns", "exec", host.namespace),
                *("unshare", "--mount", "--uts", "--ipc", "--pid", "--fork", "--kill-child", "--mount-proc"),
                *("bash", "-c", _INIT, "host", host.name, str(host.private), *self._shared),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            text=True,
            start_new_session=True,
        )
        assert host.init.stdout is not None
        said = host.init.stdout.readline().strip()
        if said != "up":
            raise LabUnavailable(f"this machine permits no host: {said or 'its first process ended'}")
        assert _is_in(host.pid, host.namespace)


def _end(host: Host) -> None:
    """End the host's first process, with which the kernel ends all others."""
    init, host.init = host.init, None
    if init is None:
        return
    for child in _children(init.pid):
        if _is_in(child, host.namespace):
            os.kill(child, signal.SIGKILL)
    init.kill()
    init.wait(START_S)
    if init.stdout is not None:
        init.stdout.close()
    for process in host.processes:
        process.wait(START_S)
    host.processes.clear()


def _namespace(lab: int, number: int) -> str:
    return f"emoe{lab}-{number}"


def _etc(namespace: str) -> Path:
    return Path("/etc/netns") / namespace


def _sweep(lab: int) -> None:
    """Remove the network of laboratory `lab`, whose lock this process holds. Its processes have ended."""
    number = 0
    while Path(f"/run/netns/{_namespace(lab, number)}").exists():
        namespace = _namespace(lab, number)
        _do("ip", "netns", "del", namespace, fail=False)
        shutil.rmtree(_etc(namespace), ignore_errors=True)
        number += 1
    deadline = time.monotonic() + START_S
    # a cable goes with its namespace, when the last process of that is gone
    while any(name.startswith(f"emoev{lab}-") for name in os.listdir("/sys/class/net")):
        for name in os.listdir("/sys/class/net"):
            if name.startswith(f"emoev{lab}-"):
                _do("ip", "link", "del", name, fail=False)
        assert time.monotonic() < deadline, f"laboratory {lab} cannot be removed"
        time.sleep(0.05)
    _do("ip", "link", "del", f"emoebr{lab}", fail=False)


def _do(*words: str, fail: bool = True) -> None:
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0 or not fail, f"{' '.join(words)}: {done.stdout}{done.stderr}".strip()


def _children(pid: int) -> list[int]:
    try:
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def _is_in(pid: int, namespace: str) -> bool:
    """Whether the process lives in this network namespace and not among the machine's own processes."""
    try:
        inside = os.stat(f"/proc/{pid}/ns/net").st_ino == os.stat(f"/run/netns/{namespace}").st_ino
        return inside and os.readlink(f"/proc/{pid}/ns/pid") != os.readlink("/proc/self/ns/pid")
    except OSError:
        return False
