"""Router, experts and shared expert run as one native call where it computes what the module computes."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from elastic_moe.model.checkpoints.checkpoint import open_checkpoint
from elastic_moe.model.checkpoints.loading import expert_modules, load_trunk
from elastic_moe.model.fitting import fit as fitting
from elastic_moe.model.fitting.feed_forward import FittedFeedForward, TwoParts, join_feed_forwards
from tests.model.families import tiny_checkpoint
from tests.model.native.test_models import logits, runner_of, texts

JOINED = ["deepseek_v3", "glm4_moe", "qwen2_moe", "qwen3_next"]
TWO_PARTS = ["gemma4_text", "gemma4_text-keys"]
OTHERS = ["nemotron_h", "phimoe", "minimax_m2", "gpt_oss"]
"""Latent experts, a router of another kind, one that its caller gives a bias, and scores as a result."""


@pytest.mark.parametrize("family", JOINED + OTHERS)
def test_which_are_joined(lib: ctypes.CDLL, family: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tiny_checkpoint(family, tmp_path_factory)
    trunk = load_trunk(open_checkpoint(str(path)), dtype=torch.bfloat16, device=torch.device("cpu"))
    experts = expert_modules(trunk)
    fitting.fit(trunk, experts, block_size=16)
    joined = [module for module in trunk.modules() if isinstance(module.forward, FittedFeedForward)]
    assert len(joined) == (len(experts) if family in JOINED else 0)


@pytest.mark.parametrize("family", ["deepseek_v3", "qwen2_moe"])
def test_nearly_the_values_of_the_parts(
    lib: ctypes.CDLL, family: str, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tiny_checkpoint(family, tmp_path_factory)
    joined = runner_of(path)
    halves = [m.forward for m in joined._trunk.modules() if isinstance(m.forward, FittedFeedForward)]
    assert halves
    for half in halves:
        half._original = None  # type: ignore[assignment]
    monkeypatch.setattr(fitting, "join_feed_forwards", lambda *_: 0)
    # a new one, in place of the one that is kept
    parts = runner_of.__wrapped__(path)
    every = [(2 * i, text, 0, len(text)) for i, text in enumerate(texts(512))]
    got, expected = logits(joined, every), logits(parts, every)
    assert (got - expected).abs().max() < 0.05 * expected.abs().max()
    # a row's bits do not depend on its company
    assert torch.equal(logits(joined, every[:1])[0], got[0])
    assert torch.equal(logits(parts, every[:1])[0], expected[0])
    alone = logits(joined, [(2 * i, [*text, 7], len(text), len(text) + 1) for i, text in enumerate(texts(512))][:1])
    among = logits(joined, [(2 * i, [*text, 7], len(text), len(text) + 1) for i, text in enumerate(texts(512))])
    assert torch.equal(alone[0], among[0])


@pytest.mark.parametrize("family", TWO_PARTS)
def test_two_parts_are_one_call(
    lib: ctypes.CDLL, family: str, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tiny_checkpoint(family, tmp_path_factory)
    joined = runner_of(path)
    tails = two_parts(joined._trunk)
    assert tails
    assert all(tail.half is not None for tail in tails)
    every = [(2 * i, text, 0, len(text)) for i, text in enumerate(texts(512))]
    parts = runner_of.__wrapped__(path)
    for tail in two_parts(parts._trunk):
        tail.half = None
    for tail in tails:
        monkeypatch.setattr(tail, "by_parts", None)  # so the native call serves each step
    got, expected = logits(joined, every), logits(parts, every)
    assert (got - expected).abs().max() < 0.05 * expected.abs().max()
    # a row's bits depend neither on its company nor on the number of threads
    assert torch.equal(logits(joined, every[:1])[0], got[0])
    torch.set_num_threads(2)
    assert torch.equal(logits(joined, every), got)


def two_parts(trunk: nn.Module) -> list[TwoParts]:
    tails = [getattr(module.forward, "tail", None) for module in trunk.modules()]
    return [tail for tail in tails if isinstance(tail, TwoParts)]


def test_two_parts_with_another_activation_keep_their_code(
    lib: ctypes.CDLL, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tiny_checkpoint("gemma4_text", tmp_path_factory)
    trunk = load_trunk(open_checkpoint(str(path)), dtype=torch.bfloat16, device=torch.device("cpu"))
    layers: Any = [module for module in trunk.modules() if hasattr(module, "router")]
    layers[0].mlp.act_fn = nn.Tanh()
    layers[1].router.scale.data.neg_()  # what the router computes is read from its parameters
    fitting.fit(trunk, expert_modules(trunk), block_size=16)
    assert [tail.half is not None for tail in two_parts(trunk)] == [False] + [True] * (len(layers) - 1)


def test_a_module_that_does_more_keeps_its_code(
    lib: ctypes.CDLL, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fitting, "join_feed_forwards", lambda *_: 0)
    path = tiny_checkpoint("glm4_moe", tmp_path_factory)
    trunk = load_trunk(open_checkpoint(str(path)), dtype=torch.bfloat16, device=torch.device("cpu"))
    experts = expert_modules(trunk)
    fitting.fit(trunk, experts, block_size=16)
    [first, *_] = [module for module in trunk.modules() if experts[0] in list(module.children())]
    changed(first)
    assert join_feed_forwards(lib, trunk, experts) == len(experts) - 1
    assert not isinstance(first.forward, FittedFeedForward)


def changed(module: nn.Module) -> None:
    """Have the module double what its experts and its shared expert make."""
    original = module.forward

    def doubled(hidden_states: Tensor) -> Tensor:
        return 2 * original(hidden_states)

    module.forward = doubled
