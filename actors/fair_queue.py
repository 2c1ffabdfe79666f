"""The queue of requests, in which clients take turns. Pure.

Fair queueing (Demers, Keshav, Shenker, 1989), in tokens: every sequence has a turn, a number, and the lowest is the
next. The first of a client has the turn that it is now; each further one of that client comes as much later as the one
before it costs. A sequence that leaves to run moves the present turn on by its cost, divided by the clients that wait.
So a client that asks for a thousand answers waits for its own, and whoever comes then goes before nearly all of them.
Nobody starves: the present turn grows with each that is served, so later ones line up behind. With one client it is
first come, first served.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import Counter

from actors.sequences import Sequence

SEQUENCE_TOKENS = 256
"""What a sequence costs besides its tokens: those that it will generate are not known yet."""
SPARE_CLIENTS = 64
"""Clients that may be remembered though they wait for nothing."""


class FairQueue:
    """Sequences in order of their turns; of equal ones, by arrival."""

    __slots__ = ("_now", "_upcoming", "_waiting", "items")

    def __init__(self) -> None:
        self.items: list[Sequence] = []
        self._now = 0
        """The present turn."""
        self._waiting: Counter[str] = Counter()
        """Sequences, by client."""
        self._upcoming: dict[str, int] = {}
        """The turn that a client's next sequence gets, unless that is over."""

    def __len__(self) -> int:
        return len(self.items)

    def enter(self, sequence: Sequence) -> None:
        """A sequence that has just come, or has to line up again."""
        client = sequence.client
        sequence.turn = max(self._now, self._upcoming.get(client, 0))
        self._upcoming[client] = sequence.turn + _cost(sequence)
        if len(self._upcoming) > len(self.items) + SPARE_CLIENTS:
            self._upcoming = {name: turn for name, turn in self._upcoming.items() if turn > self._now}
        self.put_back(sequence)

    def put_back(self, sequence: Sequence) -> None:
        """One that has left, to the place that it had."""
        self._waiting[sequence.client] += 1
        insort(self.items, sequence, key=_place)

    def remove(self, sequence: Sequence) -> None:
        at = bisect_left(self.items, _place(sequence), key=_place)
        assert self.items[at] is sequence
        del self.items[at]
        self._waiting[sequence.client] -= 1
        if not self._waiting[sequence.client]:
            del self._waiting[sequence.client]

    def start(self, sequence: Sequence) -> None:
        """It leaves to run."""
        clients = len(self._waiting)
        self.remove(sequence)
        # one less than its cost: the next of the same client comes behind whoever comes now
        self._now = max(self._now, sequence.turn) + max(1, (_cost(sequence) - 1) // clients)

    def validate(self) -> None:
        places = [_place(sequence) for sequence in self.items]
        assert places == sorted(set(places)), "the queue is out of order"
        assert self._waiting == Counter(sequence.client for sequence in self.items)


def _cost(sequence: Sequence) -> int:
    return len(sequence.tokens) + SEQUENCE_TOKENS


def _place(sequence: Sequence) -> tuple[int, int]:
    return sequence.turn, sequence.arrival
