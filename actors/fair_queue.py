"""The queue of requests, in which clients take turns. Pure.

Start-time fair queueing (Goyal, Vin, Cheng, 1996), in tokens: every sequence has a turn, a number, and the lowest is
the next. The first of a client has the turn of the last one that left the queue; each further one of that client comes
as much later as the one before it costs. So a client that asks for a thousand answers waits for its own, whoever comes
then goes before nearly all of them, and nobody starves: turns only grow, so each becomes the lowest. With one client it
is first come, first served.
"""

from __future__ import annotations

from bisect import bisect_left, insort

from actors.sequences import Sequence

SEQUENCE_TOKENS = 256
"""What a sequence costs besides its tokens: those that it will generate are not known yet."""
SPARE_CLIENTS = 64
"""Clients that may be remembered though they wait for nothing."""


class FairQueue:
    """Sequences in order of their turns; of equal ones, by arrival."""

    __slots__ = ("_now", "_upcoming", "items")

    def __init__(self) -> None:
        self.items: list[Sequence] = []
        self._now = 0
        """Turn of the last sequence that left to run."""
        self._upcoming: dict[str, int] = {}
        """The turn that a client's next sequence gets, unless that is over."""

    def __len__(self) -> int:
        return len(self.items)

    def enter(self, sequence: Sequence) -> None:
        """A sequence that has just come, or has to line up again."""
        client = sequence.client
        sequence.turn = max(self._now, self._upcoming.get(client, 0))
        self._upcoming[client] = sequence.turn + len(sequence.tokens) + SEQUENCE_TOKENS
        if len(self._upcoming) > len(self.items) + SPARE_CLIENTS:
            self._upcoming = {name: turn for name, turn in self._upcoming.items() if turn > self._now}
        insort(self.items, sequence, key=_place)

    def put_back(self, sequence: Sequence) -> None:
        """One that has left, to the place that it had."""
        insort(self.items, sequence, key=_place)

    def remove(self, sequence: Sequence) -> None:
        at = bisect_left(self.items, _place(sequence), key=_place)
        assert self.items[at] is sequence
        del self.items[at]

    def start(self, sequence: Sequence) -> None:
        """It leaves to run."""
        self.remove(sequence)
        self._now = max(self._now, sequence.turn)

    def validate(self) -> None:
        places = [_place(sequence) for sequence in self.items]
        assert places == sorted(set(places)), "the queue is out of order"


def _place(sequence: Sequence) -> tuple[int, int]:
    return sequence.turn, sequence.arrival
