"""Router, experts and shared expert run as one native call where it computes what the module computes."""

from __future__ import annotations

import ctypes

import pytest
import torch
from torch import Tensor, nn

from elastic_moe.model.checkpoints.checkpoint import open_checkpoint
from elastic_moe.model.checkpoints.loading import expert_modules, load_trunk
from elastic_moe.model.fitting import fit as fitting
from elastic_moe.model.fitting.feed_forward import FittedFeedForward, join_feed_forwards
from tests.model.families import tiny_checkpoint
from tests.model.native.test_models import logits, runner_of, texts

JOINED = ["deepseek_v3", "glm4_moe", "qwen2_moe", "qwen3_next"]
OTHERS = ["nemotron_h", "gemma4_text", "phimoe", "minimax_m2", "gpt_oss"]
"""Latent experts, further norms, a router of another kind, one that its caller gives a bias, and scores as a result."""


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
