"""A worker without a model: obeys StepPlans as the protocol says, and checks each of them.

Its KV cache holds the tokens themselves, and whether their prompt is a long one (which changes longrope's keys). The
history that it samples from is read back through the block table: a block given to two sequences, or lost, shows.
Its states are the tokens that they have seen, in the slots that a production worker would use.
"""

from __future__ import annotations

import hashlib
from array import array
from dataclasses import dataclass, field

import torch

from elastic_moe.cluster.messages.epochs import StateRoom, WindowRoom
from elastic_moe.cluster.messages.requests import GenerateRequest, RequestId, TokenLogprobs
from elastic_moe.cluster.messages.scores import PromptScores
from elastic_moe.cluster.messages.seats import LiveBlocks, Seats
from elastic_moe.cluster.messages.steps import Chunk, Sample, ScoredPrompt, StepPlan, StepResult
from elastic_moe.model.states.store import StateStore

VOCABULARY = 13
EOS = 0


def next_token(history: tuple[int, ...], seed: int) -> int:
    """The simulated model: any difference in the history changes it."""
    digest = hashlib.blake2b(repr((history, seed)).encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") % VOCABULARY


def alone(request: GenerateRequest, max_model_len: int) -> tuple[int, ...]:
    """The output of a request that is run by itself, resumed tokens included."""
    params, output = request.params, list(request.output_token_ids)
    while len(output) < params.max_tokens and len(request.prompt_token_ids) + len(output) < max_model_len:
        history = (*request.prompt_token_ids, *output)
        token = masked_token(history, len(output), request)
        output.append(token)
        if params.grammar is not None and token == EOS:
            break
        if len(output) >= params.min_tokens and (
            (token == EOS and not params.ignore_eos) or token in params.stop_token_ids
        ):
            break
    return tuple(output)


def masked_token(history: tuple[int, ...], num_output: int, request: GenerateRequest) -> int:
    token = next_token(history, request.params.seed)
    if num_output < request.params.min_tokens:
        while token == EOS or token in request.params.stop_token_ids:
            token = (token + 1) % VOCABULARY
    return token


def scores_of(prompt: tuple[int, ...], start: int, end: int) -> PromptScores:
    """The scores of the tokens at places start .. end - 1, which depend on all tokens before them."""
    ids, ranks = array("i", prompt[start:end]), array("i", [next_token(prompt[:at], 1) for at in range(start, end)])
    logprobs = array("f", [-float(next_token(prompt[: at + 1], 2)) for at in range(start, end)])
    return PromptScores(start=start, width=1, ids=ids.tobytes(), logprobs=logprobs.tobytes(), ranks=ranks.tobytes())


@dataclass
class _Known:
    tokens: list[int]
    request: GenerateRequest
    blocks: list[int] = field(default_factory=list)
    windows: LiveBlocks = field(default_factory=LiveBlocks)
    spoilt: int | None = None
    """Place of the first token that stands for one that was not sampled."""


class SimulatedWorker:
    """The mask of a request with a grammar is late in some steps."""

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        rope_limit: int,
        room: StateRoom | None = None,
        windows: WindowRoom | None = None,
        *,
        depth: int = 2,
    ) -> None:
        """`room`: for states, if the model keeps any. `windows`: for layers with a window, if there are any. `depth`:
        most steps in flight."""
        self.room = room
        self.windows = windows
        self.window_cache: list[list[tuple[int, int] | None]] = [
            [None] * block_size for _ in range(0 if windows is None else windows.blocks)
        ]
        self.store = None
        if room is not None:
            self.store = StateStore((), room, steps_in_flight=depth, device=torch.device("cpu"))
        self.slots: dict[int, tuple[int, tuple[int, ...]]] = {}
        """The variant of a sequence, and the tokens that the state in a slot has seen."""
        self.block_size = block_size
        self.rope_limit = rope_limit
        self.cache: list[list[tuple[int, int] | None]] = [[None] * block_size for _ in range(num_blocks)]
        self.known: dict[RequestId, _Known] = {}
        self.seats = Seats()

    def run(self, plan: StepPlan, rank: int) -> StepResult:
        chunks = self.seats.chunks(plan)
        for request_id in plan.finished:
            self.known.pop(request_id, None)
            if self.store is not None:
                self.store.forget(request_id)
        for new in plan.new:
            if self.store is not None:
                self.store.forget(new.request_id)
            assert new.eos_token_ids == (EOS,)
            self.known[new.request_id] = _Known(
                list(new.token_ids),
                GenerateRequest(
                    request_id=new.request_id,
                    prompt_token_ids=new.token_ids[: new.num_prompt_tokens],
                    params=new.params,
                ),
            )
        assert plan.tokens_per_rank[rank] == sum(chunk.length for chunk in chunks)
        ids = [chunk.request_id for chunk in chunks]
        assert len(ids) == len(set(ids))
        samples, scored = [], []
        unready = []
        for chunk in chunks:
            sequence = self.known[chunk.request_id]
            del sequence.tokens[chunk.known :]
            if sequence.spoilt is not None and sequence.spoilt >= chunk.known:
                sequence.spoilt = None
            assert len(sequence.tokens) == chunk.known
            assert chunk.block_offset <= len(sequence.blocks)
            sequence.blocks[chunk.block_offset : chunk.block_offset + len(chunk.block_ids)] = chunk.block_ids
            for position in range(chunk.start, chunk.start + chunk.length):
                block, offset = divmod(position, self.block_size)
                self.cache[sequence.blocks[block]][offset] = (self._variant(sequence), sequence.tokens[position])
            self._write_window(sequence, chunk)
            self._move_state(sequence, chunk)
            if chunk.score_from is not None:
                scored.append(self._score(sequence, chunk))
            if not chunk.samples:
                continue
            late = sequence.request.params.grammar is not None and next_token((plan.step,), 0) < VOCABULARY // 3
            if late or sequence.spoilt is not None:
                unready.append(chunk.request_id)
                if sequence.spoilt is None:
                    sequence.spoilt = len(sequence.tokens)
                sequence.tokens.append(VOCABULARY)
            else:
                samples.append(self._sample(sequence))
        for chunk in chunks:
            self._check_window(self.known[chunk.request_id], chunk)
        tokens, rest = self.seats.packed(samples)
        return StepResult(
            step=plan.step,
            samples=rest,
            tokens=tokens,
            compute_s=0.0,
            unready=tuple(unready),
            scored=tuple(scored),
        )

    def _write_window(self, sequence: _Known, chunk: Chunk) -> None:
        assert chunk.windows is None or self.windows is not None
        if self.windows is None:
            return
        if chunk.windows is not None:
            sequence.windows.put(chunk.windows)
        sequence.windows.drop_before(max(0, chunk.start - self.windows.tokens + 1) // self.block_size)
        for position in range(chunk.start, chunk.start + chunk.length):
            self._in_window(sequence, position)[position % self.block_size] = self._text(sequence, position)

    def _check_window(self, sequence: _Known, chunk: Chunk) -> None:
        """No other sequence of the step, and none before, has written to what the chunk reads."""
        if self.windows is not None:
            for position in range(max(0, chunk.start - self.windows.tokens + 1), chunk.start + chunk.length):
                found = self._in_window(sequence, position)[position % self.block_size]
                assert found == self._text(sequence, position), "a window holds other tokens than the sequence"

    def _in_window(self, sequence: _Known, position: int) -> list[tuple[int, int] | None]:
        number = position // self.block_size - sequence.windows.first
        assert number >= 0
        return self.window_cache[sequence.windows.ids[number]]

    def _text(self, sequence: _Known, position: int) -> tuple[int, int]:
        return self._variant(sequence), sequence.tokens[position]

    def _move_state(self, sequence: _Known, chunk: Chunk) -> None:
        assert (chunk.state is None) == (self.store is None)
        if self.store is None:
            return
        move, variant = self.store.begin(chunk), self._variant(sequence)
        seen = (variant, ()) if move.source is None else self.slots[move.source]
        assert seen == (variant, tuple(sequence.tokens[: chunk.start])), "the state has seen other tokens"
        for length, slot in (*move.snapshots, (chunk.length, move.target)):
            self.slots[slot] = (variant, tuple(sequence.tokens[: chunk.start + length]))

    def snapshot(self, place: int) -> tuple[int, tuple[int, ...]]:
        assert self.store is not None
        return self.slots[self.store.first_snapshot + place]

    def _score(self, sequence: _Known, chunk: Chunk) -> ScoredPrompt:
        prompt = sequence.request.prompt_token_ids
        assert sequence.request.params.prompt_logprobs is not None
        assert chunk.score_from is not None
        end = min(chunk.start + chunk.length, len(prompt) - 1)
        assert chunk.start <= chunk.score_from < end
        return ScoredPrompt(request_id=chunk.request_id, scores=scores_of(prompt, chunk.score_from + 1, end + 1))

    def _variant(self, sequence: _Known) -> int:
        return int(len(sequence.request.prompt_token_ids) > self.rope_limit)

    def _sample(self, sequence: _Known) -> Sample:
        cached = tuple(
            self.cache[sequence.blocks[position // self.block_size]][position % self.block_size]
            for position in range(len(sequence.tokens))
        )
        expected = tuple((self._variant(sequence), token) for token in sequence.tokens)
        assert cached == expected, "the KV cache holds other tokens than the sequence"
        request = sequence.request
        num_output = len(sequence.tokens) - len(request.prompt_token_ids)
        token = masked_token(tuple(sequence.tokens), num_output, request)
        sequence.tokens.append(token)
        logprobs = None
        if request.params.logprobs is not None:
            logprobs = TokenLogprobs(token_id=token, logprob=-1.0, top=())
        return Sample(request_id=request.request_id, token_id=token, logprobs=logprobs)
