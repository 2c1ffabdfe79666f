"""The nodes on which workers on CPUs may run, and which of them have come since the workers were started."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

SETTLED_S = 10.0
"""Seconds without another new node, after which workers may move to the new ones. Machines often come together."""


class Homes:
    """Owns what is known of nodes with free cores."""

    def __init__(self) -> None:
        self._free: Mapping[str, int] = {}
        self._used: set[str] = set()
        """Nodes that a worker has run on, or was sent to. One that workers have left may be about to be given back."""
        self._since = 0.0

    def seen(self, free: Mapping[str, int], now: float) -> None:
        """free: node -> whole cores that are free, for every node that has any."""
        if free.keys() - self._free.keys():
            self._since = now
        self._free = dict(free)

    def use(self, nodes: Iterable[str]) -> None:
        self._used.update(nodes)

    def fresh(self, now: float) -> dict[str, int]:
        """Nodes that no worker has run on yet -> cores that are free; empty while more may be coming."""
        if now - self._since < SETTLED_S:
            return {}
        return {node: cores for node, cores in self._free.items() if node not in self._used}

    def resume(self, now: float) -> None:
        """Set all times by the clock of a restarted coordinator."""
        self._since = now
