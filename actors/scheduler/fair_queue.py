"""The queue of requests, in which clients take turns. Pure.

Fair queueing (Demers, Keshav, Shenker, 1989), in tokens: every sequence has a turn, a number, and the lowest is the
next. The first of a client has the turn that it is now; each further one of that client comes as much later as the one
before it costs. A sequence that leaves to run moves the present turn on by its cost, divided by the clients that wait.
So a client that asks for a thousand answers waits for its own, and whoever comes then goes before nearly all of them.
Nobody starves: the present turn grows with each that is served, so later ones line up behind.

A client's turns are shared out among its calls in the same way, one sequence each: a call for 64 answers does not keep
the next call of the same client waiting. With calls for one answer by one client it is first come, first served.
"""

from __future__ import annotations

from bisect import bisect_left, insort

from elastic_moe.actors.scheduler.sequences import Sequence

SEQUENCE_TOKENS = 256
"""What a sequence costs besides its tokens: those that it will generate are not known yet."""
LOOK_AHEAD = 128
"""Of a client's sequences, where the first of each of its calls is looked for."""
SPARE_CLIENTS = 64
"""Clients that may be remembered though they wait for nothing."""


class FairQueue:
    """Sequences in order of their turns; of equal ones, by arrival."""

    __slots__ = ("_lines", "_now", "_upcoming", "items")

    def __init__(self) -> None:
        self.items: list[Sequence] = []
        self._now = 0
        """The present turn."""
        self._lines: dict[str, _Line] = {}
        """Of clients that have sequences here."""
        self._upcoming: dict[str, int] = {}
        """The turn that a client's next sequence gets, unless that is over."""

    def __len__(self) -> int:
        return len(self.items)

    def enter(self, sequence: Sequence) -> None:
        """A sequence that has just come, or has to line up again."""
        client = sequence.client
        turn = max(self._now, self._upcoming.get(client, 0))
        self._upcoming[client] = turn + _cost(sequence)
        if len(self._upcoming) > len(self.items) + SPARE_CLIENTS:
            self._upcoming = {name: turn for name, turn in self._upcoming.items() if turn > self._now}
        later = self._lines.setdefault(client, _Line()).enter(sequence)
        # the client has one turn more; those behind the newcomer in its line move on by one
        for other in later:
            other.turn, turn = turn, other.turn
        sequence.turn = turn
        if later:
            self.items.sort(key=_place)
        insort(self.items, sequence, key=_place)

    def put_back(self, sequence: Sequence) -> None:
        """One that has left, to the place that it had."""
        self._lines.setdefault(sequence.client, _Line()).put_back(sequence)
        insort(self.items, sequence, key=_place)

    def remove(self, sequence: Sequence) -> None:
        at = bisect_left(self.items, _place(sequence), key=_place)
        assert self.items[at] is sequence
        del self.items[at]
        line = self._lines[sequence.client]
        line.remove(sequence)
        if not line.items:
            del self._lines[sequence.client]

    def start(self, sequence: Sequence) -> None:
        """It leaves to run."""
        clients = len(self._lines)
        line = self._lines[sequence.client]
        line.round = max(line.round, sequence.rank)
        self.remove(sequence)
        # one less than its cost: the next of the same client comes behind whoever comes now
        self._now = max(self._now, sequence.turn) + max(1, (_cost(sequence) - 1) // clients)

    def firsts(self) -> list[Sequence]:
        """The next of every client, and of every call of it whose next is not far behind."""
        found: dict[tuple[str, str], Sequence] = {}
        for client, line in self._lines.items():
            for sequence in line.items[:LOOK_AHEAD]:
                found.setdefault((client, sequence.call), sequence)
        return list(found.values())

    def put_first(self, sequence: Sequence) -> None:
        """Before all others. It keeps what its client's later ones cost."""
        first = self.items[0]
        if sequence is first:
            return
        line = self._lines[sequence.client]
        rank = line.items[0].rank
        self.remove(sequence)
        sequence.turn, sequence.rank = first.turn - 1, min(sequence.rank, rank)
        self.put_back(sequence)

    def validate(self) -> None:
        places = [_place(sequence) for sequence in self.items]
        assert places == sorted(set(places)), "the queue is out of order"
        for client, line in self._lines.items():
            assert line.items == [sequence for sequence in self.items if sequence.client == client]
        assert sum(len(line.items) for line in self._lines.values()) == len(self.items)


class _Line:
    """One client's sequences, in the order in which they get its turns."""

    __slots__ = ("_ranks", "items", "round")

    def __init__(self) -> None:
        self.items: list[Sequence] = []
        self.round = 0
        """The highest rank that has left to run."""
        self._ranks: dict[str, int] = {}
        """Rank of the next sequence, by call."""

    def enter(self, sequence: Sequence) -> list[Sequence]:
        """Returns those that come after it, last one first."""
        call = sequence.call
        sequence.rank = max(self.round, self._ranks.get(call, 0))
        self._ranks[call] = sequence.rank + 1
        if len(self._ranks) > 2 * len(self.items) + SPARE_CLIENTS:
            self._ranks = {name: rank for name, rank in self._ranks.items() if rank > self.round}
        at = len(self.items)
        while at and self.items[at - 1].rank > sequence.rank:
            at -= 1
        self.items.insert(at, sequence)
        return self.items[:at:-1]

    def put_back(self, sequence: Sequence) -> None:
        insort(self.items, sequence, key=_place)

    def remove(self, sequence: Sequence) -> None:
        at = bisect_left(self.items, _place(sequence), key=_place)
        assert self.items[at] is sequence
        del self.items[at]


def _cost(sequence: Sequence) -> int:
    return len(sequence.tokens) + SEQUENCE_TOKENS


def _place(sequence: Sequence) -> tuple[int, int]:
    return sequence.turn, sequence.arrival
