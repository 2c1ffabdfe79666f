"""What every planner gets and returns: a budget, and a draft of a placement."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np

from elastic_moe.optimizer.core.problem import IntArray, PlacementProblem
from elastic_moe.optimizer.core.result import Termination
from elastic_moe.optimizer.core.tiering import LevelArray

Clock = Callable[[], float]
"""It returns seconds since some fixed time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """The time, solver and random numbers that a planner may use."""

    ends: float
    """Time of `clock` by which the planner should return."""
    solver: str
    rng: np.random.Generator
    clock: Clock = time.monotonic

    @classmethod
    def of(cls, seconds: float, *, solver: str = "highs", seed: int = 0) -> Budget:
        return cls(ends=time.monotonic() + seconds, solver=solver, rng=np.random.default_rng(seed))

    @property
    def left_s(self) -> float:
        return self.ends - self.clock()

    def share(self, part: float) -> Budget:
        """A budget with the share `part` (0..1) of the time that is left."""
        now = self.clock()
        return replace(self, ends=now + part * (self.ends - now))


@dataclass(slots=True)
class Pace:
    """Measures the time to formulate models, so that none is begun that would exceed the deadline."""

    clock: Clock
    seconds: float = 0.0
    variables: int = 0

    @contextmanager
    def timed(self, variables: int) -> Iterator[None]:
        begun = self.clock()
        yield
        self.seconds += self.clock() - begun
        self.variables += variables

    def allows(self, variables: int, left_s: float) -> bool:
        """Whether a model of this size can be formulated in time, judged by the models before it."""
        return self.seconds / max(self.variables, 1) * variables < left_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Draft:
    """A placement before it is verified and priced."""

    table: IntArray
    """[L, S] slot table."""
    levels: LevelArray | None = None
    """[L, E, W] the tiers that the planner has chosen; None: the best ones for the table."""
    pin_all: bool = False
    """Whether all that is found in a device is pinned there, but for the slot through which the others pass."""
    reason: str
    planner: str = ""
    """Name of the planner that has made the table, where it is not the one that was asked."""
    termination: Termination = Termination.COMPLETED
    bound: float = 0.0
    """Lower bound on the total cost that the planner has proved; 0 where it has proved none."""


Planner = Callable[[PlacementProblem, Budget], Draft]
