"""`ray up` over ssh to hosts of the laboratory, with the file that is shipped: serve, lose a host, `ray down`."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from elastic_moe.cluster.config import cache_directory
from tests.hosts.lab import Host, Lab
from tests.paths import ROOT

pytestmark = [pytest.mark.hosts, pytest.mark.timeout(600)]

SSHD = shutil.which("sshd", path="/usr/sbin:/usr/local/sbin:" + os.environ.get("PATH", ""))
BIN = Path(sys.executable).parent
HOME = "/tmp/home"
"""Each host has its own /tmp."""
ANSWER_S = 180.0
NODES = "import ray; ray.init(address='auto', logging_level=40); print(*[n['NodeManagerAddress'] for n in ray.nodes()])"
COMPLETION = {"prompt": "And it came to pass", "max_tokens": 16, "temperature": 0, "ignore_eos": True}


@pytest.fixture(scope="module")
def key(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A private key that the hosts' sshd lets in."""
    if SSHD is None or shutil.which("rsync") is None:
        pytest.skip("ray up needs sshd and rsync: apt install openssh-server rsync")
    directory = tmp_path_factory.mktemp("ssh")
    for name in ("host", "user"):
        command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(directory / name)]
        subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
    return directory / "user"


def start_sshd(host: Host, key: Path) -> None:
    host.run("mkdir", "-p", HOME, "/tmp/sshd")
    # the machine's own native library, so that no host compiles one
    host.run("ln", "-sfn", str(cache_directory().parent), f"{HOME}/.cache")
    # ssh takes the home from there, and not from the environment, to find the key by which the head reaches the others
    passwd = f"sed 's#:/root:#:{HOME}:#' /etc/passwd > /tmp/passwd && mount --bind /tmp/passwd /etc/passwd"
    host.run("sh", "-c", passwd)
    options = {
        "HostKey": key.with_name("host"),
        "AuthorizedKeysFile": key.with_suffix(".pub"),
        # the keys lie in a directory of pytest's
        "StrictModes": "no",
        "UsePAM": "no",
        "PermitRootLogin": "prohibit-password",
        "PidFile": "/tmp/sshd/pid",
        # of several, ssh takes the last; the machine's own home would be shared by all hosts
        "SetEnv": f"HOME={HOME}",
        "Subsystem": "sftp internal-sftp",
    }
    words = [word for name, value in options.items() for word in ("-o", f"{name}={value}")]
    assert SSHD is not None
    Path("/run/sshd").mkdir(exist_ok=True)
    host.popen(SSHD, "-D", "-e", "-f", "/dev/null", *words, log=key.with_name(f"sshd-{host.name}"))


class Up:
    """A cluster that `ray up` has started: a head and two more hosts."""

    def __init__(self, lab: Lab, key: Path, directory: Path) -> None:
        self.lab = lab
        self.file = directory / "cluster.yaml"
        self._key = key
        # the token of this Ray lies in the home of whoever calls `ray up`
        self._environment = {**os.environ, "HOME": str(directory), "RAY_USAGE_STATS_ENABLED": "0"}
        self.file.write_text(yaml.safe_dump(self._config()))

    def _config(self) -> dict[str, Any]:
        """The shipped file, with these hosts, and with this checkout's environment in place of an installation."""
        config: dict[str, Any] = yaml.safe_load((ROOT / "deploy" / "ray-cluster-local.yaml").read_text())
        head, *workers = (host.address for host in self.lab.hosts)
        config["provider"] |= {"head_ip": head, "worker_ips": workers}
        config["auth"] = {"ssh_user": "root", "ssh_private_key": str(self._key)}
        assert config["setup_commands"][0] == "make -C ~/elastic-moe .venv/.installed"
        config["setup_commands"][0] = f"ln -sfn {sys.prefix} ~/elastic-moe/.venv"
        return config

    def ray(self, *words: str, timeout_s: float = 300) -> str:
        command = [str(BIN / "ray"), *words]
        done = subprocess.run(
            command, cwd=ROOT, env=self._environment, capture_output=True, text=True, timeout=timeout_s, check=False,
            stdin=subprocess.DEVNULL,
        )  # fmt: skip
        assert done.returncode == 0, f"{' '.join(words)}: {done.stdout[-6000:]}{done.stderr[-3000:]}"
        return done.stdout

    def execute(self, command: str) -> str:
        return self.ray("exec", str(self.file), f"RAY_AUTH_MODE=token {command}")

    def get(self, path: str, body: Any = None) -> Any:
        """An answer of the server, which listens on the head's loopback. Raises AssertionError for an error."""
        sent = [] if body is None else ["-H", "content-type: application/json", "-d", json.dumps(body)]
        return json.loads(self.lab.hosts[0].run("curl", "-sf", "-m", "60", f"http://127.0.0.1:8000{path}", *sent))

    def wait_for(self, what: Callable[[], bool]) -> None:
        deadline = time.monotonic() + ANSWER_S
        seen = "no answer"
        while time.monotonic() < deadline:
            try:
                if what():
                    return
            except (AssertionError, ValueError) as error:
                seen = str(error)
            time.sleep(0.5)
        raise AssertionError(seen)

    def serving(self, count: int) -> bool:
        ready = self.get("/ready")
        states = [worker["state"] for worker in self.get("/admin/workers")]
        return bool(ready["ready"]) and states.count("serving") == count


@pytest.fixture
def up(lab: Lab, key: Path, tmp_path: Path) -> Iterator[Up]:
    for host in lab.hosts:
        start_sshd(host, key)
    cluster = Up(lab, key, tmp_path)
    cluster.ray("get-auth-token", "--generate")
    cluster.ray("up", "-y", "--no-config-cache", str(cluster.file))
    yield cluster
    for host in lab.hosts:
        lab.kill_host(host.number)
        lab.revive(host.number)


def test_the_shipped_file_starts_a_cluster_that_serves(up: Up, key: Path) -> None:
    # workers go where there is room, and `ray up` returns before the other machines have joined
    joining = [host.address for host in up.lab.hosts[1:]]
    up.wait_for(
        lambda: set(joining) <= set(up.execute("~/elastic-moe/.venv/bin/python -c " + shlex.quote(NODES)).split())
    )
    up.execute("~/elastic-moe/.venv/bin/serve deploy ~/elastic-moe/deploy/serve.yaml")
    up.wait_for(lambda: up.serving(2))
    nodes = {worker["node"] for worker in up.get("/admin/workers")}
    assert len(nodes) == 2, "a worker on each machine, and none on the head"
    answer = up.get("/v1/completions", COMPLETION)["choices"][0]["text"]
    assert open_to_all(up.lab.hosts[0]) == []

    up.lab.kill_host(2)
    assert up.get("/v1/completions", COMPLETION)["choices"][0]["text"] == answer
    up.lab.revive(2)
    start_sshd(up.lab.hosts[2], key)

    up.ray("down", "-y", str(up.file))
    assert "raylet" not in up.lab.hosts[0].run("ps", "-eo", "args")


def open_to_all(host: Host) -> list[str]:
    """What HTTP of Serve's and HAProxy's listens to every address of the host: `serve.yaml` asks for loopback."""
    lines = host.run("ss", "-Hltnp").splitlines()
    wide = [line for line in lines if line.split()[3].startswith(("0.0.0.0:", "*:", "[::]:"))]
    return [line for line in wide if "haproxy" in line or line.split()[3].rsplit(":", 1)[1] in ("8000", "8404", "9101")]
