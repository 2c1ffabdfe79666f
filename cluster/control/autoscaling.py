"""How many workers the load asks for: a pure function of what was seen over a window.

Demand is measured in units of today's capacity. A request takes a seat (of `max_num_seqs`) and a part of the KV
cache; those that wait are taken to need as much of it as those that run. The scarcer of the two counts.

Hysteresis: up above `UP`, down only where what remains would stay below `DOWN`, so that no constant load makes it
swing: after a step up demand is too high to step down, after a step down too low to step up.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

UP = 0.85
DOWN = 0.5
AIM = 0.65
"""Demand that a step up aims at."""
UP_COOLDOWN = 2.0
DOWN_COOLDOWN = 8.0
"""Windows since the last change of size. Workers too many cost money, workers too few cost answers: down is slower."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    min_workers: int
    max_workers: int
    seats_per_worker: int
    """Requests that a worker runs at a time."""
    window_s: float = 15.0
    """Seconds for which the load must have been seen. Reports come about once per second."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """The engine at one moment."""

    at_s: float
    waiting: int
    running: int
    kv_usage: float
    """Share of all KV-cache blocks in use, 0..1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    target: int
    reason: str


def demand(sample: Sample, *, workers: int, seats_per_worker: int) -> float:
    """Of seats or KV cache, whichever is scarcer, in units of what `workers` have."""
    wanted = sample.running + sample.waiting
    seats = wanted / (workers * seats_per_worker)
    # nothing runs, yet requests wait: they are about to be admitted, or all wait for room
    cache = sample.kv_usage * wanted / sample.running if sample.running else sample.kv_usage
    return max(seats, cache)


def recommend(policy: Policy, samples: Sequence[Sample], *, workers: int, now: float, changed_at: float) -> Verdict:
    """The number of workers to have, `workers` where nothing should change, and why.

    samples: oldest first, of the current size alone. Never outside the policy's limits.
    """
    if workers < policy.min_workers:
        return Verdict(target=policy.min_workers, reason=f"at least {policy.min_workers} are to serve")
    if workers > policy.max_workers:
        return Verdict(target=policy.max_workers, reason=f"at most {policy.max_workers} are to serve")
    window = [sample for sample in samples if now - sample.at_s <= policy.window_s]
    if not samples or now - samples[0].at_s < policy.window_s or not window:
        return Verdict(target=workers, reason=f"the load has not been seen for {policy.window_s:g} s")
    demands = [demand(sample, workers=workers, seats_per_worker=policy.seats_per_worker) for sample in window]
    mean, peak, since = sum(demands) / len(demands), max(demands), now - changed_at
    waiting = sum(sample.waiting for sample in window) / len(window)
    seen = f"demand {mean:.0%} of capacity, {waiting:.1f} waiting, over {policy.window_s:g} s"
    if mean > UP:
        return _up(policy, workers, mean, since, seen)
    # of what a step down would leave, were the busiest moment to come again
    left = peak * workers / (workers - 1) if workers > policy.min_workers else 1.0
    if left < DOWN:
        if since < DOWN_COOLDOWN * policy.window_s:
            return Verdict(target=workers, reason=f"{seen}; the last change was {since:.0f} s ago")
        return Verdict(target=workers - 1, reason=f"{seen}; {workers - 1} would be at {left:.0%}")
    return Verdict(target=workers, reason=seen)


def _up(policy: Policy, workers: int, mean: float, since: float, seen: str) -> Verdict:
    # at most twice as many at a time: the queue of a moment is a poor forecast
    wanted = min(policy.max_workers, 2 * workers, max(workers + 1, math.ceil(workers * mean / AIM)))
    if wanted <= workers:
        return Verdict(target=workers, reason=f"{seen}; at most {policy.max_workers} are to serve")
    if since < UP_COOLDOWN * policy.window_s:
        return Verdict(target=workers, reason=f"{seen}; the last change was {since:.0f} s ago")
    return Verdict(target=wanted, reason=seen)
