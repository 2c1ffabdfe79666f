"""A trunk's parts are called without the code around them only where this gives the same bits."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from elastic_moe.model.checkpoints.checkpoint import open_checkpoint
from elastic_moe.model.checkpoints.loading import expert_modules, load_trunk
from elastic_moe.model.fitting import fit as fitting
from elastic_moe.model.fitting.straight import StraightTrunk, find_straight
from elastic_moe.model.trunk.rotation import rotate_by_length
from tests.model.families import tiny_checkpoint
from tests.model.lockstep import Lockstep, request
from tests.model.native.test_models import logits, runner_of, texts

STRAIGHT = [
    "mixtral",
    "qwen3_moe",
    "gpt_oss",
    "glm4_moe",
    "minimax_m2",
    "deepseek_v3",
    "gemma4_text",
    "qwen3_next",
    "qwen3_5_moe_text",
    "phimoe-longrope",
]
OTHERS = ["granitemoe", "jamba", "lfm2_moe", "nemotron_h"]
"""Embeddings and logits are scaled, and layers that keep transformers' code."""


def trunk_of(family: str, tmp_path_factory: pytest.TempPathFactory, **config: Any) -> Any:
    path = tiny_checkpoint(family, tmp_path_factory)
    trunk = load_trunk(open_checkpoint(str(path)), dtype=torch.bfloat16, device=torch.device("cpu"))
    for name, value in config.items():
        setattr(trunk.config, name, value)
    fitting.fit(trunk, expert_modules(trunk), block_size=16)
    return trunk


def straight_of(trunk: Any) -> StraightTrunk | None:
    lengths_T = [torch.empty(0)]
    rotate_by_length(trunk, lengths_T)
    return find_straight(trunk, lengths_T)


@pytest.mark.parametrize("family", STRAIGHT + OTHERS)
def test_which_trunks_are_straight(lib: ctypes.CDLL, family: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    trunk = trunk_of(family, tmp_path_factory)
    layers = [layer for child in trunk.base_model.children() if isinstance(child, nn.ModuleList) for layer in child]
    forwards = [layer.forward for layer in layers]
    assert (straight_of(trunk) is not None) == (family in STRAIGHT)
    assert [layer.forward for layer in layers] == forwards, "a trial leaves everything as it was"


@pytest.mark.parametrize("family", [*STRAIGHT, "gemma4_text-keys", "deepseek_v3-yarn", "mixtral-sliding"])
def test_the_same_bits_as_the_trunks_own_code(
    lib: ctypes.CDLL, family: str, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    workers = Lockstep(tiny_checkpoint(family, tmp_path_factory), [8], dtype="bfloat16", block_size=16)
    runner = workers.workers_runner()
    assert runner._straight is not None
    asked = [request(f"r{n}", text, max_tokens=6) for n, text in enumerate(texts(512)[:5])]
    monkeypatch.setattr(runner, "_logits", None)  # so the parts alone serve each step
    got = workers.run(asked)
    monkeypatch.undo()
    monkeypatch.setattr(runner, "_straight", None)
    again = [request(f"s{n}", text, max_tokens=6) for n, text in enumerate(texts(512)[:5])]
    assert list(got.values()) == list(workers.run(again).values())


def test_logits_have_the_same_bits(
    lib: ctypes.CDLL, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of all tokens of a step, and of some."""
    runner = runner_of(tiny_checkpoint("gemma4_text", tmp_path_factory))
    prompts = [(2 * n, text, 0, len(text)) for n, text in enumerate(texts(512))]
    singles = [(2 * n, [*text, 7], len(text), len(text) + 1) for n, text in enumerate(texts(512))]
    results: list[list[Tensor]] = []
    for straight in (runner._straight, None):
        monkeypatch.setattr(runner, "_straight", straight)
        results.append([logits(runner, prompts), logits(runner, singles)])
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)


def _scaled_head(trunk: Any) -> Callable[..., Any]:
    own = trunk.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        out = own(*args, **kwargs)
        out.logits = out.logits * 0.5
        return out

    return forward


def _scaled_input(trunk: Any) -> Callable[..., Any]:
    own = trunk.base_model.forward

    def forward(*args: Any, input_ids: Tensor, **kwargs: Any) -> Any:
        embedded = trunk.get_input_embeddings()(input_ids) * 2
        return own(*args, inputs_embeds=embedded, **kwargs)

    trunk.base_model.forward = forward
    return trunk.forward  # type: ignore[no-any-return]


def _counts_tokens(trunk: Any) -> Callable[..., Any]:
    """A layer is told the number of tokens, by its place among the arguments."""
    layer = trunk.base_model.layers[-1]
    layer.register_forward_pre_hook(lambda _, args, kwargs: ((*args, args[0].shape[1]), kwargs), with_kwargs=True)
    return trunk.forward  # type: ignore[no-any-return]


@pytest.mark.parametrize("change", [_scaled_head, _scaled_input, _counts_tokens])
def test_what_lies_between_the_parts_is_seen(
    lib: ctypes.CDLL, change: Callable[[Any], Callable[..., Any]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    trunk = trunk_of("qwen3_moe", tmp_path_factory)
    trunk.forward = change(trunk)
    assert straight_of(trunk) is None


def test_a_cap_is_seen_whatever_the_weights(lib: ctypes.CDLL, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Weights so small that no logit of a trial would come near the cap."""
    trunk = trunk_of("gemma4_text", tmp_path_factory)
    trunk.config.final_logit_softcapping = 30.0
    straight = straight_of(trunk)
    assert straight is not None
    assert straight._softcap == 30.0
    trunk.config.final_logit_softcapping = None
    straight = straight_of(trunk)
    assert straight is not None
    assert straight._softcap is None
