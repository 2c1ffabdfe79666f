"""Routers that choose by scores, a bias and groups: transformers' own are recognised, and choose the same experts."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2TopkRouter
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter
from transformers.models.gemma4.configuration_gemma4 import Gemma4TextConfig
from transformers.models.gemma4.modeling_gemma4 import Gemma4TextRouter
from transformers.models.hy_v3.modeling_hy_v3 import HYV3TopKRouter
from transformers.models.minimax_m2.modeling_minimax_m2 import MiniMaxM2TopKRouter
from transformers.models.minimax_m3_vl.modeling_minimax_m3_vl import MiniMaxM3VLTopKRouter

from elastic_moe.cluster.fit import CodePath, FitNotes, Part
from elastic_moe.model.fitting.small_ops import fit_trunk
from elastic_moe.model.native.router import NormedRouter, ScoredRouter
from elastic_moe.model.trunk.linear import pack_linears

HIDDEN, ROWS = 64, 500
_DEEPSEEK = {"hidden_size": HIDDEN, "num_experts_per_tok": 6, "routed_scaling_factor": 2.5}
ROUTERS: dict[str, tuple[type[nn.Module], str, dict[str, Any]]] = {
    "deepseek_v3": (
        DeepseekV3TopkRouter,
        "deepseek_v3",
        _DEEPSEEK | {"n_routed_experts": 64, "n_group": 8, "topk_group": 4},
    ),
    "deepseek_v3-ungrouped": (
        DeepseekV3TopkRouter,
        "deepseek_v3",
        _DEEPSEEK | {"n_routed_experts": 130, "n_group": 1, "topk_group": 1, "norm_topk_prob": False},
    ),
    "few": (
        DeepseekV3TopkRouter,
        "deepseek_v3",
        _DEEPSEEK | {"num_experts_per_tok": 2, "n_routed_experts": 8, "n_group": 2, "topk_group": 1},
    ),
    "deepseek_v2": (
        DeepseekV2TopkRouter,
        "deepseek_v2",
        _DEEPSEEK | {"n_routed_experts": 60, "n_group": 6, "topk_group": 3, "topk_method": "group_limited_greedy"},
    ),
    "minimax_m2": (
        MiniMaxM2TopKRouter,
        "minimax_m2",
        {"hidden_size": HIDDEN, "num_local_experts": 32, "num_experts_per_tok": 8},
    ),
    "minimax_m3": (
        MiniMaxM3VLTopKRouter,
        "minimax_m3_vl_text",
        {"hidden_size": HIDDEN, "num_local_experts": 128, "num_experts_per_tok": 2},
    ),
    "hy_v3": (
        HYV3TopKRouter,
        "hy_v3",
        {"hidden_size": HIDDEN, "num_experts": 48, "num_experts_per_tok": 8, "router_scaling_factor": 2.826},
    ),
}
GIVEN = ("minimax_m2", "hy_v3")
"""Those whose caller gives the bias."""


def made(name: str) -> Any:
    kind, family, fields = ROUTERS[name]
    router: Any = kind(AutoConfig.for_model(family, **fields)).bfloat16()
    g = torch.Generator().manual_seed(1)
    router.weight.data.copy_(torch.randn(router.weight.shape, generator=g))
    if hasattr(router, "e_score_correction_bias"):
        router.e_score_correction_bias = nn.Buffer(torch.randn(len(router.weight), generator=g) / 8)
    return router


def rows(count: int = ROWS) -> Tensor:
    return (torch.randn(count, HIDDEN, generator=torch.Generator().manual_seed(2)) / 3).bfloat16()


def arguments(name: str, router: Any, x: Tensor) -> tuple[Tensor, ...]:
    bias = torch.randn(len(router.weight), generator=torch.Generator().manual_seed(3)) / 8
    return (x, bias) if name in GIVEN else (x,)


@pytest.mark.parametrize("name", ROUTERS)
def test_the_same_experts_are_chosen(lib: ctypes.CDLL, name: str) -> None:
    router = made(name)
    given = arguments(name, router, rows())
    logits, scores, index = router(*given)
    notes = FitNotes()
    fit_trunk(lib, router, notes)
    assert isinstance(router.forward, ScoredRouter)
    assert [row.path for row in notes.rows() if row.part is Part.ROUTER] == [CodePath.NATIVE]
    got = router(*given)
    assert [part.dtype for part in got] == [logits.dtype, scores.dtype, index.dtype]
    torch.testing.assert_close(got[0], logits, rtol=2**-7 if logits.dtype == torch.bfloat16 else 1e-4, atol=1e-4)
    # sums of products come in another order, so that two nearly equal scores may change places
    same = (got[2].sort(-1).values == index.sort(-1).values).all(-1)
    assert same.float().mean() > (0.95 if logits.dtype == torch.bfloat16 else 0.998)
    ours, theirs = (s.gather(1, i.argsort(-1))[same] for s, i in ((got[1], got[2]), (scores, index)))
    torch.testing.assert_close(ours, theirs, rtol=2**-6 if logits.dtype == torch.bfloat16 else 1e-4, atol=1e-6)
    alone = router(given[0][7:8], *given[1:])
    assert all(torch.equal(one[0], many[7]) for one, many in zip(alone, got, strict=True))


def test_a_router_whose_choices_are_all_ties_keeps_its_code(lib: ctypes.CDLL) -> None:
    """A trial has no choice in common with it then, and any scale would seem to be its own."""
    router = made("few")
    router.weight.data.zero_()
    router.e_score_correction_bias = nn.Buffer(torch.zeros(len(router.weight)))
    expected = router(rows())
    fit_trunk(lib, router, FitNotes())
    got = router(rows())
    torch.testing.assert_close(got[1], expected[1])


@pytest.mark.parametrize("experts", [8, 128])
def test_a_router_with_a_norm_of_its_own_chooses_the_same_experts(lib: ctypes.CDLL, experts: int) -> None:
    router = normed(experts)
    torch.manual_seed(1)
    given = torch.randn(ROWS, HIDDEN).bfloat16()
    expected = router(given)
    notes = FitNotes()
    pack_linears(router, FitNotes())
    fit_trunk(lib, router, notes)
    assert isinstance(router.forward, NormedRouter)
    assert [row.path for row in notes.rows() if row.part is Part.ROUTER] == [CodePath.NATIVE]
    probabilities, scores, index = router(given)
    # a logit's last bit may differ from that of torch's product; where it does not, the choices are the same
    alike = (probabilities == expected[0]).all(-1)
    assert alike.float().mean() > 0.5
    assert torch.equal(index.sort(-1).values[alike], expected[2].sort(-1).values[alike])
    ours, theirs = (s.gather(1, i.argsort(-1))[alike] for s, i in ((scores, index), (expected[1], expected[2])))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)
    assert all(
        torch.equal(one[0], many[7])
        for one, many in zip(router(given[7:8]), (probabilities, scores, index), strict=True)
    )
    # ties
    nothing = torch.zeros(1, HIDDEN, dtype=torch.bfloat16)
    assert router(nothing)[2].sort(-1).values.tolist() == normed(experts)(nothing)[2].sort(-1).values.tolist()


def test_a_router_that_scales_its_logits_keeps_its_code(lib: ctypes.CDLL) -> None:
    router = normed(32)
    pack_linears(router, FitNotes())
    original = router.proj.forward
    router.proj.forward = lambda x: 2 * original(x)
    fit_trunk(lib, router, FitNotes())
    assert "forward" not in vars(router)


def normed(experts: int) -> Any:
    """Gemma-4's router with random weights."""
    config = Gemma4TextConfig(hidden_size=HIDDEN, num_experts=experts, top_k_experts=2 + experts // 32)
    router = Gemma4TextRouter(config)
    generator = torch.Generator().manual_seed(0)
    for parameter in router.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) + (parameter.dim() == 1)
    return router.bfloat16().requires_grad_(False)


@pytest.mark.parametrize("name", ROUTERS)
def test_ties_are_resolved_as_torch_resolves_them(lib: ctypes.CDLL, name: str) -> None:
    """All experts have the same score, and many the same bias."""
    router = made(name)
    count = len(router.weight)
    bias = (torch.arange(count) * 7 % 5).float() / 16
    if hasattr(router, "e_score_correction_bias"):
        router.e_score_correction_bias = nn.Buffer(bias)
    given = (torch.zeros(1, HIDDEN, dtype=torch.bfloat16), *([bias] if name in GIVEN else []))
    expected = router(*given)[2]
    fit_trunk(lib, router, FitNotes())
    assert isinstance(router.forward, ScoredRouter)
    assert router(*given)[2].sort(-1).values.tolist() == expected.sort(-1).values.tolist()


class Capped(nn.Module):
    """Has a choice of another kind: its logits are capped."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, HIDDEN, generator=torch.Generator().manual_seed(1)).bfloat16())

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = nn.functional.linear(x, self.weight).float().tanh()
        scores, index = logits.sigmoid().topk(2)
        return logits, scores, index


def test_another_choice_is_left_alone(lib: ctypes.CDLL) -> None:
    router, notes = Capped(), FitNotes()
    expected = router(rows())
    fit_trunk(lib, router, notes)
    assert "forward" not in vars(router)
    assert all(torch.equal(*pair) for pair in zip(router(rows())[2:], expected[2:], strict=True))
    [row] = [row for row in notes.rows() if row.part is Part.ROUTER]
    assert row.path is CodePath.PACKED
    assert "no choice by scores" in str(row.reason)
