"""What the scheduler knows of one request that has not ended, and a list of such requests in the order of a key."""

from __future__ import annotations

import sys
from array import array
from bisect import bisect_left, insort
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from elastic_moe.actors.caches.kv_blocks import blocks_for, next_key, root_key
from elastic_moe.cluster.messages.requests import FinishReason, GenerateRequest, RequestId
from elastic_moe.cluster.messages.steps import Chunk, NewSequence, StateUse, WindowBlocks
from elastic_moe.cluster.placement import WorkerId

if TYPE_CHECKING:
    from elastic_moe.actors.caches.rows import Column
    from elastic_moe.actors.caches.windows import WindowTable
    from elastic_moe.actors.caches.worker_cache import WorkerCache


_NONE: frozenset[int] = frozenset()
"""One for all requests: every empty set takes 216 bytes."""


class RunningRequest:
    """A request that has not ended. It waits while `cache` is None; otherwise it runs at that cache's worker.

    What changes with every token lies in a row of the scheduler's columns while the request runs (actors/scheduler/
    rows.py). `tokens`, `computed`, `introduced` and `introduced_blocks` change only when a step is committed, so a step
    that failed leaves no trace. `flight` holds the chunks in flight that were made one by one. After them, tokens may
    be in flight that the row alone knows of.
    """

    __slots__ = (
        "_keys",
        "_tokens",
        "arrival",
        "blocks",
        "borders",
        "cache",
        "cached_tokens",
        "call",
        "claim",
        "client",
        "counted",
        "ended",
        "eos_token_ids",
        "flight",
        "introduced",
        "introduced_blocks",
        "longest",
        "num_prompt_tokens",
        "num_to_score",
        "overtaken",
        "params",
        "priority",
        "published",
        "rank",
        "request_id",
        "restore",
        "resumptions",
        "row",
        "scored",
        "seed",
        "stop_token_ids",
        "tail",
        "turn",
        "window",
    )

    def __init__(
        self, request: GenerateRequest, *, arrival: int, max_model_len: int, eos: tuple[int, ...], variant: int = 0
    ) -> None:
        """`variant` distinguishes requests whose keys and values differ although their tokens are the same."""
        params = request.params
        self.request_id: RequestId = request.request_id
        self.params = params
        """Apart from the seed."""
        self.seed = params.seed
        self.arrival = arrival
        self.client = sys.intern(request.client)
        self.call = hash(request.request_id.rpartition("-")[0])
        """Stands for the API call that this request answers. One call may ask for several answers."""
        self.rank = 0
        self.turn = 0
        """`turn` and `rank` are the place in the queue (fair_queue.py). A preempted request keeps them."""
        self.priority = request.priority
        self.overtaken = 0
        """Number of later requests of a lower priority number that have been let past in the queue."""
        self.num_prompt_tokens = len(request.prompt_token_ids)
        self._tokens = array("i", [*request.prompt_token_ids, *request.output_token_ids])
        self.longest = min(self.num_prompt_tokens + params.max_tokens, max_model_len)
        """Number of tokens at which the request ends because of its length."""
        if not params.max_tokens:
            # its end is seen by the token that the last step of the prompt samples, and that nobody gets
            self.longest = self.num_prompt_tokens + 1
        self.num_to_score = 0 if params.prompt_logprobs is None else self.num_prompt_tokens - 1
        """Positions of the prompt whose next token is to be scored: all but the last."""
        self.scored = min(request.num_scored, self.num_to_score)
        """Positions whose next token has been scored, from the first one on."""
        self.eos_token_ids = eos
        self.stop_token_ids = frozenset(params.stop_token_ids) if params.stop_token_ids else _NONE
        self.cache: WorkerCache | None = None
        self.row = -1
        """Its row in the columns while it runs."""
        self.claim: WorkerId | None = None
        """While the request waits for memory: the worker that accepts no later request until this one fits."""
        self.blocks: list[int] = []
        self.window: WindowTable | None = None
        """Its blocks in layers with a sliding window while it runs, if the model has any."""
        self.cached_tokens: int | None = None
        """Prompt tokens that the first worker had in its cache; None before the request has run anywhere."""
        self.restore: int | None = None
        """The snapshot that the request's states come from, until its first chunk is committed."""
        self.borders: Sequence[int] = ()
        """Numbers of blocks after which the prompt's states are worth a snapshot."""
        self.tail: bytes | None = None
        """Key of the last block of the answer after which the request has left a snapshot of its states."""
        self.resumptions = 0
        """How often the request has begun to run again, after it had lost its worker or its place."""
        self._keys = [root_key(salt=request.cache_salt, variant=variant)]
        """The root key, then the keys of full blocks. Keys are computed when they are first needed."""
        self.introduced = False
        """Whether the worker has been sent the request's tokens."""
        self.introduced_blocks = 0
        """Number of the request's blocks that the worker has been sent."""
        self.published = 0
        """Number of the request's blocks that have become known."""
        self.counted = False
        """Whether the request's prompt has been counted in the statistics."""
        self.ended = False
        self.flight: tuple[Chunk, ...] = ()
        """The request's chunks in the steps in flight, oldest first. Chunks sent to an earlier worker are not in it."""

    @property
    def tokens(self) -> array[int]:
        """Prompt, then output."""
        if self.cache is not None:
            rows, length = self.cache.rows, self.length
            if length > len(self._tokens):
                self.fill(length, rows.recent[self.row])
        return self._tokens

    def fill(self, length: int, newest: Column) -> None:
        """Append the tokens that it lacks up to `length`. `newest` are the newest tokens of its row, each at its place
        modulo their number."""
        lacking, place = length - len(self._tokens), len(self._tokens) % len(newest)
        assert lacking <= len(newest), "a token has been overwritten"
        self._tokens.frombytes(newest[place : place + lacking].tobytes())
        if place + lacking > len(newest):
            self._tokens.frombytes(newest[: place + lacking - len(newest)].tobytes())

    @property
    def length(self) -> int:
        """Number of tokens."""
        return len(self._tokens) if self.cache is None else int(self.cache.rows.length[self.row])

    @property
    def num_output(self) -> int:
        return self.length - self.num_prompt_tokens

    @property
    def computed(self) -> int:
        """Number of tokens whose keys and values are in the worker's KV cache."""
        return 0 if self.cache is None else int(self.cache.rows.computed[self.row])

    @property
    def known(self) -> int:
        """Number of tokens that the request has after the steps in flight, unless one of these steps ends it."""
        return len(self._tokens) if self.cache is None else int(self.cache.rows.known[self.row])

    @property
    def started(self) -> int:
        """Number of tokens that have been run or are in flight."""
        return 0 if self.cache is None else int(self.cache.rows.started[self.row])

    @property
    def steady(self) -> bool:
        """Whether the request goes on by rule (actors/caches/rows.py)."""
        return self.cache is not None and bool(self.cache.rows.steady[self.row])

    @property
    def remaining(self) -> int:
        """Tokens to run before the next one can be sampled: 1 while decoding, more during prefill."""
        return self.known - self.started

    @property
    def exhausted(self) -> bool:
        """Whether the request's last token is in flight."""
        return self.known >= self.longest

    def cacheable(self, block_size: int) -> int:
        """Most blocks that may come from a cache: the last token is always run, and so is what is yet to be scored."""
        most = self.length - 1
        return (most if self.scored == self.num_to_score else min(most, self.scored)) // block_size

    def keys(self, count: int, block_size: int, first: int = 0) -> list[bytes]:
        """Keys of blocks number `first` to `count` - 1. The first `count` blocks must be full, and `block_size` is the
        same at every call."""
        tokens = self._tokens if count * block_size <= len(self._tokens) else self.tokens
        while len(self._keys) <= count:
            begin = (len(self._keys) - 1) * block_size
            self._keys.append(next_key(self._keys[-1], tokens[begin : begin + block_size]))
        return self._keys[first + 1 : count + 1]

    def finish_reason(self) -> FinishReason | None:
        """Why the last output token ends the request; None: it goes on. A stop token at the limit is a STOP."""
        params = self.params
        if self.num_output:
            last, early = self.tokens[-1], self.num_output < params.min_tokens
            # a grammar yields an end-of-sequence token only where nothing else can follow, or the answer may end
            ends = last in self.eos_token_ids and (params.grammar is not None or not (params.ignore_eos or early))
            if ends or (last in self.stop_token_ids and not early):
                return FinishReason.STOP
        return FinishReason.LENGTH if self.length >= self.longest else None

    def stop_token_id(self) -> int | None:
        """The stop token that ended the request; None if an end-of-sequence token ended it."""
        last = self.tokens[-1]
        if last not in self.stop_token_ids or (not self.params.ignore_eos and last in self.eos_token_ids):
            return None
        return last

    @property
    def stop_candidates(self) -> Iterator[int]:
        """Tokens that may end the request."""
        yield from self.eos_token_ids
        yield from self.stop_token_ids

    def sit(self, cache: WorkerCache, row: int, computed: int) -> None:
        """From now on it runs at the worker of `cache`, in this row, where `computed` of its tokens are cached."""
        self.cache, self.row, self.claim = cache, row, None
        if self.cached_tokens is None:
            self.cached_tokens = min(computed, self.num_prompt_tokens)
        else:
            self.resumptions += 1

    def rise(self) -> None:
        """It runs nowhere any more, and loses what it has computed. It keeps its tokens, which must be here."""
        self.cache, self.row = None, -1
        self.borders, self.tail = (), None
        self.flight = ()
        self.blocks = []
        self.introduced_blocks = self.published = 0
        self.introduced = False

    def introduction(self) -> NewSequence:
        """What the worker is told of the request before its first step there."""
        assert self.cache is not None
        return NewSequence(
            request_id=self.request_id,
            token_ids=tuple(self.tokens),
            num_prompt_tokens=self.num_prompt_tokens,
            params=replace(self.params, seed=self.seed),
            eos_token_ids=self.eos_token_ids,
            seat=self.row - self.cache.base,
        )

    def run(self, length: int, state: StateUse | None = None, windows: WindowBlocks | None = None) -> Chunk:
        """Put the next `length` tokens into flight. Returns the chunk to send. `state`: what it does with states.
        `windows`: its blocks in layers with a sliding window.

        The request goes on by rule from the token on that the chunk samples, unless it has states.
        """
        assert self.cache is not None
        rows, row = self.cache.rows, self.row
        introduced = _end(self.flight[-1]) if self.flight else self.introduced_blocks
        started, known = self.started, self.known
        score_from = max(started, self.scored)
        chunk = Chunk(
            request_id=self.request_id,
            start=started,
            length=length,
            known=known,
            block_offset=introduced,
            block_ids=tuple(self.blocks[introduced:]) if introduced < len(self.blocks) else (),
            score_from=score_from if score_from < min(started + length, self.num_to_score) else None,
            state=state,
            windows=windows,
        )
        self.flight += (chunk,)
        rows.run_chunk(row, started + length, known + chunk.samples, steady=bool(chunk.samples and state is None))
        return chunk

    def in_flight(self, chunk: Chunk) -> bool:
        """False if `chunk` no longer counts: the request has ended or has lost its worker since it was sent."""
        return any(own is chunk for own in self.flight)

    def land(self) -> None:
        """Record that the oldest token or chunk in flight has been run. What it samples comes with `append`."""
        assert self.cache is not None
        rows, row = self.cache.rows, self.row
        if not self.flight:
            rows.land_chunk(row, 1, 1)
            return
        chunk, *later = self.flight
        self.flight = tuple(later)
        rows.land_chunk(row, chunk.length, chunk.samples)
        self._landed(chunk)

    def append(self, token: int) -> None:
        """Add a token that has been sampled."""
        assert self.cache is not None
        self.tokens.append(token)
        self.cache.rows.append(self.row)

    def cut(self) -> None:
        """Drop everything that is in flight."""
        assert self.cache is not None
        rows, row = self.cache.rows, self.row
        if self.introduced:
            # blocks that a committed step has written to are known to the worker
            self.introduced_blocks = max(self.introduced_blocks, blocks_for(self.computed, rows.block_size))
        self.flight = ()
        rows.rewind(row)

    def land_but_last(self) -> None:
        """Record that the oldest token or chunk in flight has been run but for its last token. Everything later in
        flight has run with a wrong token, and is dropped."""
        assert self.cache is not None
        if self.flight:
            chunk, *_ = self.flight
            self.cache.rows.land_chunk(self.row, chunk.length - 1, chunk.samples)
            self._landed(chunk)
        self.cut()

    def _landed(self, chunk: Chunk) -> None:
        self.introduced = True
        self.introduced_blocks = _end(chunk)
        if chunk.score_from is not None:
            self.scored = min(chunk.start + chunk.length, self.num_to_score)


def _end(chunk: Chunk) -> int:
    """Number of the request's blocks that its worker knows after this chunk."""
    return chunk.block_offset + len(chunk.block_ids)


class OrderedRequests:
    """Requests in the order of a key, which must not change while a request is here."""

    __slots__ = ("_key", "items")

    def __init__(self, key: Callable[[RunningRequest], Any]) -> None:
        """key: two requests never have the same one."""
        self._key = key
        self.items: list[RunningRequest] = []

    def __len__(self) -> int:
        return len(self.items)

    def add(self, request: RunningRequest) -> None:
        insort(self.items, request, key=self._key)

    def remove(self, request: RunningRequest) -> None:
        at = bisect_left(self.items, self._key(request), key=self._key)
        assert self.items[at] is request
        del self.items[at]
