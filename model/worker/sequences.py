"""The sequences of one worker, and what a step needs of each: its tokens and blocks, how to sample, what to score."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from elastic_moe.cluster.messages.requests import RequestId
from elastic_moe.cluster.messages.seats import LiveBlocks, Seats
from elastic_moe.cluster.messages.steps import Chunk, NewSequence, StepPlan
from elastic_moe.model.grammars.compiling import Compiler
from elastic_moe.model.sampling.scoring import Scoring
from elastic_moe.model.sampling.state import SamplingState
from elastic_moe.model.states.batch import StateBatch
from elastic_moe.model.states.store import StateStore
from elastic_moe.model.trunk.step_batch import SequenceSlice
from elastic_moe.model.trunk.windows import WindowGroup


@dataclass(slots=True, kw_only=True)
class _Sequence:
    state: SamplingState
    blocks: list[int] = field(default_factory=list)
    windows: LiveBlocks = field(default_factory=LiveBlocks)


class Sequences:
    """Owns the sequences. One thread calls it."""

    def __init__(
        self,
        grammars: Compiler,
        states: StateStore | None,
        device: torch.device,
        *,
        windows: WindowGroup | None,
        block_size: int,
    ) -> None:
        """`states` is None if the model keeps nothing but keys and values, `windows` if all of these are kept."""
        self._windows = windows
        self._block_size = block_size
        self._grammars = grammars
        self._states = states
        self._device = device
        self._sequences: dict[RequestId, _Sequence] = {}
        self.seats = Seats()

    def begin(self, plan: StepPlan) -> tuple[Chunk, ...]:
        """Take what a plan says of sequences that end and begin. Returns the step's chunks, in its order."""
        for request_id in plan.finished:
            self._sequences.pop(request_id, None)
            self._forget_states(request_id)
        for new in plan.new:
            self._forget_states(new.request_id)
            self._sequences[new.request_id] = _Sequence(state=self._sampling_state(new))
        return self.seats.chunks(plan)

    def _forget_states(self, request_id: RequestId) -> None:
        if self._states is not None:
            self._states.forget(request_id)

    def _sampling_state(self, new: NewSequence) -> SamplingState:
        grammar = new.params.grammar
        return SamplingState(new, None if grammar is None else self._grammars.get(grammar))

    def slices(self, chunks: Sequence[Chunk]) -> list[SequenceSlice]:
        """The tokens and blocks of each chunk."""
        return [self._slice(chunk) for chunk in chunks]

    def _slice(self, chunk: Chunk) -> SequenceSlice:
        sequence = self._sequences[chunk.request_id]
        sequence.state.truncate(chunk.known)
        sequence.blocks[chunk.block_offset :] = chunk.block_ids
        if self._windows is not None:
            if chunk.windows is not None:
                sequence.windows.put(chunk.windows)
            sequence.windows.drop_before(self._windows.first_block(chunk.start, self._block_size))
        end = chunk.start + chunk.length
        return SequenceSlice(
            token_ids=sequence.state.token_ids[chunk.start : end],
            start=chunk.start,
            block_ids=sequence.blocks,
            windows=None if self._windows is None else sequence.windows,
            prompt_length=sequence.state.num_prompt_tokens,
            wants_logits=chunk.samples,
        )

    def sampling(self, chunks: Sequence[Chunk]) -> dict[RequestId, SamplingState]:
        """The states of the sequences that get a token in this step, in its order."""
        return {chunk.request_id: self._sequences[chunk.request_id].state for chunk in chunks if chunk.samples}

    def scoring(self, chunks: Sequence[Chunk]) -> list[Scoring]:
        """What is to be scored of each chunk that has something to score."""
        wanted: list[Scoring] = []
        row = 0
        for chunk in chunks:
            one = Scoring.of(chunk, row, self._sequences[chunk.request_id].state)
            if one is not None:
                wanted.append(one)
            row += chunk.length
        return wanted

    def move_states(self, chunks: Sequence[Chunk]) -> StateBatch | None:
        """Where the states of each chunk come from and go to; None if the model keeps none."""
        if self._states is None:
            return None
        moves = [(chunk.length, self._states.begin(chunk)) for chunk in chunks]
        return StateBatch.build(moves, self._states, self._device)

    def forget_all(self) -> None:
        self._sequences.clear()
        self.seats = Seats()
        if self._states is not None:
            self._states.forget_all()
