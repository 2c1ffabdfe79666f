"""Places for waiting requests: the number of all places, and the number that one client may take. Pure.

An answer takes a place when it is accepted, and gives it back with its first token. A client may have at most three
times as many places as then remain free: the first client three quarters of all, the second three quarters of the rest,
and so on. So a further client finds room, however many places the others have asked for.
"""

from __future__ import annotations

from collections import Counter

from elastic_moe.cluster.errors import RequestError
from elastic_moe.cluster.lines import counted

SHARE = 3
"""Places that a client may have for each place that remains free."""


class Places:
    """The taken places, counted for each client."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._taken: Counter[str] = Counter()

    @property
    def taken(self) -> int:
        return self._taken.total()

    def check(self, client: str, count: int) -> None:
        """Raises RequestError: 503 where there is no room for `count` more now, 400 where there never will be."""
        if count > self._most:
            raise RequestError(
                f"n: at most {counted(self._most, 'answer')} may wait at a time (--max-waiting-requests), got {count}",
                param="n",
            )
        left = self._most - self.taken - count
        own = self._taken[client]
        if left < 0 or (own and own + count > SHARE * left):
            whose = f"{own} of them are yours" if own else "none of them is yours"
            raise RequestError(
                f"too many requests wait: {self.taken} of at most {self._most}, and {whose}; try again later",
                code="too_many_requests",
                status=503,
            )

    def take(self, client: str, count: int) -> Taken:
        """Take `count` places for `client`. Raises RequestError as `check` does."""
        self.check(client, count)
        self._taken[client] += count
        return Taken(self, client, count)

    def give_back(self, client: str, count: int) -> None:
        self._taken[client] -= count
        assert self._taken[client] >= 0
        if not self._taken[client]:
            del self._taken[client]


class Taken:
    """The places of one request."""

    def __init__(self, places: Places, client: str, count: int) -> None:
        self._places = places
        self._client = client
        self._count = count

    def give_back(self, count: int | None = None) -> None:
        """Give back `count` places; without a number, all that the request still has."""
        count = self._count if count is None else count
        assert count <= self._count
        self._count -= count
        self._places.give_back(self._client, count)
