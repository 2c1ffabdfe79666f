"""The paged KV cache of one worker: tensors of blocks, one pair per attention layer.

This file owns the storage. The scheduler decides which block belongs to which sequence.

Legend: G key heads, D head size (keys and values may differ), P blocks, B tokens per block.
A layer's keys are [G, P, B, D]. A block of one head is contiguous, so gathering blocks copies long rows, and the result
has the layout that matmul needs. If the native library computes attention, blocks have its layout
(model/native/layer/attention.cpp), and only the library reads and writes them. If FlashAttention computes it, they are
[P, B, G, D] (model/trunk/flash.py). A layer of latents (model/trunk/latent.py) has keys of one head and no values, and
never the layout of FlashAttention.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from elastic_moe.model.native.attention import unpack_latents
from elastic_moe.model.native.memory import HUGE, untouched
from elastic_moe.model.trunk.attention_path import MATMUL, AttentionPath, KVShape
from elastic_moe.model.trunk.windows import WindowGroup

_PAGE = 4096


class KVCache:
    """Blocks of keys and values for every attention layer."""

    def __init__(
        self,
        shapes: Mapping[int, KVShape],
        *,
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
        path: AttentionPath = MATMUL,
        windows: WindowGroup | None = None,
        num_window_blocks: int = 0,
    ) -> None:
        """`path` says which code computes attention. The blocks have the layout for that code. The layers of `windows`
        have `num_window_blocks` blocks, which are numbered apart from those of the other layers."""
        self.path = path
        self.windows = windows
        windowed = frozenset[int]() if windows is None else windows.layers
        self.only_windows = windowed >= shapes.keys()
        """Whether all layers are layers of `windows`."""
        self.num_blocks = num_blocks
        self.block_size = block_size

        stores = sum(1 if s.latent else 2 for s in shapes.values())
        # blocks are taken in the same order in every layer: with equal offsets one block would be the first in a huge
        # page of every layer, and its step would wait until the system has zeroed all of these pages
        offsets = (n * HUGE // stores // _PAGE * _PAGE for n in range(stores))

        def blocks(layer: int, heads: int, size: int, plain: bool = False) -> Tensor:
            # memory is zeroed, since masked keys must be finite
            number = num_window_blocks if layer in windowed else num_blocks
            shape = (heads, number, block_size, size)
            if path.varlen is not None and not plain:
                shape = (number, block_size, heads, size)
            if device.type != "cpu":
                return torch.zeros(shape, dtype=dtype, device=device)
            return untouched(math.prod(shape) * dtype.itemsize, next(offsets)).view(dtype).view(shape)

        # FlashAttention reads no latents, and no keys that have no value: those of indexers
        plain = {layer: s.latent or not s.value_size for layer, s in shapes.items()}
        self._keys = {layer: blocks(layer, s.num_heads, s.key_size, plain[layer]) for layer, s in shapes.items()}
        self._values = {layer: blocks(layer, s.num_heads, s.value_size) for layer, s in shapes.items() if not s.latent}
        self._latents = {layer: s.value_size for layer, s in shapes.items() if s.latent}
        """Layers of latents, with the numbers of a key that are its value."""

    @staticmethod
    def block_bytes(shapes: Mapping[int, KVShape], *, block_size: int, dtype: torch.dtype) -> int:
        """The bytes of one block over all layers."""
        return sum(shape.elements for shape in shapes.values()) * block_size * dtype.itemsize

    @property
    def has_latents(self) -> bool:
        """Whether any layer keeps latents instead of keys and values."""
        return bool(self._latents)

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (*self._keys.values(), *self._values.values()))

    def write(self, layer: int, positions_T: Tensor, begun: Tensor, key_GTD: Tensor, value_GTD: Tensor) -> None:
        """Store the step's keys and values; `positions_T` are block * block_size + offset.

        Blocks in `begun` are cleared first. Another sequence's values there get a weight of 0, but 0 times infinity is
        not 0.
        """
        stored = [(self._keys[layer], key_GTD)]
        if layer not in self._latents:
            stored.append((self._values[layer], value_GTD))
        for blocks, new_GTD in stored:
            if len(begun):
                blocks.index_fill_(1, begun, 0)
            blocks.flatten(1, 2).index_copy_(1, positions_T, new_GTD)

    def write_rows(self, layer: int, positions_T: Tensor, key_TD: Tensor) -> None:
        """Store keys that have no value, and of which nobody reads more than were written."""
        self._keys[layer][0].flatten(0, 1).index_copy_(0, positions_T, key_TD)

    def stores(self, layer: int) -> tuple[Tensor, Tensor]:
        """All blocks of keys and all blocks of values of a layer, for the native library or FlashAttention.

        For a layer of latents, both are the keys.
        """
        if layer in self._latents:
            return self._keys[layer], self._keys[layer]
        return self._keys[layer], self._values[layer]

    def gather(self, layer: int, blocks: Tensor) -> tuple[Tensor, Tensor]:
        """Copy the keys and values of the blocks [N]: ([G, N*B, D], [G, N*B, D])."""
        keys_GLD = _gather(self._keys[layer], blocks)
        if layer in self._latents:
            return keys_GLD, keys_GLD[..., : self._latents[layer]]
        return keys_GLD, _gather(self._values[layer], blocks)

    def latents(self, layer: int, blocks: Tensor) -> Tensor:
        """Copy the keys of the blocks [N] of a layer of latents, from any layout: [N*B, D]."""
        keys_1PBD = self._keys[layer]
        if self.path.lib is None or not self._latents[layer]:
            return _gather(keys_1PBD, blocks)[0]
        return unpack_latents(keys_1PBD[0][blocks])


def _gather(cache_GPBD: Tensor, blocks_N: Tensor) -> Tensor:
    heads, _, block_size, head_size = cache_GPBD.shape
    rows = cache_GPBD.flatten(2, 3).index_select(1, blocks_N)
    return rows.view(heads, len(blocks_N) * block_size, head_size)
