"""The queue of requests, in which clients take turns. Pure.

Fair queueing (Demers, Keshav, Shenker, 1989), in tokens: every request has a number, its turn, and the lowest turn is
served next. A client's first request gets the present turn. Each further request of the client gets a turn that is
later by the cost of the request before it. A request that leaves to run advances the present turn by its cost, divided
by the number of clients that wait. So a client that asks for a thousand answers waits for its own answers, and a client
that comes later is served before nearly all of them. No request starves: the present turn grows with each request that
is served, so newcomers get later turns.

A client's turns are shared among its API calls in the same way, one request each: a call for 64 answers does not make
the next call of the same client wait. If one client sends calls for one answer each, they are served in order.

Priorities order the requests of one client: a lower number takes an earlier one of the client's turns. They give no
client the turns of another. A request lets at most `OVERTAKEN` later ones of its client past for their priority, so it
does not starve either.
"""

from __future__ import annotations

from elastic_moe.actors.caches.running_requests import OrderedRequests, RunningRequest

REQUEST_TOKENS = 256
"""Cost of a request besides its known tokens, because the tokens that it will generate are not known yet."""
LOOK_AHEAD = 128
"""Number of a client's requests among which the first one of each of its calls is looked for."""
OVERTAKEN = 256
"""Number of later requests that a request lets past because of their priority."""
SPARE_CLIENTS = 64
"""Number of clients that may be remembered although they wait for nothing."""


class FairQueue(OrderedRequests):
    """Requests in order of their turns; requests with the same turn in order of arrival."""

    __slots__ = ("_lines", "_now", "_upcoming")

    def __init__(self) -> None:
        super().__init__(_place)
        self._now = 0
        """The present turn."""
        self._lines: dict[str, _Line] = {}
        """By client, for clients that have requests here."""
        self._upcoming: dict[str, int] = {}
        """By client, the turn of the client's next request, unless the present turn is later."""

    def enter(self, request: RunningRequest) -> None:
        """Add a request that is new, or that has to queue again."""
        client = request.client
        turn = max(self._now, self._upcoming.get(client, 0))
        self._upcoming[client] = turn + _cost(request)
        if len(self._upcoming) > len(self.items) + SPARE_CLIENTS:
            self._upcoming = {name: turn for name, turn in self._upcoming.items() if turn > self._now}
        later = self._lines.setdefault(client, _Line()).enter(request)
        # the client has one more turn; its requests behind the newcomer each take the next turn
        for other in later:
            other.turn, turn = turn, other.turn
        request.turn = turn
        if later:
            self.items.sort(key=_place)
        self.add(request)

    def put_back(self, request: RunningRequest) -> None:
        """Put a request that had left back to its old place."""
        self._lines.setdefault(request.client, _Line()).add(request)
        self.add(request)

    def remove(self, request: RunningRequest) -> None:
        super().remove(request)
        line = self._lines[request.client]
        line.remove(request)
        if not line.items:
            del self._lines[request.client]

    def start(self, request: RunningRequest) -> None:
        """Remove a request because it begins to run."""
        clients = len(self._lines)
        line = self._lines[request.client]
        line.round = max(line.round, request.rank)
        self.remove(request)
        # one less than the cost, so that the client's next request comes after the requests of a new client
        self._now = max(self._now, request.turn) + max(1, (_cost(request) - 1) // clients)

    def firsts(self) -> list[RunningRequest]:
        """The next request of every client, and of each of a client's calls whose next is not far behind."""
        found: dict[tuple[str, int], RunningRequest] = {}
        for client, line in self._lines.items():
            for request in line.items[:LOOK_AHEAD]:
                found.setdefault((client, request.call), request)
        return list(found.values())

    def put_first(self, request: RunningRequest) -> None:
        """Put a waiting request before all others. The cost of its client's later requests stays as it is."""
        first = self.items[0]
        if request is first:
            return
        line = self._lines[request.client]
        rank = line.items[0].rank
        self.remove(request)
        request.turn, request.rank = first.turn - 1, min(request.rank, rank)
        self.put_back(request)

    def validate(self) -> None:
        places = [_place(request) for request in self.items]
        assert places == sorted(set(places)), "the queue is out of order"
        for client, line in self._lines.items():
            assert line.items == [request for request in self.items if request.client == client]
        assert sum(len(line.items) for line in self._lines.values()) == len(self.items)


class _Line(OrderedRequests):
    """One client's requests, in the order in which they get its turns."""

    __slots__ = ("_ranks", "round")

    def __init__(self) -> None:
        super().__init__(_place)
        self.round = 0
        """The highest rank of a request that has begun to run."""
        self._ranks: dict[int, int] = {}
        """Rank of the next request, by API call."""

    def enter(self, request: RunningRequest) -> list[RunningRequest]:
        """Add a request. Returns the requests that come after it, the last one first."""
        call = request.call
        request.rank = max(self.round, self._ranks.get(call, 0))
        self._ranks[call] = request.rank + 1
        if len(self._ranks) > 2 * len(self.items) + SPARE_CLIENTS:
            self._ranks = {name: rank for name, rank in self._ranks.items() if rank > self.round}
        at = len(self.items)
        while at and _passes(request, self.items[at - 1]):
            at -= 1
        self.items.insert(at, request)
        for other in self.items[at + 1 :]:
            other.overtaken += other.priority > request.priority
        return self.items[:at:-1]


def _passes(request: RunningRequest, other: RunningRequest) -> bool:
    """Whether a client's new request comes before its request `other`, which has waited longer."""
    if request.priority == other.priority:
        return request.rank < other.rank
    return request.priority < other.priority and other.overtaken < OVERTAKEN


def _cost(request: RunningRequest) -> int:
    return len(request.tokens) + REQUEST_TOKENS


def _place(request: RunningRequest) -> tuple[int, int]:
    return request.turn, request.arrival
