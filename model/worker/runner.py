"""Runs one worker's part of a step: packed tokens go through transformers' trunk, and experts through the dispatcher.

Legend: T tokens of the step, V vocabulary.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from elastic_moe.model.exchange.counter import Notes, RecordedChoices
from elastic_moe.model.exchange.dispatch import Dispatcher
from elastic_moe.model.experts.interface import ABSENT
from elastic_moe.model.experts.store import attach
from elastic_moe.model.fitting.fit import Fit
from elastic_moe.model.staging import to_device
from elastic_moe.model.states.packed import StateBatch, states_of
from elastic_moe.model.trunk.graphs import DecodeGraphs, GraphStep, RecordingFailed
from elastic_moe.model.trunk.kv_cache import KVCache
from elastic_moe.model.trunk.output_head import OutputHead
from elastic_moe.model.trunk.rotation import depends_on_length, rotate_by_length
from elastic_moe.model.trunk.step_batch import SequenceSlice, StepBatch, step_context
from elastic_moe.model.trunk.windows import WindowGroup

log = logging.getLogger(__name__)


class ModelRunner:
    """The trunk of one worker, its KV cache, and the epoch's dispatcher."""

    def __init__(self, trunk: nn.Module, experts: Sequence[nn.Module], fitted: Fit, *, device: torch.device) -> None:
        """`fitted` is what `fit` chose for the trunk. Call `allocate` and set a dispatcher before `run`."""
        self._trunk = trunk
        self._device = device
        self._attention = fitted.attention
        self.kv_shapes, self.layer_shapes = fitted.shapes.kv, fitted.shapes.layers
        self._keeps_states = bool(fitted.states)
        self._cache: KVCache | None = None
        self.dispatcher: Dispatcher | None = None
        self._lengths_T = [torch.empty(0)]
        """[T] the length that each token's rotary embedding uses. The list is shared with the rotary modules."""
        rotate_by_length(trunk, self._lengths_T)
        attach(experts, self._experts)
        self._head = OutputHead(trunk)
        self._input_ids = torch.empty(0)
        """[1, T] of the last step."""
        self._graphs: DecodeGraphs | None = None
        self._empty_T1: Tensor | None = None
        """[T, 1] whether a token stands for no sequence, in a step that is being recorded."""

    @property
    def vocabulary(self) -> int:
        return self._head.vocabulary

    def allocate(
        self,
        *,
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        windows: WindowGroup | None = None,
        num_window_blocks: int = 0,
    ) -> KVCache:
        """Make the KV cache. `block_size` must be the one that the trunk was fitted for. `windows` as in KVCache."""
        self._graphs = None
        self._cache = KVCache(
            self.kv_shapes,
            num_blocks=num_blocks,
            block_size=block_size,
            dtype=dtype,
            device=self._device,
            path=self._attention,
            windows=windows,
            num_window_blocks=num_window_blocks,
        )
        return self._cache

    def use_graphs(self, *, max_num_seqs: int, max_model_len: int) -> str | None:
        """Launch decode steps as CUDA graphs from now on, if that is possible. Otherwise returns the reason why not.

        Call it after `allocate`.
        """
        cache = self._cache
        assert cache is not None
        if not self._attention.kernels:
            return "single tokens have no kernel for attention"
        if self._keeps_states:
            return "layers with a state per sequence move it by the CPU"
        if depends_on_length(self._trunk):
            return "rotary embeddings depend on the lengths of sequences"
        self._graphs = DecodeGraphs(
            self._record, cache, max_num_seqs=max_num_seqs, max_model_len=max_model_len, device=self._device
        )
        return None

    @torch.inference_mode()
    def record_graphs(self) -> None:
        """Record the graphs of all sizes with the present dispatcher and experts. Without this, the first step of each
        size is longer."""
        memory = None if self.dispatcher is None else self.dispatcher.graph_memory
        if self._graphs is not None and memory is not None:
            try:
                self._graphs.record_all(memory)
            except RecordingFailed as error:
                self._drop_graphs(error)

    def _drop_graphs(self, error: RecordingFailed) -> None:
        log.warning("decode steps are not launched as CUDA graphs: %s", error)
        self._graphs = None

    def _record(self, step: GraphStep) -> tuple[Tensor, Tensor]:
        assert self.dispatcher is not None
        choices = RecordedChoices()
        self._head.keep(False)
        self.dispatcher.begin([step.input_ids.shape[1]], choices)
        self._empty_T1 = step.keys_B[:, None] == 0
        try:
            with step_context(step.batch), states_of(None):
                kept = torch.arange(step.input_ids.shape[1], device=self._device)
                return self._logits(step.input_ids, step.position_ids, kept), torch.cat(choices.noted)
        finally:
            self._empty_T1 = None

    @torch.inference_mode()
    def run(
        self,
        slices: Sequence[SequenceSlice],
        tokens_per_rank: Sequence[int],
        counter: Notes | None = None,
        *,
        keep: bool = False,
        states: StateBatch | None = None,
    ) -> Tensor:
        """Run a step. Returns logits [n, V] of the last token of the n slices that want them, in order.

        `states` is needed for a model that has layers with a state per sequence; it is made of the same slices.

        With `keep`, `logits` can be asked for the step's other tokens until the next step.
        Blocks on the other workers. Raises StepAborted if a peer is gone; then the step may be run again.
        """
        assert self.dispatcher is not None
        assert self._cache is not None
        assert states is not None or not (self._keeps_states and slices)
        self._head.keep(keep)
        self.dispatcher.begin(tokens_per_rank, counter)
        if not slices:
            self.dispatcher.idle(self.layer_shapes, self._device)
            return torch.empty(0, 0, device=self._device)
        if self._graphs is not None and not keep and (memory := self.dispatcher.graph_memory) is not None:
            found = None
            try:
                found = self._graphs.run(slices, memory)
            except RecordingFailed as error:
                self._drop_graphs(error)
            # a graph may just have been recorded, which is a step too
            self.dispatcher.begin(tokens_per_rank, counter)
            if found is not None:
                logits, choices = found
                self.dispatcher.note(choices)
                return logits
        batch = StepBatch.build(slices, self._cache, self._device)
        batch.dispatcher = self.dispatcher
        with step_context(batch), states_of(states):
            return self._forward(slices)

    @torch.inference_mode()
    def logits(self, begin: int, end: int) -> Tensor:
        """Logits [end - begin, V] of tokens of the last step, which was run with `keep`."""
        rows = torch.arange(begin, end, device=self._device)
        return self._head.logits(rows, self._input_ids)

    def _forward(self, slices: Sequence[SequenceSlice]) -> Tensor:
        tokens = [token for piece in slices for token in piece.token_ids]
        positions = [p for piece in slices for p in range(piece.start, piece.end)]
        keep: list[int] = []
        at = 0
        for piece in slices:
            at += len(piece.token_ids)
            if piece.wants_logits:
                keep.append(at - 1)
        lengths = [max(piece.prompt_length, p + 1) for piece in slices for p in range(piece.start, piece.end)]
        arrays = [np.array(numbers, dtype=np.int64) for numbers in ([tokens], [positions], lengths, keep)]
        input_ids, position_ids, self._lengths_T[0], kept = to_device(arrays, self._device)
        self._input_ids = input_ids
        return self._logits(input_ids, position_ids, kept)

    def _logits(self, input_ids: Tensor, position_ids: Tensor, kept: Tensor) -> Tensor:
        out: Any = self._trunk(
            input_ids=input_ids,
            position_ids=position_ids,
            # without a mask, transformers searches the positions for packed sequences, and the CPU waits for the device
            attention_mask=torch.ones(input_ids.shape, dtype=torch.bool, device=self._device),
            use_cache=False,
            logits_to_keep=kept,
        )
        logits: Tensor = out.logits[0]
        return logits

    def _experts(self, layer: int, hidden: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        assert self.dispatcher is not None
        flat = hidden.reshape(-1, hidden.shape[-1])
        index = index.reshape(len(flat), -1)
        if self._empty_T1 is not None:
            index = index.masked_fill(self._empty_T1, ABSENT)
        out = self.dispatcher.forward(layer, flat, index, weight.reshape(len(flat), -1))
        return out.view(hidden.shape)
