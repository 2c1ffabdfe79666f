"""Runs one worker's part of a step: packed tokens through transformers' trunk, experts through the dispatcher.

Legend: T tokens of the step, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from model.attention import SequenceSlice, ShapeProbe, StepBatch, step_context
from model.dispatch import Dispatcher, LayerShape
from model.experts import attach
from model.flash import find_way
from model.kv_cache import KVCache, KVShape
from model.rotation import rotate_by_length
from model.routing_counter import RoutingCounter
from model.staging import to_device


class ModelRunner:
    """The trunk of one worker, its KV cache, and the epoch's dispatcher."""

    def __init__(self, trunk: nn.Module, experts: Sequence[nn.Module], *, device: torch.device) -> None:
        """Learns the shapes of every layer from one token; `allocate` and a dispatcher must follow before `run`."""
        self._trunk = trunk
        self._device = device
        self._cache: KVCache | None = None
        self.dispatcher: Dispatcher | None = None
        self._lengths_T = [torch.empty(0)]
        """[T] the length that each token's rotary embedding goes by; in a list, to be shared with those modules."""
        rotate_by_length(trunk, self._lengths_T)
        self.kv_shapes, self.layer_shapes = self._probe(experts)
        attach(experts, self._experts)

    def allocate(self, *, num_blocks: int, block_size: int, dtype: torch.dtype) -> KVCache:
        way = find_way(self.kv_shapes.values(), dtype=dtype, device=self._device, block_size=block_size)
        self._cache = KVCache(
            self.kv_shapes, num_blocks=num_blocks, block_size=block_size, dtype=dtype, device=self._device, way=way
        )
        return self._cache

    @torch.inference_mode()
    def run(
        self, slices: Sequence[SequenceSlice], tokens_per_rank: Sequence[int], counter: RoutingCounter | None = None
    ) -> Tensor:
        """Logits [n, V] of the last token of the n slices that want them, in order. Blocks on the other workers.

        Raises StepAborted where a peer is gone: nothing of the step counts then, and it may be run again.
        """
        assert self.dispatcher is not None
        assert self._cache is not None
        self.dispatcher.begin(tokens_per_rank, counter)
        if not slices:
            self.dispatcher.idle(self.layer_shapes, self._device)
            return torch.empty(0, 0, device=self._device)
        batch = StepBatch.build(slices, self._cache, self._device)
        batch.dispatcher = self.dispatcher
        with step_context(batch):
            return self._forward(slices)

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
        out: Any = self._trunk(
            input_ids=input_ids,
            position_ids=position_ids,
            # without one, transformers looks into the positions for packed sequences, and the host waits for the answer
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

    @torch.inference_mode()
    def _probe(self, experts: Sequence[nn.Module]) -> tuple[dict[int, KVShape], tuple[LayerShape, ...]]:
        shapes: dict[int, LayerShape] = {}

        def record(layer: int, hidden: Tensor, index: Tensor, weight: Tensor) -> Tensor:
            shapes[layer] = LayerShape(hidden=hidden.shape[-1], top_k=index.shape[-1], dtype=hidden.dtype)
            return torch.zeros_like(hidden)

        attach(experts, record)
        probe = ShapeProbe()
        with step_context(probe):
            self._forward([SequenceSlice(token_ids=[0], start=0, block_ids=[0], prompt_length=1)])
        return dict(sorted(probe.shapes.items())), tuple(shapes[layer] for layer in range(len(experts)))
