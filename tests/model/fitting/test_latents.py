"""Layers that make keys and values of latents are recognised by what they compute; others keep keys and values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from elastic_moe.cluster.fit import Part
from elastic_moe.model.checkpoints.checkpoint import open_checkpoint
from elastic_moe.model.checkpoints.loading import expert_modules, load_trunk
from elastic_moe.model.fitting.fit import Fit, fit
from elastic_moe.model.trunk.kv_cache import KVCache
from tests.model.families import tiny_checkpoint

Change = Callable[[Any], None]


@pytest.fixture
def trunk(tmp_path_factory: pytest.TempPathFactory) -> nn.Module:
    checkpoint = open_checkpoint(tiny_checkpoint("deepseek_v3", tmp_path_factory))
    return load_trunk(checkpoint, dtype=torch.float32, device=torch.device("cpu"))


def fitted(trunk: nn.Module) -> Fit:
    return fit(trunk, expert_modules(trunk), block_size=16)


def test_the_cache_holds_latents(trunk: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> None:
    numbers = sum(shape.elements for shape in fitted(trunk).shapes.kv.values())
    assert numbers == 3 * (32 + 8)
    # what the dry run has counted, before any weight was read
    assert open_checkpoint(tiny_checkpoint("deepseek_v3", tmp_path_factory)).shape.kv_numbers == numbers


def scaled(module: Any) -> None:
    expand = module.expand_kv
    module.expand_kv = lambda latent, rotated: tuple(2 * part for part in expand(latent, rotated))


def squared(module: Any) -> None:
    expand = module.expand_kv
    module.expand_kv = lambda latent, rotated: expand(latent * latent.abs(), rotated)


def rotated_by_head(module: Any) -> None:
    expand = module.expand_kv

    def by_head(latent: Tensor, rotated: Tensor) -> tuple[Tensor, Tensor]:
        key, value = expand(latent, rotated)
        key[:, 1, :, -rotated.shape[-1] :] *= 2
        return key, value

    module.expand_kv = by_head


def biased(module: Any) -> None:
    module.kv_b_proj.bias = nn.Parameter(torch.ones(len(module.kv_b_proj.weight)))


@pytest.mark.parametrize("change", [scaled, biased, squared, rotated_by_head])
def test_a_layer_that_computes_something_else_stays_expanded_and_says_so(trunk: nn.Module, change: Change) -> None:
    modules: list[Any] = [module for module in trunk.modules() if hasattr(module, "expand_kv")]
    change(modules[1])
    found = fitted(trunk)
    shapes = [found.shapes.kv[n] for n in range(3)]
    assert [shape.latent for shape in shapes] == [True, False, True]
    assert shapes[1].elements == 4 * (16 + 8 + 16)
    [row] = [row for row in found.report().of(Part.ATTENTION) if "key heads" in row.modules]
    assert row.count == 1
    assert row.reason is not None
    assert "keys and values are cached, not latents: " in row.reason
    assert row.reason.endswith("none of its linear layers makes its keys and values, beside the rotated part")
    assert KVCache.block_bytes(found.shapes.kv, block_size=1, dtype=torch.float32) == 4 * (2 * 40 + 160)


def test_its_matrix_is_held_once(trunk: nn.Module) -> None:
    before = sum(p.nbytes for p in trunk.parameters())
    found = fitted(trunk)
    assert sum(p.nbytes for p in trunk.parameters()) + found.packed_bytes == before
