"""Small operators of a trunk are recognised by what they compute, and compute the same after fitting."""

from __future__ import annotations

import ctypes
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.models.deepseek_v3 import modeling_deepseek_v3
from transformers.models.gemma4 import modeling_gemma4
from transformers.models.gemma4.modeling_gemma4 import Gemma4RMSNorm
from transformers.models.kimi_linear.modeling_kimi_linear import KimiLinearRMSNormGated
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHRMSNormGated
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextRMSNormGated

from elastic_moe.cluster.fit import CodePath, FitNotes, Part
from elastic_moe.model.fitting.small_ops import fit_trunk
from elastic_moe.model.native.router import ScoredRouter


class Norm(nn.Module):
    """A root mean square normalisation as families write it: `style` says how."""

    def __init__(self, style: str, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(size, generator=torch.Generator().manual_seed(1)).bfloat16())
        self.other = 0.5
        self.eps = 1e-3
        self.style = style

    def forward(self, hidden: Tensor) -> Tensor:
        x = hidden.float()
        if self.style == "layer norm":
            x = x - x.mean(-1, keepdim=True)
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)
        if self.style == "llama":
            return self.weight * x.bfloat16()
        if self.style == "gemma":
            return (x * (1 + self.weight.float())).bfloat16()
        return (self.weight.float() * x).bfloat16()


@pytest.mark.parametrize("size", [16, 64, 100])
@pytest.mark.parametrize("style", ["llama", "gemma", "gpt-oss"])
def test_norms_are_recognised(lib: ctypes.CDLL, style: str, size: int) -> None:
    norm = Norm(style, size)
    x = torch.randn(2, 3, size, generator=torch.Generator().manual_seed(2)).bfloat16()
    expected = norm(x)
    fit_trunk(lib, norm, FitNotes())
    assert "forward" in vars(norm)
    # the sum of squares is added up in another order, so that a last bit may differ
    torch.testing.assert_close(norm(x), expected, rtol=2**-7, atol=1e-6)
    assert torch.equal(norm(x[1, 2]), norm(x)[1, 2])
    assert torch.equal(norm(x.transpose(0, 1)), norm(x).transpose(0, 1))


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        (Qwen3NextRMSNormGated, {"hidden_size": 40}),
        (KimiLinearRMSNormGated, {"hidden_size": 40}),
        (NemotronHRMSNormGated, {"hidden_size": 40, "group_size": 20}),
    ],
)
def test_norms_with_a_gate_are_recognised(lib: ctypes.CDLL, kind: type[nn.Module], fields: dict[str, int]) -> None:
    g = torch.Generator().manual_seed(1)
    norm = kind(**fields).bfloat16()
    norm.weight.data.copy_(torch.randn(40, generator=g))  # type: ignore[union-attr, operator]
    x, gates = torch.randn(3, 5, 40, generator=g).bfloat16(), torch.randn(3, 5, 96, generator=g).bfloat16()
    expected = norm(x, gates[..., 7:47])
    notes = FitNotes()
    fit_trunk(lib, norm, notes)
    assert [row.path for row in notes.rows() if row.part is Part.NORMS] == [CodePath.NATIVE]
    torch.testing.assert_close(norm(x, gates[..., 7:47]), expected, rtol=2**-6, atol=1e-6)
    # rows in float32 keep their dtype
    assert norm(x.float(), gates[..., 7:47]).dtype == torch.float32


@pytest.mark.parametrize("size", [16, 100, 1024])
@pytest.mark.parametrize("biased", [True, False])
def test_layer_norms_are_recognised(lib: ctypes.CDLL, size: int, biased: bool) -> None:
    g = torch.Generator().manual_seed(1)
    norm = nn.LayerNorm(size, eps=1e-3, bias=biased, dtype=torch.bfloat16)
    for parameter in norm.parameters():
        parameter.data.copy_(torch.randn(size, generator=g))
    x = (torch.randn(2, 3, size, generator=g) + 1).bfloat16()
    expected = norm(x)
    fit_trunk(lib, norm, FitNotes())
    assert "forward" in vars(norm)
    torch.testing.assert_close(norm(x), expected, rtol=2**-7, atol=1e-4)
    assert torch.equal(norm(x[1, 2]), norm(x)[1, 2])


def test_norms_without_weights_are_recognised(lib: ctypes.CDLL) -> None:
    norm = Gemma4RMSNorm(40, with_scale=False)
    rows = [torch.randn(2, 3, size, generator=torch.Generator().manual_seed(2)).bfloat16() for size in (40, 64)]
    expected = [norm(x) for x in rows]
    fit_trunk(lib, norm, FitNotes())
    assert "forward" in vars(norm)
    for x, made in zip(rows, expected, strict=True):
        torch.testing.assert_close(norm(x), made, rtol=2**-7, atol=1e-6)


def test_other_modules_are_left_alone(lib: ctypes.CDLL) -> None:
    modules = nn.ModuleList(
        [
            nn.GroupNorm(2, 32, dtype=torch.bfloat16),
            nn.Dropout(0.5).eval(),
            nn.Conv1d(4, 4, 1, dtype=torch.bfloat16),
            nn.Embedding(9, 8, dtype=torch.bfloat16),
            nn.PReLU(32, dtype=torch.bfloat16),
        ]
    )
    assert fit_trunk(lib, modules, FitNotes()) == 0
    assert not [module for module in modules if "forward" in vars(module)]


class Router(nn.Module):
    """Multiplies by its weight itself, as transformers' routers do."""

    def __init__(self, wide: bool, biased: bool) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(1)
        self.weight = nn.Parameter(torch.randn(6, 32, generator=g).bfloat16())
        self.bias = nn.Parameter(torch.randn(6, generator=g).bfloat16()) if biased else None
        self.wide = wide

    def forward(self, x: Tensor) -> Tensor:
        if self.wide:
            return nn.functional.linear(x.float(), self.weight.float(), self.bias and self.bias.float())
        return (
            nn.functional.linear(x, self.weight)
            if self.bias is None
            else nn.functional.linear(x, self.weight, self.bias)
        )


@pytest.mark.parametrize(("wide", "biased"), [(False, False), (False, True), (True, False)])
def test_routers_use_packed_weights(
    lib: ctypes.CDLL, wide: bool, biased: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    router = Router(wide, biased)
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(2)).bfloat16()
    expected, weight = router(x), router.weight.detach().clone()
    assert fit_trunk(lib, router, FitNotes()) == 6 * 32 * 2
    assert torch.equal(router.weight, weight)
    got = router(x)
    assert type(got) is Tensor
    torch.testing.assert_close(got, expected, rtol=2**-7, atol=1e-4)
    called = []
    monkeypatch.setattr("elastic_moe.model.fitting.small_ops.linear", lambda *args: called.append(args))
    router(x)
    assert len(called) == (0 if wide else 1)


class LinearRouter(nn.Linear):
    """As PhiMoE's, which chooses in another way than others do."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).softmax(-1)


def test_a_router_that_is_a_linear_layer_uses_packed_weights(lib: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> None:
    router = LinearRouter(32, 6, bias=False, dtype=torch.bfloat16)
    plain = nn.Linear(32, 6, bias=False, dtype=torch.bfloat16)
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(2)).bfloat16()
    expected = router(x)
    # a layer that is nothing else is left to pack_linears
    assert fit_trunk(lib, nn.ModuleList([router, plain]), FitNotes()) == 6 * 32 * 2
    torch.testing.assert_close(router(x), expected, rtol=2**-7, atol=1e-4)
    called = []
    monkeypatch.setattr(
        "elastic_moe.model.fitting.small_ops.linear", lambda *args: called.append(args) or torch.zeros(5, 6)
    )
    router(x)
    assert len(called) == 1


class Choice(nn.Module):
    """Scores experts and chooses the best few; `style` says how."""

    def __init__(self, style: str, experts: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(experts, 64, generator=torch.Generator().manual_seed(1)).bfloat16())
        self.style = style

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = nn.functional.linear(x.reshape(-1, 64), self.weight)
        scores = logits.float().sigmoid() if self.style == "sigmoid" else logits.float().softmax(-1)
        best, index = scores.topk(4)
        if self.style == "scaled":
            best = 2.5 * best
        if self.style in ("normalised", "rounded"):
            best = best / best.sum(-1, keepdim=True)
        return logits, best.bfloat16() if self.style == "rounded" else best, index


@pytest.mark.parametrize("experts", [8, 37, 128])
@pytest.mark.parametrize("style", ["plain", "normalised", "rounded"])
def test_choices_are_one_call(lib: ctypes.CDLL, style: str, experts: int) -> None:
    router = Choice(style, experts)
    x = torch.randn(2, 50, 64, generator=torch.Generator().manual_seed(2)).bfloat16() / 8
    logits, scores, index = router(x)
    fit_trunk(lib, router, FitNotes())
    assert "forward" in vars(router)
    got = router(x)
    assert torch.equal(got[0].gather(1, got[2]), got[0].gather(1, index))
    torch.testing.assert_close(got[0], logits, rtol=2**-7, atol=1e-4)
    torch.testing.assert_close(got[1], scores, rtol=2**-6, atol=1e-6)
    alone = router(x[1, 7:8])
    assert all(torch.equal(one[0], many[57]) for one, many in zip(alone, got, strict=True))


def test_of_equal_experts_the_first_is_chosen(lib: ctypes.CDLL) -> None:
    router = Choice("plain", 8)
    fit_trunk(lib, router, FitNotes())
    assert router(torch.zeros(1, 64, dtype=torch.bfloat16))[2].tolist() == [[0, 1, 2, 3]]


@pytest.mark.parametrize("style", ["sigmoid", "scaled"])
def test_a_scale_is_not_guessed(lib: ctypes.CDLL, style: str) -> None:
    router = Choice(style, 8)
    fit_trunk(lib, router, FitNotes())
    # a scale that is none of the module's numbers is not guessed
    assert isinstance(vars(router).get("forward"), ScoredRouter) == (style == "sigmoid")


def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
    def turned(x: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        return torch.cat((-second, first), -1)

    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    return q * cos + turned(q) * sin, k * cos + turned(k) * sin


def pairs(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Another rotary embedding: it rotates the even against the odd numbers of a head."""

    def turned(x: Tensor) -> Tensor:
        return torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)

    return q * cos[:, None] + turned(q) * sin[:, None], k * cos[:, None] + turned(k) * sin[:, None]


def fitted(lib: ctypes.CDLL, function: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The rotary function of a modelling file after fitting."""
    file: Any = ModuleType("some_modelling_file")
    file.apply_rotary_pos_emb = function
    monkeypatch.setitem(__import__("sys").modules, file.__name__, file)
    fit_trunk(lib, type("Model", (nn.Module,), {"__module__": file.__name__})(), FitNotes())
    return file.apply_rotary_pos_emb


@pytest.mark.parametrize("size", [6, 32, 64, 80])
def test_rotary_embedding_gives_the_same_bits(lib: ctypes.CDLL, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    g = torch.Generator().manual_seed(1)
    q, k = (torch.randn(1, 5, n, size, generator=g).bfloat16().transpose(1, 2) for n in (6, 2))
    cos, sin = (torch.randn(1, 5, size, generator=g).bfloat16() for _ in range(2))
    fit = fitted(lib, rotary, monkeypatch)
    assert fit is not rotary
    for got, expected in zip(fit(q, k, cos, sin), rotary(q, k, cos, sin), strict=True):
        assert torch.equal(got, expected)
    # other inputs are passed to the original function
    for args in ((q.float(), k.float(), cos, sin), (q[..., :4], k[..., :4], cos[..., :4], sin[..., :4])):
        for got, expected in zip(fit(*args), rotary(*args), strict=True):
            assert torch.equal(got, expected)


@pytest.mark.parametrize("size", [6, 32, 40])
def test_a_rotary_embedding_of_pairs_gives_the_same_bits(
    lib: ctypes.CDLL, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = modeling_deepseek_v3.apply_rotary_pos_emb_interleave
    theirs = getattr(theirs, "emoe_original", theirs)
    file: Any = ModuleType("some_modelling_file")
    file.apply_rotary_pos_emb_interleave = theirs
    monkeypatch.setitem(__import__("sys").modules, file.__name__, file)
    fit_trunk(lib, type("Model", (nn.Module,), {"__module__": file.__name__})(), FitNotes())
    assert file.apply_rotary_pos_emb_interleave is not theirs
    g = torch.Generator().manual_seed(1)
    q, k = (torch.randn(1, 5, n, size + 8, generator=g).bfloat16().transpose(1, 2)[..., 8:] for n in (6, 1))
    cos, sin = (torch.randn(1, 5, size, generator=g).bfloat16() for _ in range(2))
    for got, expected in zip(file.apply_rotary_pos_emb_interleave(q, k, cos, sin), theirs(q, k, cos, sin), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("size", [6, 32, 80])
def test_a_rotary_embedding_of_one_tensor_gives_the_same_bits(
    lib: ctypes.CDLL, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = getattr(modeling_gemma4.apply_rotary_pos_emb, "emoe_original", modeling_gemma4.apply_rotary_pos_emb)
    fit = fitted(lib, theirs, monkeypatch)
    assert fit is not theirs
    g = torch.Generator().manual_seed(1)
    x, cos, sin = (
        torch.randn(shape, generator=g).bfloat16() for shape in ((1, 5, 6, size), (1, 5, size), (1, 5, size))
    )
    assert torch.equal(fit(x, cos, sin, unsqueeze_dim=2), theirs(x, cos, sin, unsqueeze_dim=2))
    assert torch.equal(fit(x.transpose(1, 2), cos, sin), theirs(x.transpose(1, 2), cos, sin))
    assert torch.equal(fit(x.float(), cos, sin, unsqueeze_dim=2), theirs(x.float(), cos, sin, unsqueeze_dim=2))


def test_another_rotary_embedding_is_left_alone(lib: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> None:
    assert fitted(lib, pairs, monkeypatch) is pairs
