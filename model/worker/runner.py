"""Runs one worker's part of a step: packed tokens go through transformers' trunk, and experts through the dispatcher.

Legend: T tokens of the step, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from elastic_moe.model.exchange.counter import RoutingCounter
from elastic_moe.model.exchange.dispatch import Dispatcher
from elastic_moe.model.experts.store import attach
from elastic_moe.model.fitting.fit import Fit
from elastic_moe.model.staging import to_device
from elastic_moe.model.states.packed import StateBatch, states_of
from elastic_moe.model.trunk.kv_cache import KVCache
from elastic_moe.model.trunk.output_head import OutputHead
from elastic_moe.model.trunk.rotation import rotate_by_length
from elastic_moe.model.trunk.step_batch import SequenceSlice, StepBatch, step_context
from elastic_moe.model.trunk.windows import WindowGroup


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

    @torch.inference_mode()
    def run(
        self,
        slices: Sequence[SequenceSlice],
        tokens_per_rank: Sequence[int],
        counter: RoutingCounter | None = None,
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
        out = self.dispatcher.forward(layer, flat, index.reshape(len(flat), -1), weight.reshape(len(flat), -1))
        return out.view(hidden.shape)
