"""Last in, first out, after experts without tokens (Huang et al. 2023, "Towards MoE Deployment", section VI).

Engines compute experts in the order of their numbers, so the expert that came first in one step is also needed first in
the next one. The policy therefore keeps it, and lets the newest go.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence


class Lifo:
    """The newest expert without tokens in this step leaves; where all have tokens, the newest of all."""

    def __init__(self) -> None:
        self._active: frozenset[int] = frozenset()

    def note(self, active: Sequence[int]) -> None:
        self._active = frozenset(active)

    def victim(self, candidates: Sequence[int], needed: Collection[int]) -> int:
        allowed = [expert for expert in candidates if expert not in needed]
        return next((expert for expert in reversed(allowed) if expert not in self._active), allowed[-1])
