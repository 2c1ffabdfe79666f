"""The fewest misses that any policy can have, which takes knowing the future (Belady 1966, MIN)."""

from __future__ import annotations

from collections.abc import Sequence

from elastic_moe.optimizer.buffering.simulate import CacheCounts, Step, counted


def fewest_misses(steps: Sequence[Step], slots: int, *, skip: int = 0) -> CacheCounts:
    """What a cache of `slots` slots counts that keeps, after every step, the experts which are used again soonest.

    It may keep any of those that it held or that had tokens. A real cache must keep the last one that it fetched, so
    this is a bound, which real caches of several slots come near to. Steps before `skip` are not counted.
    """
    never = len(steps)
    uses: dict[int, list[int]] = {}
    for step in range(never - 1, -1, -1):
        for expert in steps[step]:
            uses.setdefault(expert, []).append(step)  # the next use comes last
    held: set[int] = set()
    misses = []
    for active in steps:
        misses.append(sum(expert not in held for expert in active))
        for expert in active:
            uses[expert].pop()
        held |= set(active)
        soonest = sorted(held, key=lambda expert: uses[expert][-1] if uses[expert] else never)
        held = set(soonest[:slots])
    return counted(steps, misses, skip)
