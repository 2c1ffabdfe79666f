"""The matrix of faults. A scenario does its harm and returns; that the cluster gets whole again is checked outside."""

from __future__ import annotations

import time
from collections.abc import Callable

from tests.chaos.bench import ENDED, Bench, pause
from tests.chaos.figures import move_a_quarter, scale_up_and_down

Figures = dict[str, str]
Scenario = Callable[[Bench], "Figures | None"]

INTO_RECOVERY_S = 0.4


def strike(bench: Bench, *roles: str, hang: bool = False) -> None:
    bench.strike(*roles, hang=hang)


def strike_with_fork_servers(bench: Bench, role: str) -> None:
    """All that there are: what was killed before is started again only when it is needed."""
    bench.strike(role, *["fork server"] * len(bench.processes("fork server")))


def strike_while_idle(bench: Bench, *roles: str, hang: bool = False) -> None:
    """Found although nothing runs; the load comes back when it is dealt with."""
    bench.load.rest()
    bench.strike(*roles, hang=hang)
    bench.server.wait("the victims' end", lambda: not bench.victims_live(), 60)
    bench.server.wait("readiness", bench.server.ready, 60)
    bench.load.go_on()
    bench.struck_at = time.monotonic()


def strike_in_prefill(bench: Bench, *roles: str) -> None:
    """Nearly every request has a prompt of many steps."""
    bench.load.prefill = 0.9
    pause(2.0)
    bench.strike(*roles)
    bench.load.prefill = 0.1


def strike_while_moving(bench: Bench, *roles: str, hang: bool = False) -> None:
    bench.move_everything()
    pause(bench.rng.uniform(*bench.into_move_s))
    bench.strike(*roles, hang=hang)


def strike_while_planning(bench: Bench, *roles: str) -> None:
    response = bench.server.post("/admin/rebalance", {"planner": "auto"})
    assert response.status_code == 202, response.text
    pause(bench.rng.uniform(0.0, 0.3))
    bench.strike(*roles)


def strike_in_flip(bench: Bench, *roles: str) -> None:
    """As soon as all copies have been made: workers prepare, or flip."""
    operation = bench.move_everything()

    def flips() -> bool:
        seen = bench.ask(f"/admin/operations/{operation}")
        return seen.get("progress", 0.0) >= 0.8 or seen.get("phase") in ENDED

    bench.server.wait("the flip", flips, 60, every_s=0.002)
    bench.strike(*roles)


def strike_while_scaling(bench: Bench, role: str) -> None:
    bench.scale(bench.workers + 1)
    pause(0.5 + 3 * bench.rng.random())
    bench.strike(role)
    bench.settle()
    bench.scale(bench.workers - 1)


def strike_who_leaves(bench: Bench, *, hang: bool = False) -> None:
    """The source of the copies dies while it gives its experts away and lets its requests finish."""
    bench.finish(bench.scale(bench.workers + 1))
    worker = bench.server.get("/admin/placement")["workers"][-1]["id"]
    process = bench.worker(worker)
    bench.retire(worker)
    pause(bench.rng.uniform(0.0, min(0.5, bench.into_move_s[1])))
    # one whose experts need no copies may have left
    if process.is_running():
        bench.strike_process(process, hang=hang)


def strike_api(bench: Bench, *others: str) -> None:
    """Only the connections of the API replica end, once each; background responses go on."""
    bench.load.background = 0.5
    pause(2.0)
    bench.load.forgives = True
    bench.strike("api", *others)
    bench.settle()
    bench.load.forgives = False
    cut = bench.load.tally.cut
    assert cut <= bench.load.clients, f"{cut} requests of {bench.load.clients} clients were lost"


def strike_twice(bench: Bench, first: str, second: str) -> None:
    """The second while the recovery from the first is under way."""
    bench.strike(first)
    begun = bench.struck_at
    pause(INTO_RECOVERY_S)
    bench.strike(second)
    bench.struck_at = begun


def move(bench: Bench) -> None:
    end = bench.finish(bench.move_everything())
    assert end["phase"] == "completed", end


CALM: dict[str, Scenario] = {
    "every expert moves": move,
    "a quarter of the experts moves": move_a_quarter,
    "2 more workers, and 2 fewer": scale_up_and_down,
}
"""No fault."""


def _named(scenario: Callable[..., None], *roles: str, **settings: bool) -> Scenario:
    return lambda bench: scenario(bench, *roles, **settings)


FAULTS: dict[str, Scenario] = {
    "kill worker": _named(strike, "worker"),
    "kill worker in prefill": _named(strike_in_prefill, "worker"),
    "kill worker, idle": _named(strike_while_idle, "worker"),
    "kill engine": _named(strike, "engine"),
    "kill coordinator": _named(strike, "coordinator"),
    "kill migrator": _named(strike, "migrator"),
    "kill API replica": strike_api,
    "kill API replica and engine": _named(strike_api, "engine"),
    "kill API replica and worker": _named(strike_api, "worker"),
    "stop worker": _named(strike, "worker", hang=True),
    "stop worker, idle": _named(strike_while_idle, "worker", hang=True),
    "stop engine": _named(strike, "engine", hang=True),
    "stop coordinator": _named(strike, "coordinator", hang=True),
    "kill 2 workers": _named(strike, "worker", "worker"),
    "kill worker and engine": _named(strike, "worker", "engine"),
    "kill worker and coordinator": _named(strike, "worker", "coordinator"),
    "kill worker and fork servers": _named(strike_with_fork_servers, "worker"),
    "kill engine and fork servers": _named(strike_with_fork_servers, "engine"),
    "kill coordinator and fork servers": _named(strike_with_fork_servers, "coordinator"),
    "kill engine and coordinator": _named(strike, "engine", "coordinator"),
    "kill worker, then worker in recovery": _named(strike_twice, "worker", "worker"),
    "kill worker, then engine in recovery": _named(strike_twice, "worker", "engine"),
    "kill worker, then coordinator": _named(strike_twice, "worker", "coordinator"),
    "kill engine, then coordinator": _named(strike_twice, "engine", "coordinator"),
    "kill worker while planning": _named(strike_while_planning, "worker"),
    "kill worker in re-placement": _named(strike_while_moving, "worker"),
    "stop worker in re-placement": _named(strike_while_moving, "worker", hang=True),
    "kill engine in re-placement": _named(strike_while_moving, "engine"),
    "kill coordinator in re-placement": _named(strike_while_moving, "coordinator"),
    "kill migrator in re-placement": _named(strike_while_moving, "migrator"),
    "stop migrator in re-placement": _named(strike_while_moving, "migrator", hang=True),
    "kill worker in the flip": _named(strike_in_flip, "worker"),
    "kill engine in the flip": _named(strike_in_flip, "engine"),
    "kill coordinator in the flip": _named(strike_in_flip, "coordinator"),
    "kill worker while scaling up": _named(strike_while_scaling, "worker"),
    "kill coordinator while scaling up": _named(strike_while_scaling, "coordinator"),
    "kill the worker that leaves": strike_who_leaves,
}
