"""Attention halves of decoder layers are recognised by what they compute; joined ones give the bits of their parts."""

from __future__ import annotations

import ctypes
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from elastic_moe.model.checkpoints.checkpoint import open_checkpoint
from elastic_moe.model.checkpoints.loading import expert_modules, load_trunk
from elastic_moe.model.fitting import feed_forward
from elastic_moe.model.fitting import fit as fitting
from elastic_moe.model.fitting.attention_half import FittedLayer, fit_layers
from elastic_moe.model.fitting.latent_half import LatentLayer
from tests.model.families import tiny_checkpoint
from tests.model.native.test_models import logits, runner_of, texts

JOINED = ["mixtral", "mixtral-sliding", "qwen3_moe-mixed", "qwen2_moe-sliding", "olmoe", "glm4_moe", "minimax_m2"]
JOINED += ["gpt_oss", "phimoe", "phimoe-longrope"]
GATED = ["qwen3_next", "qwen3_5_moe_text"]
"""The matrix of queries makes gates too."""
AROUND = ["gemma4_text", "gemma4_text-keys", "granitemoe", "hunyuan_v1_moe"]
"""Norms behind attention, values that are keys, scaled sums, norms of heads behind the rotation."""
LATENT = ["deepseek_v3", "deepseek_v3-yarn", "mistral4", "glm4_moe_lite", "axk1"]
OTHERS = ["granitemoeshared", "ernie4_5_moe", "deepseek_v2", "flex_olmo"]
"""Two parts that are added, other rotary embeddings, and cosines in float32."""


@pytest.mark.parametrize("family", JOINED + GATED + AROUND + LATENT + OTHERS)
def test_which_layers_are_joined(
    lib: ctypes.CDLL, family: str, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[int] = []

    def noted(*args: Any) -> list[nn.Module]:
        layers = fit_layers(*args)
        found.append(len(layers))
        return layers

    monkeypatch.setattr(fitting, "fit_layers", noted)
    path = tiny_checkpoint(family, tmp_path_factory)
    trunk = load_trunk(open_checkpoint(str(path)), dtype=torch.bfloat16, device=torch.device("cpu"))
    fitting.fit(trunk, expert_modules(trunk), block_size=16)
    layers = sum("self_attn" in dict(module.named_children()) for module in trunk.modules())
    assert layers > 0
    assert found == [0 if family in OTHERS else layers]


@pytest.mark.parametrize("family", JOINED + AROUND + LATENT[:3])
def test_the_same_bits_as_the_parts(
    lib: ctypes.CDLL, family: str, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tiny_checkpoint(family, tmp_path_factory)
    # the two parts of a feed-forward half round gelu otherwise than torch where they are one call
    monkeypatch.setattr(feed_forward, "_join_two_parts", lambda *_: False)
    joined = runner_of.__wrapped__(path)
    fitted = [m.forward for m in joined._trunk.modules() if isinstance(m.forward, FittedLayer | LatentLayer)]
    for layer in fitted:
        # so the joined call serves each step: it takes what the trunk passes, also narrow cosines and sines
        layer._original = None  # type: ignore[assignment]
        if isinstance(layer, LatentLayer):
            assert all(len(text) < layer._below for text in texts(512))
    assert fitted
    monkeypatch.setattr(fitting, "fit_layers", lambda *_: [])
    parts = runner_of.__wrapped__(path)
    every = [(2 * i, text, 0, len(text)) for i, text in enumerate(texts(512))]
    assert torch.equal(logits(joined, every), logits(parts, every))
    # a prompt goes on beside tokens that are decoded, by two threads
    more = [(block, [*text, 7, 8], len(text), len(text) + 1 + (block == 0)) for block, text, _, _ in every]
    torch.set_num_threads(2)
    assert torch.equal(logits(joined, more), logits(parts, more))


def test_steps_with_queries_that_their_position_scales_go_the_layers_own_way(
    lib: ctypes.CDLL, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mistral-4 scales queries beyond the positions that it was trained on at first."""
    path = tmp_path / "mistral4"
    shutil.copytree(tiny_checkpoint("mistral4", tmp_path_factory), path)
    config = json.loads((path / "config.json").read_text())
    config["rope_parameters"]["original_max_position_embeddings"] = 12
    (path / "config.json").write_text(json.dumps(config))
    joined = runner_of(path)
    fitted = [m.forward for m in joined._trunk.modules() if isinstance(m.forward, LatentLayer)]
    assert [layer._positions for layer in fitted] == [12] * len(fitted)
    calls = 0

    def counted(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            return original(*args, **kwargs)

        return call

    for layer in fitted:
        layer._original = counted(layer._original)
    monkeypatch.setattr(fitting, "fit_layers", lambda *_: [])
    # a new one, in place of the one that is kept
    parts = runner_of.__wrapped__(path)
    text = [7, 8, 9] * 6
    for start, end, own in ((0, 11, 0), (11, 12, 0), (12, 13, len(fitted)), (13, 18, len(fitted))):
        calls = 0
        step = [(0, text, start, end)]
        assert torch.equal(logits(joined, step), logits(parts, step))
        assert calls == own


def test_a_layer_of_other_sums_keeps_its_code(
    lib: ctypes.CDLL, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gemma-4's and Granite's halves are recognised by what they compute, not by their names."""
    for family, change in (("gemma4_text", _norms_twice), ("granitemoe", _adds_less)):
        path = tiny_checkpoint(family, tmp_path_factory)
        trunk = load_trunk(open_checkpoint(str(path)), dtype=torch.bfloat16, device=torch.device("cpu"))
        layers: list[Any] = [module for module in trunk.modules() if "self_attn" in dict(module.named_children())]
        change(layers[0])
        fitting.fit(trunk, expert_modules(trunk), block_size=16)
        assert [isinstance(layer.forward, FittedLayer) for layer in layers] == [False] + [True] * (len(layers) - 1)


def _norms_twice(layer: Any) -> None:
    """Have the layer normalise attention's output twice."""
    original = layer.self_attn.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        out, weights = original(*args, **kwargs)
        return layer.post_attention_layernorm(out), weights

    layer.self_attn.forward = forward


def _adds_less(layer: Any) -> None:
    """Have the layer scale one of its sums otherwise than the other."""
    original = layer.self_attn.forward
    layer.self_attn.forward = lambda *args, **kwargs: (original(*args, **kwargs)[0] / 2, None)
