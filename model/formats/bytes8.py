"""Weights of 8 bits with scales: FP8 by blocks, by channel and by tensor, MXFP8, and INT8.

A weight is its stored value times its scale. The scales of blocks lie in a matrix; the last block of a row or a column
is shorter where the block's size does not divide the weight's: (576, 512) in blocks of 128 x 128 has scales (5, 4).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from elastic_moe.cluster.expert_forms import ExpertForm
from elastic_moe.model.formats.interface import (
    SCALES,
    VALUES,
    BadPart,
    Codes,
    Header,
    Naming,
    finite,
    multiply_groups,
)
from elastic_moe.model.formats.small_floats import FLOAT8, POWERS, exponents, powers_of_two
from elastic_moe.model.int4 import GROUP as FINE
from elastic_moe.model.int4 import by_fine_groups, divides
from elastic_moe.model.int8 import GROUP

_ENDINGS = ("_scale_inv", "_scale")


@dataclass(frozen=True, slots=True, kw_only=True)
class Bytes8:
    """See the module."""

    block: tuple[int, int] | None
    """Outputs and inputs with one scale; None: each tensor or each output has one."""
    field: str
    """The field of the configuration that says so."""
    integer: bool = False

    @property
    def label(self) -> str:
        kind = "INT8" if self.integer else "FP8"
        if self.block is None:
            return f"{kind} by channel or tensor"
        return "MXFP8" if self.block == (1, 32) else f"{kind} in blocks of {self.block[0]} x {self.block[1]}"

    @property
    def namings(self) -> tuple[Naming, ...]:
        return (
            Naming(values="", makes="", others={SCALES: _ENDINGS}),
            Naming(values=".weight", makes=".weight", others={SCALES: (".scale",)}),
        )

    def holds(self, dtype: torch.dtype) -> bool:
        return dtype == torch.int8 if self.integer else dtype in FLOAT8

    def shape(self, parts: Mapping[str, Header]) -> tuple[int, ...]:
        values, scales = parts[VALUES], parts[SCALES]
        if scales.dtype not in POWERS and (not scales.dtype.is_floating_point or scales.dtype in FLOAT8):
            raise BadPart(SCALES, f"has {scales}, expected scales in 16 or 32 bits or in E8M0")
        if len(values.shape) < 2:
            raise BadPart(VALUES, f"has {values}, expected a matrix")
        *lead, rows, columns = values.shape
        if self.block is not None:
            wanted = [(*lead, -(-rows // self.block[0]), -(-columns // self.block[1]))]
            what = f"blocks of {self.block[0]} x {self.block[1]}, as {self.field} says"
        else:
            wanted = [(*lead, rows, 1), (*lead, rows), (*lead, 1, 1), (*lead, 1), tuple(lead), (1,), ()]
            what = f"a scale for each tensor or output, as {self.field} says"
        if scales.shape not in wanted:
            raise BadPart(
                SCALES, f"has {scales}, expected {list(wanted[0])} for a weight {list(values.shape)} with {what}"
            )
        return values.shape

    def unpack(self, parts: Mapping[str, Tensor]) -> Tensor:
        self._check(parts[VALUES])
        weight, scales = parts[VALUES].float(), self._scales(parts[SCALES])
        rows = weight.shape[-2]
        if self.block is not None:
            return multiply_groups(weight, scales.repeat_interleave(self.block[0], -2)[..., :rows, :], self.block[1])
        if scales.shape == weight.shape[:-1]:
            return weight.mul_(scales[..., None])
        while 0 < scales.dim() < weight.dim():
            scales = scales[..., None]
        return weight.mul_(scales)

    def kept(self, parts: Mapping[str, Header]) -> ExpertForm:
        if len(parts[VALUES].shape) != 2:
            return ExpertForm.PLAIN
        inputs = None if self.block is None else self.block[1]
        whole = divides(GROUP, inputs)
        if self.integer:
            return ExpertForm.INT8 if whole else ExpertForm.PLAIN
        if parts[VALUES].dtype != FLOAT8[0]:
            return ExpertForm.PLAIN
        if whole:
            return ExpertForm.FP8
        return ExpertForm.MXFP8 if divides(FINE, inputs) and parts[SCALES].dtype in POWERS else ExpertForm.PLAIN

    def codes(self, parts: Mapping[str, Tensor]) -> Codes:
        values = parts[VALUES]
        rows, columns = values.shape
        self._check(values)
        inputs = None if self.block is None else self.block[1]
        fine = GROUP if divides(GROUP, inputs) else FINE
        scales = self._scales(parts[SCALES]) if fine == GROUP else exponents(SCALES, parts[SCALES])
        if self.block is None:
            scales = scales.reshape(-1, 1).expand(rows, -1)
        else:
            scales = scales.repeat_interleave(self.block[0], 0)[:rows]
        return Codes(values=values.view(torch.int8), scales=by_fine_groups(scales, inputs, columns, fine))

    def _check(self, values: Tensor) -> None:
        if not self.integer and bool(values.isnan().any()):
            raise BadPart(VALUES, "has a weight that is not a number")

    def _scales(self, scales: Tensor) -> Tensor:
        """The scales as float32."""
        return powers_of_two(SCALES, scales) if scales.dtype in POWERS else finite(SCALES, scales)
