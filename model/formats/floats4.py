"""Weights of 4 bits in E2M1, two in a byte: MXFP4 with a power of 2 for every 32, NVFP4 with an FP8 scale for every 16.

NVFP4 has a second scale for the whole tensor. NVIDIA's tools multiply by it, and compressed-tensors divides by it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from elastic_moe.cluster.expert_forms import ExpertForm
from elastic_moe.model.formats.interface import (
    SCALES,
    SECOND_SCALES,
    VALUES,
    BadPart,
    Codes,
    Header,
    Naming,
    expect,
    finite,
    multiply_groups,
)
from elastic_moe.model.formats.small_floats import FLOAT8, POWERS, fp4_values, powers_of_two
from elastic_moe.model.int4 import NVFP4_GROUP

_MX_GROUP = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Mxfp4:
    """A matrix [N, K]: bytes [N, K/2], scales [N, K/32]."""

    label: str = "MXFP4"
    namings: tuple[Naming, ...] = (
        Naming(values=".weight_packed", makes=".weight", others={SCALES: (".weight_scale",)}),
        Naming(values="", makes="", others={SCALES: ("_scale_inv", "_scale")}),
        Naming(values=".weight", makes=".weight", others={SCALES: (".scale",)}),
    )

    def holds(self, dtype: torch.dtype) -> bool:
        return dtype in (torch.uint8, torch.int8)

    def shape(self, parts: Mapping[str, Header]) -> tuple[int, ...]:
        values, scales = parts[VALUES], parts[SCALES]
        *lead, half = values.shape
        if not lead or half * 2 % _MX_GROUP:
            raise BadPart(VALUES, f"has {values}: groups of {_MX_GROUP} do not divide its inputs")
        if scales.dtype not in POWERS:
            raise BadPart(SCALES, f"has {scales}, expected E8M0")
        expect(SCALES, scales, (*lead, half * 2 // _MX_GROUP), f"one for every {_MX_GROUP} inputs of {values.shape}")
        return (*lead, half * 2)

    def unpack(self, parts: Mapping[str, Tensor]) -> Tensor:
        return multiply_groups(fp4_values(parts[VALUES]), powers_of_two(SCALES, parts[SCALES]), _MX_GROUP)

    def kept(self, parts: Mapping[str, Header]) -> ExpertForm:
        return ExpertForm.MXFP4

    def codes(self, parts: Mapping[str, Tensor]) -> Codes:
        return Codes(values=parts[VALUES].view(torch.uint8), scales=_half_powers(parts[SCALES]))


@dataclass(frozen=True, slots=True, kw_only=True)
class BlocksMxfp4:
    """gpt-oss: all experts of a layer in one tensor, bytes [E, N, G, 16] and scales [E, N, G]. It makes [E, K, N]."""

    label: str = "MXFP4"
    namings: tuple[Naming, ...] = (Naming(values="_blocks", makes="", others={SCALES: ("_scales",)}),)

    def holds(self, dtype: torch.dtype) -> bool:
        return dtype == torch.uint8

    def shape(self, parts: Mapping[str, Header]) -> tuple[int, ...]:
        values, scales = parts[VALUES], parts[SCALES]
        if len(values.shape) < 3 or values.shape[-1] * 2 != _MX_GROUP:
            raise BadPart(VALUES, f"has {values}, expected blocks of {_MX_GROUP // 2} bytes")
        if scales.dtype not in POWERS:
            raise BadPart(SCALES, f"has {scales}, expected E8M0")
        expect(SCALES, scales, values.shape[:-1], f"one for every block of {list(values.shape)}")
        *lead, rows, groups, _ = values.shape
        return (*lead, groups * _MX_GROUP, rows)

    def unpack(self, parts: Mapping[str, Tensor]) -> Tensor:
        weight = fp4_values(parts[VALUES]).flatten(-2)
        return multiply_groups(weight, powers_of_two(SCALES, parts[SCALES]), _MX_GROUP).transpose(-1, -2)

    def kept(self, parts: Mapping[str, Header]) -> ExpertForm:
        return ExpertForm.MXFP4

    def codes(self, parts: Mapping[str, Tensor]) -> Codes:
        """The codes of a matrix [N, K], which is not transposed."""
        return Codes(values=parts[VALUES].flatten(-2), scales=_half_powers(parts[SCALES]))


def _half_powers(scales: Tensor) -> Tensor:
    """Half of each scale in bfloat16: codes are kept as twice the values of E2M1, which are whole numbers."""
    return (powers_of_two(SCALES, scales) / 2).bfloat16()


@dataclass(frozen=True, slots=True, kw_only=True)
class Nvfp4:
    """A matrix [N, K]: bytes [N, K/2], scales [N, K/16] in E4M3, and a scale of the tensor in float32."""

    divides: bool
    """Whether the weight is divided by the tensor's scale (compressed-tensors), or multiplied by it (NVIDIA)."""

    @property
    def label(self) -> str:
        return "NVFP4"

    @property
    def namings(self) -> tuple[Naming, ...]:
        second = (".weight_global_scale",) if self.divides else (".weight_scale_2",)
        others = {SCALES: (".weight_scale",), SECOND_SCALES: second}
        return (Naming(values=".weight_packed" if self.divides else ".weight", makes=".weight", others=others),)

    def holds(self, dtype: torch.dtype) -> bool:
        return dtype == torch.uint8

    def shape(self, parts: Mapping[str, Header]) -> tuple[int, ...]:
        values, scales, second = parts[VALUES], parts[SCALES], parts[SECOND_SCALES]
        *lead, half = values.shape
        if not lead or half * 2 % NVFP4_GROUP:
            raise BadPart(VALUES, f"has {values}: groups of {NVFP4_GROUP} do not divide its inputs")
        if scales.dtype != FLOAT8[0]:
            raise BadPart(SCALES, f"has {scales}, expected float8_e4m3fn")
        expect(
            SCALES,
            scales,
            (*lead, half * 2 // NVFP4_GROUP),
            f"one for every {NVFP4_GROUP} inputs of {list(values.shape)}",
        )
        if second.shape not in ((), (1,)):
            raise BadPart(SECOND_SCALES, f"has {second}, expected one number")
        return (*lead, half * 2)

    def unpack(self, parts: Mapping[str, Tensor]) -> Tensor:
        scales = finite(SCALES, parts[SCALES]) * self._second(parts)
        return multiply_groups(fp4_values(parts[VALUES]), scales, NVFP4_GROUP)

    def kept(self, parts: Mapping[str, Header]) -> ExpertForm:
        return ExpertForm.NVFP4 if len(parts[VALUES].shape) == 2 else ExpertForm.PLAIN

    def codes(self, parts: Mapping[str, Tensor]) -> Codes:
        finite(SCALES, parts[SCALES])
        each = self._second(parts).reshape(1, 1).repeat(len(parts[VALUES]), 1)
        return Codes(values=parts[VALUES], scales=parts[SCALES].view(torch.uint8), each=each)

    def _second(self, parts: Mapping[str, Tensor]) -> Tensor:
        """What weights are multiplied by."""
        second = finite(SECOND_SCALES, parts[SECOND_SCALES])
        if not self.divides:
            return second
        if not bool(second.all()):
            raise BadPart(SECOND_SCALES, "is 0, and the weight is divided by it")
        return 1 / second
