"""The autoscaler: how many workers the load needs, as a pure function of samples over a window.

Demand is measured in units of the present capacity. A request takes a seat (one of `max_num_seqs`) and a part of the
KV cache; a waiting request counts as much cache as a running one. The scarcer of the two resources decides.

Hysteresis: the number goes up if demand is above `UP`, and down only if the smaller number's demand would be below
`DOWN`. So a constant load never makes it swing: after a step up, demand is too high for a step down, and the reverse.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from elastic_moe.cluster.lines import counted

UP = 0.85
DOWN = 0.5
AIM = 0.65
"""Demand that a step up aims at."""
UP_COOLDOWN = 2.0
DOWN_COOLDOWN = 8.0
"""Number of windows to wait after a change. It is larger for a step down, because lacking workers slow every answer."""
REST = 20.0
"""Number of windows without any request after which no worker is kept, where the policy allows that."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    min_workers: int
    """Fewest workers, at least 1. Only a rest (`may_rest`) keeps none."""
    max_workers: int
    may_rest: bool = False
    """Whether no worker is kept where there has been no request for long."""
    seats_per_worker: int
    """Requests that a worker runs at a time."""
    window_s: float = 15.0
    """Seconds over which samples are averaged. Samples come about once per second."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """The engine's load at one moment."""

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
    """Demand for seats or for KV cache, whichever is larger, in units of what `workers` have."""
    wanted = sample.running + sample.waiting
    seats = wanted / (workers * seats_per_worker)
    # if none runs, the cache that waiting requests need is not known
    cache = sample.kv_usage * wanted / sample.running if sample.running else sample.kv_usage
    return max(seats, cache)


def recommend(
    policy: Policy, samples: Sequence[Sample], *, workers: int, now: float, changed_at: float, idle_since: float = 0.0
) -> Verdict:
    """The number of workers that there should be, within the policy's limits, and the reason.

    workers: the present number. samples: those taken with this number, the oldest first. idle_since: when the last
    request was seen.
    """
    if workers < policy.min_workers:
        return Verdict(target=policy.min_workers, reason=f"at least {counted(policy.min_workers, 'worker')} must serve")
    if workers > policy.max_workers:
        return Verdict(target=policy.max_workers, reason=f"at most {counted(policy.max_workers, 'worker')} may serve")
    window = [sample for sample in samples if now - sample.at_s <= policy.window_s]
    if not samples or now - samples[0].at_s < policy.window_s or not window:
        return Verdict(target=workers, reason=f"the load has not been seen for {policy.window_s:g} s")
    demands = [demand(sample, workers=workers, seats_per_worker=policy.seats_per_worker) for sample in window]
    mean, peak, since = sum(demands) / len(demands), max(demands), now - changed_at
    waiting = sum(sample.waiting for sample in window) / len(window)
    seen = f"demand {mean:.0%} of capacity, {waiting:.1f} waiting, over {policy.window_s:g} s"
    if mean > UP:
        return _up(policy, workers, mean, since, seen)
    idle_s = now - max(idle_since, changed_at)
    if policy.may_rest and workers <= policy.min_workers and not peak and idle_s >= REST * policy.window_s:
        return Verdict(target=0, reason=f"no request for {idle_s:.0f} s")
    # the demand of the busiest moment, in units of what one worker fewer would have
    left = peak * workers / (workers - 1) if workers > policy.min_workers else 1.0
    if left < DOWN:
        if since < DOWN_COOLDOWN * policy.window_s:
            return Verdict(target=workers, reason=f"{seen}; the last change was {since:.0f} s ago")
        return Verdict(
            target=workers - 1, reason=f"{seen}; {counted(workers - 1, 'worker')} would have a demand of {left:.0%}"
        )
    return Verdict(target=workers, reason=seen)


def _up(policy: Policy, workers: int, mean: float, since: float, seen: str) -> Verdict:
    # at most twice as many at a time, because a queue may be short-lived
    wanted = min(policy.max_workers, 2 * workers, max(workers + 1, math.ceil(workers * mean / AIM)))
    if wanted <= workers:
        return Verdict(target=workers, reason=f"{seen}; at most {counted(policy.max_workers, 'worker')} may serve")
    if since < UP_COOLDOWN * policy.window_s:
        return Verdict(target=workers, reason=f"{seen}; the last change was {since:.0f} s ago")
    return Verdict(target=wanted, reason=seen)
