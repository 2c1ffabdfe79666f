"""Which worker fetches an expert of a step that no worker has in memory.

A placement says beforehand who serves an expert, and the slowest worker of a step then fetches more than its share. An
expert that lies in no memory lies on every worker's disk, so the misses of a step can be dealt when they are known.
"""

from __future__ import annotations

from collections.abc import Sequence


def deal(missing: Sequence[int], homes: Sequence[int], fetch_s: Sequence[float]) -> list[int]:
    """The rank that fetches each of the `missing` experts, given in the order in which they matter.

    homes: [E] the rank that serves each expert by the placement: it is preferred among equals, then the lowest rank.
    fetch_s: [W] seconds that each rank takes for an expert; infinite for a rank that fetches none. Each expert goes to
    the rank that would have it first. For equal rates no other deal ends sooner.
    """
    ends_s = list(fetch_s)
    ranks = []
    for expert in missing:
        home, least = homes[expert], min(ends_s)
        rank = home if ends_s[home] <= least else ends_s.index(least)
        ends_s[rank] += fetch_s[rank]
        ranks.append(rank)
    return ranks
