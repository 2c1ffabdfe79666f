"""The two halves of vector.h compute the same: this machine's library, and one compiled for AVX2 alone."""

from __future__ import annotations

import ctypes
from importlib import import_module

import pytest
import torch

from elastic_moe.cluster.expert_forms import ExpertForm
from elastic_moe.model.native.experts import NativeExperts
from tests.model.native.test_experts import GATES, draw, expert, in_form, module, routing

library_module = import_module("elastic_moe.model.native.library")
"""Not the function of that name."""
SOURCES = ("experts.cpp", "four_bits.cpp", "linear.cpp")


@pytest.fixture(scope="module")
def avx2(lib: ctypes.CDLL, tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    target = tmp_path_factory.mktemp("avx2") / "native.so"
    with pytest.MonkeyPatch.context() as patch:
        flags = tuple(flag.replace("native", "haswell").replace("-O3", "-O1") for flag in library_module._FLAGS)
        patch.setattr(library_module, "_FLAGS", flags)
        library_module._compile("c++", [library_module._SOURCES / name for name in SOURCES], target)
    loaded = ctypes.CDLL(str(target))
    for name, signature in library_module._SIGNATURES.items():
        if hasattr(loaded, name):
            function = getattr(loaded, name)
            function.argtypes = [library_module._TYPES[kind] for kind in signature.partition(">")[0]]
    return loaded


@pytest.mark.parametrize("form", ExpertForm)
def test_experts_have_the_same_bits(lib: ctypes.CDLL, avx2: ctypes.CDLL, form: ExpertForm) -> None:
    """Sums of integers are exact. Sums of floats differ in their last bits: AVX-512 adds two products at once."""
    x, (index, weight) = draw(1, 90, 296), routing(2, 90, 2, [0, 1, 2], 3)
    index[30:, 0] = index[30:, 1] = -1
    index[60:, 0] = 1  # this expert has many rows, and the others few
    one, other = (NativeExperts(half, module(None, 3), GATES["silu"], form) for half in (lib, avx2))
    for e in range(3):
        one.put(e, in_form(lib, form, expert(e, 296, 168, biased=True, transposed=False), False)[0])
        other.put(e, one.get(e))
    outputs = [half.forward(x, index, weight).float() for half in (one, other)]
    if form in (ExpertForm.PLAIN, ExpertForm.FP8):
        assert (outputs[0] - outputs[1]).abs().max() <= 2**-6 * (outputs[0].abs().max() + 1)
    else:
        assert torch.equal(*outputs)
