"""The matrix of faults. A scenario does its harm and returns; that the cluster gets whole again is checked outside."""

from __future__ import annotations

from collections.abc import Callable

from tests.chaos.bench import Bench, pause

Scenario = Callable[[Bench], None]

INTO_COPIES_S = (0.05, 0.8)
"""After a re-placement began: experts are being copied then, for the bandwidth is limited."""
INTO_RECOVERY_S = 0.4


def strike(bench: Bench, *roles: str, hang: bool = False) -> None:
    bench.strike(*roles, hang=hang)


def strike_while_moving(bench: Bench, *roles: str, hang: bool = False) -> None:
    bench.move_everything()
    pause(bench.rng.uniform(*INTO_COPIES_S))
    bench.strike(*roles, hang=hang)


def strike_while_scaling(bench: Bench, role: str) -> None:
    bench.scale(bench.workers + 1)
    pause(0.5 + 3 * bench.rng.random())
    bench.strike(role)
    bench.settle()
    bench.scale(bench.workers - 1)


def strike_twice(bench: Bench, first: str, second: str) -> None:
    """The second while the recovery from the first is under way."""
    bench.strike(first)
    pause(INTO_RECOVERY_S)
    bench.strike(second)


def move(bench: Bench) -> None:
    end = bench.finish(bench.move_everything())
    assert end["phase"] == "completed", end


def scale_up_and_down(bench: Bench) -> None:
    before = bench.workers
    for workers in (before + 2, before):
        end = bench.finish(bench.scale(workers))
        assert end["phase"] == "completed", end
    assert end["safe_to_terminate"], end
    assert len(end["retiring"]) == 2, end


CALM: dict[str, Scenario] = {"every expert moves": move, "2 more workers, and 2 fewer": scale_up_and_down}
"""No fault: no request may be refused either."""


def _named(scenario: Callable[..., None], *roles: str, **settings: bool) -> Scenario:
    return lambda bench: scenario(bench, *roles, **settings)


FAULTS: dict[str, Scenario] = {
    "kill host": _named(strike, "host"),
    "kill engine": _named(strike, "engine"),
    "kill coordinator": _named(strike, "coordinator"),
    "kill migrator": _named(strike, "migrator"),
    "stop host": _named(strike, "host", hang=True),
    "stop engine": _named(strike, "engine", hang=True),
    "stop coordinator": _named(strike, "coordinator", hang=True),
    "kill 2 hosts": _named(strike, "host", "host"),
    "kill host and engine": _named(strike, "host", "engine"),
    "kill host and coordinator": _named(strike, "host", "coordinator"),
    "kill engine and coordinator": _named(strike, "engine", "coordinator"),
    "kill host, then host in recovery": _named(strike_twice, "host", "host"),
    "kill host, then engine in recovery": _named(strike_twice, "host", "engine"),
    "kill host in re-placement": _named(strike_while_moving, "host"),
    "kill engine in re-placement": _named(strike_while_moving, "engine"),
    "kill coordinator in re-placement": _named(strike_while_moving, "coordinator"),
    "kill migrator in re-placement": _named(strike_while_moving, "migrator"),
    "stop migrator in re-placement": _named(strike_while_moving, "migrator", hang=True),
    "kill host while scaling up": _named(strike_while_scaling, "host"),
}
