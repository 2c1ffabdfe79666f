"""The KV cache's memory: blocks come in the same order in every layer, and huge pages are zeroed when met."""

from __future__ import annotations

import pytest
import torch

from elastic_moe.model.native.memory import HUGE
from elastic_moe.model.trunk.kv_cache import KVCache, KVShape

LAYERS = 12
STORES = 2 * LAYERS


@pytest.mark.parametrize("block_size", [16, 64])
def test_no_block_is_the_first_in_huge_pages_of_many_layers(block_size: int) -> None:
    shape = KVShape(num_heads=1, key_size=512, value_size=512)
    blocks = 8 * HUGE // (block_size * 512 * 2)
    cache = KVCache(
        dict.fromkeys(range(LAYERS), shape),
        num_blocks=blocks,
        block_size=block_size,
        dtype=torch.bfloat16,
        device=torch.device("cpu"),
    )
    stores = [store for layer in range(LAYERS) for store in cache.stores(layer)]
    begins = [[store[0, block].data_ptr() // HUGE for block in range(blocks)] for store in stores]
    met = [sum(pages[n] != pages[n - 1] for pages in begins) for n in range(1, blocks)]
    # all layers meet as many new pages as before, but not at once
    assert sum(met) >= 7 * STORES
    per_page = HUGE // (block_size * 512 * 2)
    assert max(met) <= -(-STORES // per_page) + 1


def test_it_begins_as_zeros_that_take_no_memory_and_are_aligned() -> None:
    shape = KVShape(num_heads=2, key_size=64, value_size=32)
    cache = KVCache({0: shape, 3: shape}, num_blocks=5, block_size=16, dtype=torch.bfloat16, device=torch.device("cpu"))
    for layer in (0, 3):
        for store, size in zip(cache.stores(layer), (64, 32), strict=True):
            assert store.shape == (2, 5, 16, size)
            assert store.data_ptr() % 64 == 0
            assert not store.any()
