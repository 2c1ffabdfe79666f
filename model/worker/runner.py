"""Runs one worker's part of a step: packed tokens go through transformers' trunk, and experts through the dispatcher.

Legend: T tokens of the step, V vocabulary.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from elastic_moe.model.exchange.counter import Notes, RecordedChoices
from elastic_moe.model.exchange.dispatcher import Dispatcher
from elastic_moe.model.experts.interface import ABSENT
from elastic_moe.model.experts.store import attach
from elastic_moe.model.fitting.fit import Fit
from elastic_moe.model.fitting.straight import find_straight
from elastic_moe.model.fitting.whole_stack import joint_layers
from elastic_moe.model.graph_pieces import CudaRecorder, Recorder
from elastic_moe.model.graphs.decode_graphs import DecodeGraphs, GraphStep
from elastic_moe.model.graphs.recordings import Launch, RecordingFailed
from elastic_moe.model.graphs.token_graphs import Body, TokenGraphs, TokenStep
from elastic_moe.model.staging import to_device
from elastic_moe.model.states.batch import StateBatch, states_of
from elastic_moe.model.transformers_private import is_indexer
from elastic_moe.model.trunk.kv_cache import KVCache
from elastic_moe.model.trunk.output_head import OutputHead, share_head
from elastic_moe.model.trunk.rotation import depends_on_length, keep_frequencies, rotate_by_length
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
        keep_frequencies(trunk, device)
        attach(experts, self._experts)
        self._joint = joint_layers(trunk)
        self._shared_head = share_head(trunk)
        self._head = OutputHead(trunk)
        self._straight = None if fitted.attention.lib is None else find_straight(trunk, self._lengths_T)
        self._input_ids = torch.empty(0)
        """[1, T] of the last step."""
        self._graphs: list[DecodeGraphs | TokenGraphs] = []
        """The first that serves a step runs it. If none does, its kernels are launched one by one."""
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
        self._graphs = []
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

    def use_graphs(
        self, *, max_num_seqs: int, max_model_len: int, max_tokens: int, recorder: Recorder | None = None
    ) -> str | None:
        """Launch steps as CUDA graphs from now on, if that is possible. Otherwise returns the reason why not.

        Call it after `allocate`. `max_tokens`: the most that a step has. `recorder`: None records on the device.
        """
        cache, recorder = self._cache, recorder or CudaRecorder()
        assert cache is not None
        if self._keeps_states:
            return "layers with a state per sequence move it by the CPU"
        if depends_on_length(self._trunk):
            return "rotary embeddings depend on the lengths of sequences"
        if any(is_indexer(module) for module in self._trunk.modules()):
            return "an indexer chooses the keys of each step"
        singles = self._attention.kernels
        if singles:
            self._graphs.append(
                DecodeGraphs(
                    self._record,
                    cache,
                    recorder=recorder,
                    max_num_seqs=max_num_seqs,
                    max_model_len=max_model_len,
                    device=self._device,
                )
            )
        self._graphs.append(
            TokenGraphs(
                self._record_body,
                self._head_of,
                cache,
                recorder=recorder,
                decodes_too=not singles,
                max_tokens=max_tokens,
                device=self._device,
            )
        )
        return None

    @torch.inference_mode()
    def record_graphs(self, num_workers: int) -> None:
        """Record the graphs of all sizes with the present dispatcher and experts. Without this, the first step of each
        size is longer."""
        assert self.dispatcher is not None
        terms = self.dispatcher.graph_terms([1] * num_workers)
        if terms is None:
            return
        try:
            for graphs in self._graphs:
                graphs.record_all(terms.memory)
        except RecordingFailed as error:
            self._drop_graphs(error)

    def _drop_graphs(self, error: RecordingFailed) -> None:
        log.warning("steps are not launched as CUDA graphs: %s", error)
        self._graphs = []

    def _record(self, step: GraphStep) -> tuple[Tensor, Tensor]:
        rows = step.input_ids.shape[1]
        with step_context(step.batch), self._recording(step.keys_B[:, None] == 0, keep=False) as choices:
            logits = self._logits(step.input_ids, step.position_ids, torch.arange(rows, device=self._device))
        return logits, torch.cat(choices.noted)

    def _record_body(self, step: TokenStep) -> Body:
        # logits are computed after the graphs, of the tokens that want them
        nothing = torch.empty(0, dtype=torch.int64, device=self._device)
        with self._recording(step.empty_T1, keep=True) as choices:
            self._logits(step.input_ids, step.position_ids, nothing)
        return Body(output=self._head.output, choices_LTK=torch.cat(choices.noted))

    @contextmanager
    def _recording(self, empty_T1: Tensor, *, keep: bool) -> Iterator[RecordedChoices]:
        assert self.dispatcher is not None
        choices = RecordedChoices()
        self._head.keep(keep)
        self.dispatcher.begin_recording(len(empty_T1), choices)
        self._empty_T1 = empty_T1
        try:
            with states_of(None):
                yield choices
        finally:
            self._empty_T1 = None

    def _head_of(self, output: Any, slices: Sequence[SequenceSlice], input_ids: Tensor) -> Tensor:
        self._head.output, self._input_ids = output, input_ids
        kept = np.array(_last_rows(slices), dtype=np.int64)
        if not len(kept):
            return torch.empty(0, self.vocabulary, device=self._device)
        return self._head.logits(to_device([kept], self._device)[0], input_ids)

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
        # a recording begins a step of its own
        launch = self._find_graph(slices, tokens_per_rank, keep=keep)
        self._head.keep(keep)
        self.dispatcher.begin(tokens_per_rank, counter)
        if launch is not None:
            logits, choices = launch()
            # a recording writes them to the same memory in each step, and on the CPU they are counted later
            self.dispatcher.note(choices.clone() if choices.device.type == "cpu" else choices)
            return logits
        if not slices:
            self.dispatcher.idle(self.layer_shapes, self._device, self._joint, self._shared_head)
            return torch.empty(0, 0, device=self._device)
        batch = StepBatch.build(slices, self._cache, self._device)
        batch.dispatcher = self.dispatcher
        try:
            with step_context(batch), states_of(states):
                return self._forward(slices, keep=keep)
        finally:
            self.dispatcher.leave_trunk()

    def _find_graph(
        self, slices: Sequence[SequenceSlice], tokens_per_rank: Sequence[int], *, keep: bool
    ) -> Launch | None:
        assert self.dispatcher is not None
        terms = self.dispatcher.graph_terms(tokens_per_rank) if self._graphs else None
        if terms is None or not any(tokens_per_rank):
            return None
        try:
            # logits of any token may be asked for after a step that is kept
            found = (graphs.find(slices, terms) for graphs in self._graphs if not keep or graphs.keeps)
            return next((launch for launch in found if launch is not None), None)
        except RecordingFailed as error:
            self._drop_graphs(error)
            return None

    @torch.inference_mode()
    def logits(self, begin: int, end: int) -> Tensor:
        """Logits [end - begin, V] of tokens of the last step, which was run with `keep`."""
        rows = torch.arange(begin, end, device=self._device)
        return self._head.logits(rows, self._input_ids)

    def _forward(self, slices: Sequence[SequenceSlice], *, keep: bool) -> Tensor:
        tokens = [token for piece in slices for token in piece.token_ids]
        positions = [p for piece in slices for p in range(piece.start, piece.end)]
        lengths = [max(piece.prompt_length, p + 1) for piece in slices for p in range(piece.start, piece.end)]
        last = _last_rows(slices)
        arrays = [np.array(numbers, dtype=np.int64) for numbers in ([tokens], [positions], lengths, last)]
        input_ids, position_ids, self._lengths_T[0], kept = to_device(arrays, self._device)
        self._input_ids = input_ids
        if self._straight is not None and not keep:
            return self._straight(input_ids, position_ids, None if len(last) == len(tokens) else kept)
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


def _last_rows(slices: Sequence[SequenceSlice]) -> list[int]:
    """The numbers of the last tokens of the sequences that want logits, in the step."""
    ends = accumulate(len(piece.token_ids) for piece in slices)
    return [end - 1 for end, piece in zip(ends, slices, strict=True) if piece.wants_logits]
