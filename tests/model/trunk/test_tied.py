"""A matrix that embedding and output layer share is packed once, and both compute what they did."""

from __future__ import annotations

import ctypes

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elastic_moe.cluster.expert_forms import ExpertForm
from elastic_moe.cluster.fit import CodePath, FitNotes
from elastic_moe.model.int8 import quantize
from elastic_moe.model.trunk.linear import PackedLinear
from elastic_moe.model.trunk.tied import pack_tied
from tests.model.native.forms import in_8_bits


class Scaled(nn.Embedding):
    """As Gemma's."""

    def forward(self, input_ids: Tensor) -> Tensor:
        return super().forward(input_ids) * 3


class Model(nn.Module):
    def __init__(self, embedding: type[nn.Embedding], rows: int, **settings: float) -> None:
        super().__init__()
        self.embed = embedding(rows, 32, **settings)
        self.head = nn.Linear(32, rows, bias=False)
        self.head.weight = self.embed.weight
        self.bfloat16()


@pytest.mark.parametrize("embedding", [nn.Embedding, Scaled])
@pytest.mark.parametrize("rows", [64, 150])
def test_both_compute_what_they_did(lib: ctypes.CDLL, embedding: type[nn.Embedding], rows: int) -> None:
    model = Model(embedding, rows).requires_grad_(False)
    ids, x = torch.tensor([[0, 63, rows - 1, 5]]), torch.randn(3, 32).bfloat16()
    looked_up, product = model.embed(ids), model.head(x)
    plain = model.embed.weight.clone()
    notes = FitNotes()
    pack_tied(model, notes)
    [row] = notes.rows()
    assert row.path is CodePath.NATIVE
    assert torch.equal(model.embed(ids), looked_up)
    torch.testing.assert_close(model.head(x), product, rtol=2**-7, atol=2**-7)
    # whoever multiplies by the embedding's weight gets the same, and it is still told apart by its shape
    assert torch.equal(F.linear(x, model.embed.weight), model.head(x))
    assert model.embed.weight.shape == plain.shape
    assert model.embed.weight.dtype == torch.bfloat16


@pytest.mark.parametrize(("embedding", "factor"), [(nn.Embedding, 1), (Scaled, 3)])
def test_in_8_bits_both_have_the_rounded_matrix(lib: ctypes.CDLL, embedding: type[nn.Embedding], factor: int) -> None:
    torch.manual_seed(0)
    model, x = Model(embedding, 150).requires_grad_(False), torch.randn(3, 32).bfloat16()
    values, scales = quantize(model.embed.weight)
    rounded = values.float() * scales
    notes = FitNotes()
    left_bytes = pack_tied(model, notes, ExpertForm.INT8)
    # a subclass keeps a parameter of the matrix's size, since it computes with it
    # whether or not a parameter of 16 bits still stands for the matrix
    assert sum(p.nbytes for p in model.parameters()) + left_bytes == model.head.packed.nbytes
    [row] = notes.rows()
    assert (row.modules, row.path) == ("Linear in int8", CodePath.NATIVE)
    torch.testing.assert_close(model.embed(torch.arange(150)), (rounded * factor).bfloat16(), rtol=2**-7, atol=2**-9)
    torch.testing.assert_close(
        model.head(x), (in_8_bits(x, ExpertForm.INT8).float() @ rounded.T).bfloat16(), rtol=2**-7, atol=2**-9
    )


def test_what_others_use_too_stays(lib: ctypes.CDLL) -> None:
    third, normed = Model(nn.Embedding, 64), Model(nn.Embedding, 64, max_norm=1.0)
    third.other = nn.Linear(32, 64, bias=False)
    third.other.weight = third.embed.weight
    apart = Model(nn.Embedding, 64)
    apart.head.weight = nn.Parameter(torch.zeros(64, 32).bfloat16())
    for model in (third, normed, apart):
        pack_tied(model, FitNotes())
        assert not any(isinstance(module, PackedLinear) for module in model.modules())
