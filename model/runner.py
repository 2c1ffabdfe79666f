"""Runs one worker's part of a step: packed tokens through transformers' trunk, experts through the dispatcher.

Legend: T tokens of the step, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from model.attention import SequenceSlice, ShapeProbe, StepBatch, step_context
from model.dispatch import Dispatcher, LayerShape
from model.experts import attach
from model.kv_cache import KVCache, KVShape
from model.routing_counter import RoutingCounter


class ModelRunner:
    """The trunk of one worker, its KV cache, and the epoch's dispatcher."""

    def __init__(self, trunk: nn.Module, experts: Sequence[nn.Module], *, device: torch.device) -> None:
        """Learns the shapes of every layer from one token; `allocate` and a dispatcher must follow before `run`."""
        self._trunk = trunk
        self._device = device
        self._cache: KVCache | None = None
        self.dispatcher: Dispatcher | None = None
        self._rope_length: list[Sequence[SequenceSlice]] = []
        _split_long_rope(trunk, self._rope_length)
        self.kv_shapes, self.layer_shapes = self._probe(experts)
        attach(experts, self._experts)

    def allocate(self, *, num_blocks: int, block_size: int, dtype: torch.dtype) -> KVCache:
        self._cache = KVCache(
            self.kv_shapes, num_blocks=num_blocks, block_size=block_size, dtype=dtype, device=self._device
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
        self._rope_length[:] = [slices]
        out: Any = self._trunk(
            input_ids=torch.tensor([tokens], device=self._device),
            position_ids=torch.tensor([positions], device=self._device),
            use_cache=False,
            logits_to_keep=torch.tensor(keep, dtype=torch.long, device=self._device),
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
            self._forward([SequenceSlice(token_ids=[0], start=0, block_ids=[0], rope_length=1)])
        return dict(sorted(probe.shapes.items())), tuple(shapes[layer] for layer in range(len(experts)))


def _split_long_rope(trunk: nn.Module, current: list[Sequence[SequenceSlice]]) -> None:
    """Give every sequence of a packed step the rotary embedding of its own length.

    `longrope` picks its factors by the longest position in the call, which in a packed row belongs to somebody else.
    So those modules are called once per sequence, with the sequence's length appended as a last position.
    """
    for module in trunk.modules():
        kind = getattr(module, "rope_type", None)
        kinds = set(kind.values()) if isinstance(kind, dict) else {kind}
        if "longrope" not in kinds:
            continue
        whole = module.forward

        def split(x: Tensor, position_ids: Tensor, *args: Any, _whole: Any = whole, **kwargs: Any) -> Any:
            parts = []
            at = 0
            for piece in current[0]:
                count = len(piece.token_ids)
                mine = torch.cat(
                    [position_ids[:, at : at + count], position_ids.new_tensor([[piece.rope_length - 1]])], 1
                )
                cos, sin = _whole(x, mine, *args, **kwargs)
                parts.append((cos[:, :count], sin[:, :count]))
                at += count
            return tuple(torch.cat(tables, 1) for tables in zip(*parts, strict=True))

        module.forward = split
