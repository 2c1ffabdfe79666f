"""The running requests of all workers as columns of numbers, so that a step costs nothing for each that goes on.

Every worker has as many rows as it may have requests. A row is *steady* while its request goes on decoding: its next
chunk is its newest token, its worker knows everything else, and nothing but the columns changes with a step. The other
running requests have prompts to run, or go on after a cut or a failed step; they are handled one by one.

Legend: R rows, N newest tokens.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import numpy.typing as npt

from elastic_moe.cluster.messages.requests import RequestId

if TYPE_CHECKING:
    from elastic_moe.actors.caches.running_requests import RunningRequest

Owner = TypeVar("Owner", str, int)
Column = npt.NDArray[np.int32]
Indices = npt.NDArray[np.intp]

RECENT_TOKENS = 64
"""Number of newest tokens of a request that the columns hold, before they are brought to the request in one piece."""
MOST_TOKEN_IDS = 1 << 22
"""Stop tokens from this number on are passed over: no vocabulary is so large."""


class Rows:
    """The columns, which others read and nobody else writes. `known`, `started`, `computed` and `length` have the
    meanings of RunningRequest's properties."""

    __slots__ = (
        "_spare",
        "block_size",
        "calls",
        "clients",
        "computed",
        "known",
        "length",
        "limit",
        "mark",
        "names",
        "recent",
        "requests",
        "room",
        "start",
        "started",
        "steady",
    )

    _NUMBERS = ("known", "started", "computed", "length", "limit", "room", "start", "mark")

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self.known, self.started, self.computed, self.length = (np.zeros(0, dtype=np.int32) for _ in range(4))
        self.limit: Column = np.zeros(0, dtype=np.int32)
        """[R] number of tokens at which the request ends because of its length."""
        self.room: Column = np.zeros(0, dtype=np.int32)
        """[R] number of tokens for which the request has blocks."""
        self.start: Column = np.zeros(0, dtype=np.int32)
        """[R] number of prompt tokens."""
        self.mark: Column = np.zeros(0, dtype=np.int32)
        """[R] changes when what is in flight for the row counts no longer."""
        self.steady: npt.NDArray[np.bool_] = np.zeros(0, dtype=np.bool_)
        self.recent: Column = np.zeros((0, RECENT_TOKENS), dtype=np.int32)
        """[R, N] the newest tokens, each at its place modulo N. Requests fetch them before they are overwritten."""
        self.requests: list[RunningRequest | None] = []
        self.names: list[RequestId] = []
        """[R] the requests' ids."""
        self.clients: Counter[str] = Counter()
        """Number of running requests by client, and by API call below. Those without any are left out."""
        self.calls: Counter[int] = Counter()
        self._spare: dict[int, list[int]] = {}
        """First rows of ranges that no worker has, by the size of the range."""

    def take_range(self, size: int) -> int:
        """Returns the first of `size` rows in a row that are free."""
        if spare := self._spare.get(size):
            return spare.pop()
        base = len(self.requests)
        self.requests += [None] * size
        self.names += [RequestId("")] * size
        for name in self._NUMBERS:
            setattr(self, name, np.concatenate([getattr(self, name), np.zeros(size, dtype=np.int32)]))
        self.steady = np.concatenate([self.steady, np.zeros(size, dtype=np.bool_)])
        self.recent = np.concatenate([self.recent, np.zeros((size, RECENT_TOKENS), dtype=np.int32)])
        return base

    def give_range(self, base: int, size: int) -> None:
        """Give back a range whose rows are free."""
        assert not any(self.requests[base : base + size])
        self._spare.setdefault(size, []).append(base)

    def sit(self, row: int, request: RunningRequest, length: int) -> None:
        """Give a free row to a request of `length` tokens, none of which has been run."""
        assert self.requests[row] is None
        self.requests[row], self.names[row] = request, request.request_id
        self.clients[request.client] += 1
        self.calls[request.call] += 1
        self.known[row] = self.length[row] = length
        self.started[row] = self.computed[row] = 0
        self.limit[row], self.start[row] = request.longest, request.num_prompt_tokens

    def begin(self, row: int, computed: int) -> None:
        """The row's first `computed` tokens come from the worker's cache."""
        self.computed[row] = self.started[row] = computed

    def hold(self, row: int, tokens: int) -> None:
        """The row's request has blocks for so many tokens."""
        self.room[row] = tokens

    def rise(self, row: int) -> None:
        """Free a row. Nothing that is in flight for it counts any longer."""
        request = self.at(row)
        _count_off(self.clients, request.client)
        _count_off(self.calls, request.call)
        self.requests[row] = None
        self.known[row] = self.started[row] = 0
        self.cut(row)

    def cut(self, row: int) -> None:
        """From now on, tokens that are in flight for the row do not count."""
        self.steady[row] = False
        self.mark[row] += 1

    def rewind(self, row: int) -> None:
        """Everything that is in flight for the row is dropped, and has to run again."""
        self.known[row], self.started[row] = self.length[row], self.computed[row]
        self.cut(row)

    def ready(self) -> Indices:
        """The rows that can run their next token by rule, in order."""
        return np.flatnonzero(self.steady & (self.known < self.limit))

    def at(self, row: int) -> RunningRequest:
        """The request of a row that is not free."""
        request = self.requests[row]
        assert request is not None
        return request

    def run(self, rows: Indices) -> None:
        """Put the next token of each row into flight."""
        self.known[rows] += 1
        self.started[rows] += 1

    def run_chunk(self, row: int, end: int, known: int, *, steady: bool) -> None:
        """Put the row's tokens up to number `end` into flight, after which `known` are known. `steady`: it goes on by
        rule from there."""
        self.started[row], self.known[row], self.steady[row] = end, known, steady

    def land(self, rows: Indices, tokens: Column) -> None:
        """The oldest token in flight of each row has been run, and `tokens` have been sampled after them."""
        self.recent[rows, self.length[rows] % RECENT_TOKENS] = tokens
        self.length[rows] += 1
        self.computed[rows] += 1

    def land_chunk(self, row: int, length: int, samples: int) -> None:
        """The oldest `length` tokens in flight of the row have been run. The `samples` that they were to yield count
        as known only when they come."""
        self.computed[row] += length
        self.known[row] -= samples

    def append(self, row: int) -> None:
        """A token has been sampled, which the request itself holds."""
        self.length[row] += 1
        self.known[row] += 1


def _count_off(counts: Counter[Owner], owner: Owner) -> None:
    counts[owner] -= 1
    if not counts[owner]:
        del counts[owner]


class StopTokens:
    """The tokens that may end any of the requests, so that the others need no look at each request."""

    def __init__(self) -> None:
        self._counts = np.zeros(1, dtype=np.int32)
        """[V + 1] requests that the token may end. The last one stands for all higher tokens, which end none."""

    def add(self, token_ids: Iterable[int], change: int = 1) -> None:
        for token in token_ids:
            if 0 <= token < MOST_TOKEN_IDS:
                if token >= len(self._counts) - 1:
                    self._counts = np.concatenate([self._counts, np.zeros(token + 2, dtype=np.int32)])
                self._counts[token] += change

    def remove(self, token_ids: Iterable[int]) -> None:
        self.add(token_ids, -1)

    def among(self, tokens: Column) -> npt.NDArray[np.bool_]:
        """Which of `tokens` may end a request."""
        return self._counts[np.minimum(tokens, len(self._counts) - 1)] > 0
