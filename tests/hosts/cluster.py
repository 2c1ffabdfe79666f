"""A Ray cluster whose nodes are hosts of the laboratory, and a server that has joined it."""

from __future__ import annotations

import socket
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import httpx
import psutil

from elastic_moe.cluster.config import cache_directory
from tests.e2e.conftest import MODEL, Server
from tests.hosts.lab import Host, HostProcess, Lab

GCS_PORT = 6379
API_PORT = 8000
DASHBOARD_PORT = 8265
ADMIN_KEY = "admin"
"""A server that others reach takes no admin call without one."""
START_S = 60.0
OBJECT_STORE_BYTES = 100_000_000
CPU_FLAGS = ("--dtype", "float32", "--max-model-len", "1024", "--kv-cache-memory-bytes", "50000000")
ENVIRONMENT = {
    # no token: the laboratory's network is reached from this machine alone
    "RAY_AUTH_MODE": "disabled",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    # the machine's own native library, so that no host compiles one
    "XDG_CACHE_HOME": str(cache_directory().parent),
}


class HostCluster:
    """Begin with `start_head`, then `join` further hosts, then `serve`. Logs lie in `logs`."""

    def __init__(self, lab: Lab, logs: Path, env: Mapping[str, str] | None = None) -> None:
        """`env`: for every process of Ray and of the server."""
        self.lab = lab
        self.logs = logs
        self.env = {**ENVIRONMENT, **(env or {})}
        self.rays: dict[int, HostProcess] = {}
        """`ray start --block` of each host, which SIGTERM ends as an operator would."""

    @property
    def head(self) -> Host:
        return self.lab.hosts[0]

    @property
    def address(self) -> str:
        return f"{self.head.address}:{GCS_PORT}"

    def start_head(self, *, cpus: int = 0, block: bool = True, dashboard: bool = False, **env: str) -> None:
        """A head on host 0, without cores unless told, so that workers are on other hosts. Without `block`, a part of
        Ray that ends takes no other along. `serve deploy` needs the dashboard."""
        words = ["--head", "--port", str(GCS_PORT), f"--include-dashboard={str(dashboard).lower()}"]
        words += ["--dashboard-host", "0.0.0.0"] if dashboard else []
        self._start(self.head, words, cpus, env, block=block)
        self._wait_for_port(GCS_PORT)

    def join(self, number: int, *, cpus: int = 1, **env: str) -> None:
        """Host `number` joins with `cpus` cores. Returns before it has."""
        self._start(self.lab.hosts[number], ["--address", self.address], cpus, env)

    def serve(self, checkpoint: Path, *flags: str, on: int = 0, log: str = "serve") -> Server:
        """`emoe serve` on host `on`. The machine reaches it at the server's `url`. Wait for `ready` yourself."""
        host = self.lab.hosts[on]
        file = self.logs / log
        words = [str(Path(sys.executable).with_name("emoe")), "serve", str(checkpoint), "--address", self.address]
        words += [
            "--admin-api-key",
            ADMIN_KEY,
            "--host",
            "0.0.0.0",
            "--port",
            str(API_PORT),
            "--served-model-name",
            MODEL,
        ]
        words += ["--log-file", f"{file}.processes", *CPU_FLAGS, *flags]
        process = host.popen(*words, log=file, env=self.env)
        return Server(process=process, url=f"http://{host.address}:{API_PORT}", log=file)

    def deploy(self, config: str) -> Server:
        """`serve deploy` on the head. config: YAML whose HTTP listens at API_PORT of every address."""
        file = self.logs / "serve.yaml"
        file.write_text(config)
        self._wait_for_port(DASHBOARD_PORT)
        serve = str(Path(sys.executable).with_name("serve"))
        self.head.run(serve, "deploy", "--address", f"http://127.0.0.1:{DASHBOARD_PORT}", str(file), **self.env)
        return Server(process=self.rays[0], url=f"http://{self.head.address}:{API_PORT}", log=self.logs / "ray-eh0")

    def rebalance(self, server: Server, planner: str, timeout_s: float) -> str:
        """Have the placement of a planner made. Returns what came of it; raises AssertionError if it failed."""
        headers = {"Authorization": f"Bearer {ADMIN_KEY}"}
        answer = httpx.post(f"{server.url}/admin/rebalance", json={"planner": planner}, headers=headers, timeout=60)
        assert answer.status_code in (200, 202), answer.text
        path = f"/admin/operations/{answer.json()['operation_id']}"
        server.wait("the operation", lambda: server.get(path)["phase"] in ("completed", "failed"), timeout_s)
        operation = server.get(path)
        assert operation["phase"] == "completed", operation
        return str(operation["reason"])

    def workers(self, server: Server) -> dict[str, str]:
        """The node of each worker that serves."""
        return {worker["id"]: worker["node"] for worker in server.get("/admin/placement")["workers"]}

    def host_of(self, server: Server, worker: str) -> int:
        """The number of the host that a worker runs on, told by its address."""
        address = next(record["address"] for record in server.get("/admin/workers") if record["id"] == worker)
        return next(host.number for host in self.lab.hosts if host.address == address)

    def pid_of(self, server: Server, worker: str) -> int:
        """The worker's process, as its host numbers it."""
        return int(next(record["pid"] for record in server.get("/admin/workers") if record["id"] == worker))

    def kill_raylet(self, number: int) -> None:
        """kill -9 of the host's raylet, with which its workers end. `join` makes the host a node again."""
        self.process(number, "raylet").kill()
        self.rays.pop(number).wait(60)

    def process(self, number: int, name: str) -> psutil.Process:
        """The process of Ray with this name that runs on the host."""
        family = psutil.Process(self.lab.hosts[number].pid).children(recursive=True)
        if (start := self.rays.get(number)) is not None and start.poll() is None:
            family += psutil.Process(start.pid).children(recursive=True)
        [found] = {process for process in family if process.name() == name}
        return found

    def restart_gcs(self, pause_s: float) -> None:
        """kill -9 of the GCS, and the same command again after a pause."""
        gcs = self.process(0, "gcs_server")
        command, env = gcs.cmdline(), gcs.environ()
        gcs.kill()
        time.sleep(pause_s)
        self.head.popen(*command, log=self.logs / "gcs", env=env)

    def down(self) -> None:
        """End everything on the hosts by ending the hosts, and start them again, empty."""
        for host in self.lab.hosts:
            self.lab.kill_host(host.number)
        for host in self.lab.hosts:
            self.lab.revive(host.number)
        self.rays = {}

    def _start(self, host: Host, words: list[str], cpus: int, env: Mapping[str, str], *, block: bool = True) -> None:
        ray = str(Path(sys.executable).with_name("ray"))
        fixed = ["--node-ip-address", host.address, "--num-cpus", str(cpus), "--disable-usage-stats"]
        fixed += ["--object-store-memory", str(OBJECT_STORE_BYTES), *(["--block"] if block else [])]
        self.rays[host.number] = host.popen(
            ray, "start", *words, *fixed, log=self.logs / f"ray-{host.name}", env={**self.env, **env}
        )

    def _wait_for_port(self, port: int) -> None:
        """Of the head."""
        deadline = time.monotonic() + START_S
        while True:
            try:
                socket.create_connection((self.head.address, port), timeout=1).close()
            except OSError:
                log = self.logs / f"ray-{self.head.name}"
                assert self.rays[0].poll() in (None, 0), log.read_text()
                assert time.monotonic() < deadline, log.read_text()
                time.sleep(0.1)
            else:
                return
