"""Which replica computes an expert's tokens in a step whose choices are known.

Legend: E logical experts, W workers.

By the placement alone, the workers that lack an expert take its replicas in turn. With the step's own counts, replicas
are chosen so that the busiest worker has least: experts are taken in descending order of their tokens, and each goes to
the replica whose worker has least so far (Graham 1969), or is split by the workers that its tokens come from, if its
busiest replica then ends sooner although it is read more than once. The choice is a function of counts and placement,
so all workers that know them come to the same one.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]

READ_TOKENS = 8
"""Tokens that take as long as an expert's weights take to be read from memory: an expert that two workers compute is
read twice."""


class ReplicaChoice:
    """The choices of one layer under one placement."""

    def __init__(self, holds_WE: BoolArray) -> None:
        """Which worker may compute which expert; at least one may compute each."""
        self._size = len(holds_WE)
        copies_E = holds_WE.sum(axis=0)
        self._owner_E = holds_WE.argmax(axis=0).astype(np.int64)
        self._lone_E = copies_E == 1
        self.replicated: IntArray = np.flatnonzero(copies_E > 1)
        """The experts with more than one replica."""
        self._holders = {int(expert): np.flatnonzero(holds_WE[:, expert]).tolist() for expert in self.replicated}

    def ranks(self, tokens_WE: IntArray) -> IntArray:
        """[W, E] the worker that computes each expert's tokens of each worker. tokens_WE: how many there are in the
        step."""
        total_E = tokens_WE.sum(axis=0)
        cost_E = np.where(total_E > 0, total_E + READ_TOKENS, 0)
        lone_E = np.where(self._lone_E, cost_E, 0)
        busy: list[float] = np.bincount(self._owner_E, lone_E, self._size).tolist()
        chosen = np.tile(self._owner_E, (self._size, 1))
        own = total_E[self.replicated]
        for place in np.argsort(-own, kind="stable")[: int((own > 0).sum())].tolist():
            expert = int(self.replicated[place])
            holders, cost = self._holders[expert], float(cost_E[expert])
            rank = min(holders, key=busy.__getitem__)
            whole = busy[rank] + cost
            if cost > 2 * READ_TOKENS:
                apart = busy.copy()
                ranks = self._split(tokens_WE[:, expert].tolist(), holders, apart)
                if max(apart[holder] for holder in holders) < max(whole, *(busy[holder] for holder in holders)):
                    busy, chosen[:, expert] = apart, ranks
                    continue
            busy[rank] = whole
            chosen[:, expert] = rank
        return chosen

    def _split(self, tokens_W: Sequence[int], holders: Sequence[int], busy: list[float]) -> list[int]:
        """[W] the replica that gets each worker's tokens of one expert; a worker's own one among equals. `busy` is
        updated."""
        ranks, unread = [holders[0]] * self._size, set(holders)
        for source in sorted(range(self._size), key=lambda rank: -tokens_W[rank]):
            if not tokens_W[source]:
                break
            ends = {rank: busy[rank] + READ_TOKENS * (rank in unread) for rank in holders}
            ranks[source] = min(holders, key=lambda rank: (ends[rank], rank != source, rank))
            busy[ranks[source]] = ends[ranks[source]] + tokens_W[source]
            unread.discard(ranks[source])
        return ranks
