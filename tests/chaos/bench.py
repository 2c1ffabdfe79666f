"""A server with its processes within reach: what faults are made of, and when the cluster is whole again."""

from __future__ import annotations

import os
import random
import signal
import time
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import httpx
import psutil

from elastic_moe.actors.forkserver.request import NAME
from elastic_moe.deploy.launch.process_tree import lives
from tests.chaos.load import Load
from tests.e2e.conftest import Server

TITLES = {
    "worker": "ray::WorkerActor",
    "engine": "ray::Engine",
    "coordinator": "ray::Coordinator",
    "migrator": "ray::Migrator",
    "api": "ray::ServeReplica:emoe:api",
    "fork server": NAME,
}
API_REPLICAS = 2
WHOLE_S = 120.0
ENDED = ("completed", "failed")


@dataclass(slots=True)
class Bench:
    server: Server
    load: Load
    rng: random.Random
    workers: int
    """How many there should be."""
    struck_at: float = 0.0
    """When the clock of the outage starts: at the fault, or when load comes back after it."""
    into_move_s: tuple[float, float] = (0.05, 0.8)
    """After a re-placement began: experts are being copied then, for the bandwidth is limited."""
    victims: list[psutil.Process] = field(default_factory=list)
    """Processes that must be gone once the cluster is whole again."""

    # --- Faults -------------------------------------------------------------------------------------------------

    def processes(self, role: str) -> list[psutil.Process]:
        found = []
        for process in psutil.Process(self.server.process.pid).children(recursive=True):
            try:
                if process.name() == TITLES[role] or " ".join(process.cmdline()).startswith(TITLES[role]):
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def strike(self, *roles: str, hang: bool = False) -> None:
        """kill -9 (or SIGSTOP) one process of each role, all at once; a role given twice strikes two of them."""
        chosen: list[psutil.Process] = []
        for role in roles:
            # one that ended may be made anew only when it is needed
            self.server.wait(f"a running {role}", partial(self._targets, role, chosen))
            chosen.append(self.rng.choice(self._targets(role, chosen)))
        self.struck_at = time.monotonic()
        for process in chosen:
            os.kill(process.pid, signal.SIGSTOP if hang else signal.SIGKILL)
        self.victims += chosen

    def _targets(self, role: str, taken: list[psutil.Process]) -> list[psutil.Process]:
        there = [process for process in self.processes(role) if process not in taken]
        if role == "worker":
            spares = self._spares(there)
            there = [process for process in there if process.pid not in spares]
        return sorted(there, key=lambda process: process.pid)

    def _spares(self, workers: list[psutil.Process]) -> set[int]:
        """The process that waits to be the next worker: one that is nobody's, while none is on its way."""
        members = [w for w in self.ask("/admin/workers") or [] if w["state"] not in ("dead", "stopped", "standby")]
        if not members or any(w["state"] == "starting" for w in members):
            return set()
        return {process.pid for process in workers} - {w["pid"] for w in members}

    # --- What is asked of the cluster ---------------------------------------------------------------------------

    def worker(self, worker: str) -> psutil.Process:
        return psutil.Process(next(w["pid"] for w in self.server.get("/admin/workers") if w["id"] == worker))

    def strike_process(self, process: psutil.Process, *, hang: bool = False) -> None:
        self.victims.append(process)
        self.struck_at = time.monotonic()
        process.send_signal(signal.SIGSTOP if hang else signal.SIGKILL)

    def move_everything(self) -> str:
        """A re-placement that moves every expert: each layer's slots, shifted by a worker's. The operation's id."""
        placement = self.server.get("/admin/placement")
        shift = placement["workers"][0]["slots"]
        table = placement["physical_to_logical_map"]
        placement["physical_to_logical_map"] = [row[-shift:] + row[:-shift] for row in table]
        return self.place(placement)

    def move_a_quarter(self) -> str:
        """The first two workers exchange so many experts of every layer that a quarter of all move."""
        placement = self.server.get("/admin/placement")
        first = placement["workers"][0]["slots"]
        for row in placement["physical_to_logical_map"]:
            for slot in range(placement["num_logical_experts"] // 8):
                row[slot], row[first + slot] = row[first + slot], row[slot]
        return self.place(placement)

    def place(self, placement: dict[str, Any]) -> str:
        response = httpx.put(f"{self.server.url}/admin/placement", json=placement, timeout=30)
        assert response.status_code == 202, response.text
        return str(response.json()["operation_id"])

    def scale(self, workers: int) -> str:
        self.workers = workers
        response = self.server.post("/admin/scale", {"workers": workers})
        assert response.status_code == 202, response.text
        return str(response.json()["operation_id"])

    def retire(self, worker: str) -> str:
        self.workers -= 1
        response = self.server.post("/admin/scale", {"retire": [worker]})
        assert response.status_code == 202, response.text
        return str(response.json()["operation_id"])

    def finish(self, operation: str) -> dict[str, Any]:
        end: dict[str, Any] = {}

        def over() -> bool:
            end.update(self.ask(f"/admin/operations/{operation}"))
            return end.get("phase") in ENDED

        self.server.wait(operation, over, WHOLE_S)
        return end

    def ask(self, path: str) -> Any:
        """Like `get`, but {} while there is no coordinator to answer."""
        try:
            return self.server.get(path)
        except httpx.HTTPError:
            return {}

    # --- Afterwards ---------------------------------------------------------------------------------------------

    def settle(self) -> None:
        """Wait until all workers serve, nothing is under way, tokens flow, and the victims are gone."""
        self.server.wait("the victims' end", lambda: not self.victims_live(), 30)
        self.victims.clear()
        # first: right after a fault the cluster still looks whole
        self.load.wait_for_tokens(20)
        self.server.wait("a whole cluster", self._is_whole, WHOLE_S)
        self.load.wait_for_tokens(20)

    def victims_live(self) -> bool:
        return any(map(lives, self.victims))

    def _is_whole(self) -> bool:
        if not self.server.ready():
            return False
        if len(self.processes("api")) != API_REPLICAS:
            return False
        members = self.ask("/admin/placement").get("workers", [])
        operations = self.ask("/admin/operations") or [{"phase": "unknown"}]
        return len(members) == self.workers and all(op["phase"] in ENDED for op in operations)

    def family(self) -> list[psutil.Process]:
        """The server and all its processes."""
        root = psutil.Process(self.server.process.pid)
        return [root, *root.children(recursive=True)]


def wait_for_spare(server: Server) -> None:
    """The process that will be the next worker: it takes some seconds, more while cores are busy, and not to be there
    makes every recovery longer that needs another worker. On GPUs there is none."""

    def stands_by() -> bool:
        try:
            workers = server.get("/admin/workers")
        except httpx.HTTPError:
            return False
        return any(w["state"] == "standby" or w["device"] not in (None, "cpu") for w in workers)

    server.wait("a spare process", stands_by, 2 * WHOLE_S)


def pause(seconds: float) -> None:
    time.sleep(seconds)
