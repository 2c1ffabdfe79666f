"""Sparse attention by an indexer (DSA): each token attends only to the keys that a small scoring layer ranks highest.

The indexer's own keys, one for each token, are cached beside the layer's keys. transformers' indexer does the ranking:
for each sequence that is longer than the number of chosen keys, its forward runs over the sequence's rows, with a cache
that hands it all of the sequence's keys. Up to that length every key is chosen, and attention is dense.

Source: DeepSeek-V3.2, arXiv 2512.02556. Legend: T tokens of the step, Q rows of one sequence, L keys, D numbers of an
indexer's key, C chosen keys.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from elastic_moe.model.transformers_private import INDEXER_CHOOSES, is_indexer
from elastic_moe.model.trunk.attention import Chosen
from elastic_moe.model.trunk.attention_path import KVShape
from elastic_moe.model.trunk.step_batch import ShapeProbe, StepBatch, current_batch


def index_layer(layer: int) -> int:
    """The number under which a layer's indexer keys are cached: attention layers have the numbers from 0 on."""
    return -1 - layer


def choose_by_cache(trunk: nn.Module) -> None:
    """Have every indexer of a trunk cache its keys in the step's KV cache, and choose among the keys there."""
    for module in trunk.modules():
        if is_indexer(module):
            module.forward = _Indexer(module)


class _CachedKeys:
    """Stands for transformers' cache while an indexer runs: it takes the new keys, and returns all keys."""

    def __init__(self, keys_LD: Tensor | None) -> None:
        self._keys_LD = keys_LD
        self.new_TD: Tensor

    def update_indexer(self, keys_1TD: Tensor, layer_idx: int, *_: Any, **__: Any) -> Tensor:
        self.new_TD = keys_1TD[0]
        if self._keys_LD is None:
            raise _Enough
        return self._keys_LD[None]


class _Enough(Exception):
    """Ends an indexer's forward as soon as it has made its keys."""


class _Indexer:
    """The forward of one indexer."""

    def __init__(self, module: Any) -> None:
        self._forward: Callable[..., Tensor] = module.forward
        self._parameters = inspect.signature(self._forward)
        self._layer = index_layer(int(module.layer_idx))
        self._most = int(getattr(module, INDEXER_CHOOSES))

    def __call__(self, *args: Any, **kwargs: Any) -> Chosen:
        arguments = self._parameters.bind(*args, **kwargs).arguments
        batch = current_batch()
        new_TD = self._new_keys(arguments)
        if isinstance(batch, ShapeProbe):
            batch.shapes[self._layer] = KVShape(num_heads=1, key_size=new_TD.shape[1], value_size=0, latent=True)
            return {}
        assert isinstance(batch, StepBatch), "a model with an indexer is not recorded"
        batch.cache.write_rows(self._layer, batch.places, new_TD)
        return {part.first_row: self._choice(arguments, len(new_TD), part, batch) for part in batch.longer(self._most)}

    def _new_keys(self, arguments: dict[str, Any]) -> Tensor:
        """[T, D]"""
        cache = _CachedKeys(None)
        try:
            self._forward(**{**arguments, "past_key_values": cache})
        except _Enough:
            return cache.new_TD
        raise AssertionError("an indexer did not cache its keys")

    def _choice(self, arguments: dict[str, Any], tokens: int, part: Any, batch: StepBatch) -> Tensor:
        """[Q, C] the numbers of the chosen keys."""
        rows = slice(part.first_row, part.first_row + part.end - part.start)
        keys_LD = batch.cache.latents(self._layer, part.blocks)[: part.end]
        at_Q = torch.arange(part.start, part.end, device=keys_LD.device)
        hidden_QL = torch.arange(part.end, device=keys_LD.device) > at_Q[:, None]
        mask_1QL = torch.zeros(1, *hidden_QL.shape, device=keys_LD.device).masked_fill_(hidden_QL, float("-inf"))
        own = {name: _of_rows(value, rows, tokens) for name, value in arguments.items()}
        chosen: Tensor = self._forward(**{**own, "attention_mask": mask_1QL, "past_key_values": _CachedKeys(keys_LD)})
        return chosen[0].long()


def _of_rows(value: Any, rows: slice, tokens: int) -> Any:
    """The part of an argument that belongs to some of the step's tokens."""
    if isinstance(value, tuple):
        return tuple(_of_rows(part, rows, tokens) for part in value)
    if isinstance(value, Tensor) and value.dim() > 1 and value.shape[1] == tokens:
        return value[:, rows]
    return value
