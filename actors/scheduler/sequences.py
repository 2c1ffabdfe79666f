"""What batching knows of one request, and queues of them. `actors.scheduler.scheduler` moves it forward."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence as ReadOnly
from typing import TYPE_CHECKING

from elastic_moe.actors.scheduler.kv_blocks import next_key, root_key
from elastic_moe.cluster.messages.requests import FinishReason, GenerateRequest, RequestId
from elastic_moe.cluster.messages.steps import Chunk, NewSequence
from elastic_moe.cluster.placement import WorkerId

if TYPE_CHECKING:
    from elastic_moe.actors.scheduler.homes import Home


class Sequence:
    """A request that has not ended. It waits while `home` is None, and else runs there.

    `tokens`, `computed`, `told` and `told_blocks` change only when a step is committed, so a step that failed leaves no
    trace. What the steps in flight will have done is in `flight`.
    """

    __slots__ = (
        "_keys",
        "arrival",
        "blocks",
        "cached_tokens",
        "call",
        "claim",
        "client",
        "computed",
        "counted",
        "ended",
        "eos_token_ids",
        "flight",
        "home",
        "longest",
        "num_prompt_tokens",
        "params",
        "rank",
        "request_id",
        "stop_token_ids",
        "tokens",
        "told",
        "told_blocks",
        "turn",
    )

    def __init__(
        self, request: GenerateRequest, *, arrival: int, max_model_len: int, eos: ReadOnly[int], variant: int = 0
    ) -> None:
        """`variant` tells apart sequences whose keys and values differ though their tokens are the same."""
        params = request.params
        self.request_id: RequestId = request.request_id
        self.params = params
        self.arrival = arrival
        self.client = request.client
        self.call = request.request_id.rpartition("-")[0]
        """The call of the API that it is an answer to; one may ask for several."""
        self.rank = 0
        self.turn = 0
        """With `rank`, its place in the queue (fair_queue.py), which preemption for memory does not lose."""
        self.num_prompt_tokens = len(request.prompt_token_ids)
        self.tokens = [*request.prompt_token_ids, *request.output_token_ids]
        """Prompt, then output."""
        self.longest = min(self.num_prompt_tokens + params.max_tokens, max_model_len)
        """Tokens at which it ends for its length."""
        self.eos_token_ids = tuple(eos)
        self.stop_token_ids = frozenset(params.stop_token_ids)
        self.computed = 0
        """Tokens whose keys and values are in the home's KV cache."""
        self.home: Home | None = None
        self.claim: WorkerId | None = None
        """While it waits for memory: the worker that takes no later request until it fits."""
        self.blocks: list[int] = []
        self.cached_tokens: int | None = None
        """Prompt tokens that the first home had in its cache; None before it has had a home."""
        self._keys = [root_key(salt=request.cache_salt, variant=variant)]
        """The root, then the key of each full block, as far as they have been needed."""
        self.told = False
        """Whether the home knows its tokens."""
        self.told_blocks = 0
        """Blocks that the home knows of."""
        self.counted = False
        """Whether its prompt is in the statistics."""
        self.ended = False
        self.flight: list[Chunk] = []
        """Its chunks in the steps in flight, oldest first, but for those that it lost with a former home."""

    @property
    def num_output(self) -> int:
        return len(self.tokens) - self.num_prompt_tokens

    @property
    def known(self) -> int:
        """Tokens that it has once the steps in flight are over, unless one of them ends it."""
        return len(self.tokens) + sum(chunk.samples for chunk in self.flight)

    @property
    def started(self) -> int:
        """Tokens that have been run, or are in flight."""
        return self.computed + sum(chunk.length for chunk in self.flight)

    @property
    def remaining(self) -> int:
        """Tokens to run before the next one can be sampled: 1 while decoding, more during prefill."""
        return self.known - self.started

    @property
    def exhausted(self) -> bool:
        """Whether its last token is in flight."""
        return self.known >= self.longest

    def keys(self, count: int, block_size: int) -> list[bytes]:
        """Keys of the first `count` blocks, which must be full. `block_size` is the same at every call."""
        while len(self._keys) <= count:
            begin = (len(self._keys) - 1) * block_size
            self._keys.append(next_key(self._keys[-1], self.tokens[begin : begin + block_size]))
        return self._keys[1 : count + 1]

    def finish_reason(self) -> FinishReason | None:
        """Whether its last output token ends it. An end-of-sequence or stop token at the limit is a stop."""
        params = self.params
        if self.num_output and self.num_output >= params.min_tokens:
            last = self.tokens[-1]
            if (not params.ignore_eos and last in self.eos_token_ids) or last in self.stop_token_ids:
                return FinishReason.STOP
        return FinishReason.LENGTH if len(self.tokens) >= self.longest else None

    def stop_token_id(self) -> int | None:
        """The stop token that ended it; None where it was an end-of-sequence token."""
        last = self.tokens[-1]
        if last not in self.stop_token_ids or (not self.params.ignore_eos and last in self.eos_token_ids):
            return None
        return last

    def introduction(self) -> NewSequence:
        return NewSequence(
            request_id=self.request_id,
            token_ids=tuple(self.tokens),
            num_prompt_tokens=self.num_prompt_tokens,
            params=self.params,
            eos_token_ids=self.eos_token_ids,
        )

    def run(self, length: int) -> Chunk:
        """Its next `length` tokens are in flight."""
        told = _end(self.flight[-1]) if self.flight else self.told_blocks
        chunk = Chunk(
            request_id=self.request_id,
            start=self.started,
            length=length,
            known=self.known,
            block_offset=told,
            block_ids=tuple(self.blocks[told:]) if told < len(self.blocks) else (),
        )
        self.flight.append(chunk)
        return chunk

    def flies(self, chunk: Chunk) -> bool:
        """False for a chunk that counts no more, since it has ended or lost its home meanwhile."""
        return any(own is chunk for own in self.flight)

    def land(self) -> None:
        """The oldest chunk in flight is done."""
        chunk = self.flight.pop(0)
        self.computed += chunk.length
        self.told = True
        self.told_blocks = _end(chunk)


def _end(chunk: Chunk) -> int:
    """Blocks that its home knows of with this chunk."""
    return chunk.block_offset + len(chunk.block_ids)


def _arrival(sequence: Sequence) -> int:
    return sequence.arrival


class Queue:
    """Sequences in order of arrival."""

    __slots__ = ("items",)

    def __init__(self) -> None:
        self.items: list[Sequence] = []

    def __len__(self) -> int:
        return len(self.items)

    def add(self, sequence: Sequence) -> None:
        insort(self.items, sequence, key=_arrival)

    def remove(self, sequence: Sequence) -> None:
        at = bisect_left(self.items, sequence.arrival, key=_arrival)
        assert self.items[at] is sequence
        del self.items[at]
