"""Launches steps with prompts as CUDA graphs, and attention between them.

The kernels of attention take the lengths of sequences as numbers, so they are launched anew in every step. Everything
else of a layer depends on the number of tokens alone. It is recorded for some numbers of tokens, and a step is padded
to the next of them. Tokens that pad a step have no expert, and attention leaves their rows as they are.

Legend: T tokens of a recording, V vocabulary, L MoE layers, K experts per token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from elastic_moe.model.graph_pieces import SIZES, GraphTerms, Recorder, Work, padded
from elastic_moe.model.graphs.recordings import FixedInputs, Launch, Recordings
from elastic_moe.model.trunk.kv_cache import KVCache
from elastic_moe.model.trunk.step_batch import Deferred, SequenceSlice, StepBatch, step_context

_SPARSE_SIZES = [32, 64, 128, 192, *(size for size in SIZES if size >= 256)]
"""Numbers of tokens of steps with prompts. A step of 20 tokens takes as long as one of 32."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenStep:
    """What a step of T tokens reads."""

    input_ids: Tensor
    """[1, T]"""
    position_ids: Tensor
    """[1, T]"""
    empty_T1: Tensor
    """[T, 1] whether a token pads the step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Body:
    """What the trunk leaves after a step, before the head."""

    output: Any
    """The output of the model's body, as OutputHead keeps it."""
    choices_LTK: Tensor


Forward = Callable[[TokenStep], Body]
"""Runs the trunk's body over a step."""
Head = Callable[[Any, Sequence[SequenceSlice], Tensor], Tensor]
"""(output of the body, sequences, input_ids [1, T]) -> logits [n, V] of the last tokens of those that want them."""


class TokenGraphs:
    """The graphs of one worker. One thread uses it, and waits for each step's results before the next step."""

    keeps = True
    """Logits of a step's other tokens can be asked for until the next step."""

    def __init__(
        self,
        forward: Forward,
        head: Head,
        cache: KVCache,
        *,
        recorder: Recorder,
        decodes_too: bool,
        max_tokens: int,
        device: torch.device,
    ) -> None:
        """decodes_too: it records the sizes of decode steps too, which have no graphs of their own. max_tokens: the
        most that a step has."""
        self._forward = forward
        self._head = head
        self._cache = cache
        most = padded(max_tokens)
        self._sizes = [size for size in (SIZES if decodes_too else _SPARSE_SIZES) if size <= most]
        self._deferred = Deferred()
        self._device = device
        self._inputs = FixedInputs(1 + 2 * SIZES[-1], device)
        """The number of tokens, their ids and their positions."""
        self._number_T = torch.arange(SIZES[-1], device=device)
        self._recordings = Recordings(recorder, prepare=lambda rows: self._put([], 0, rows), run=self._run)

    def record_all(self, memory: list[object]) -> None:
        """Record the graphs of all sizes. Raises RecordingFailed."""
        self._recordings.record_all(self._sizes, memory)

    def find(self, slices: Sequence[SequenceSlice], terms: GraphTerms) -> Launch | None:
        """What runs a step of these sequences; None if there is no graph for it.

        Raises RecordingFailed; then the step may be run without a graph.
        """
        tokens = sum(len(piece.token_ids) for piece in slices)
        rows = terms.rows or next((size for size in self._sizes if size >= tokens), None)
        if rows is None or rows > SIZES[-1]:
            return None
        replay, body = self._recordings.get(rows, terms.memory)
        return lambda: self._launch(slices, tokens, rows, replay, body)

    def _launch(
        self, slices: Sequence[SequenceSlice], tokens: int, rows: int, replay: Work, body: Body
    ) -> tuple[Tensor, Tensor]:
        self._put(slices, tokens, rows)
        self._deferred.tokens = tokens
        self._deferred.batch = StepBatch.build(slices, self._cache, self._device) if slices else None
        try:
            replay()
        finally:
            self._deferred.batch = None
        logits = self._head(body.output, slices, self._ids(rows))
        return logits, body.choices_LTK[:, :tokens]

    def _put(self, slices: Sequence[SequenceSlice], tokens: int, rows: int) -> None:
        host = self._inputs.begin().numpy()
        host[0] = tokens
        # tokens that pad the step
        host[1 : 1 + 2 * rows] = 0
        host[1 : 1 + tokens] = [token for piece in slices for token in piece.token_ids]
        host[1 + rows : 1 + rows + tokens] = [p for piece in slices for p in range(piece.start, piece.end)]
        self._inputs.send(1 + 2 * rows)

    def _ids(self, rows: int) -> Tensor:
        return self._inputs.device[None, 1 : 1 + rows]

    def _run(self, rows: int) -> Body:
        flat = self._inputs.device
        step = TokenStep(
            input_ids=self._ids(rows),
            position_ids=flat[None, 1 + rows : 1 + 2 * rows],
            empty_T1=(self._number_T[:rows] >= flat[0])[:, None],
        )
        with step_context(self._deferred):
            return self._forward(step)
