"""INT4 and INT8 in groups, as compressed-tensors packs them (`pack-quantized`).

Of a row, the numbers plus 2^(bits - 1) lie in words of 32 bits, the first number in the lowest bits; the last word is
filled up. Zero points lie in words in the same way, but along the outputs. A weight is (number - zero point) x scale.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from elastic_moe.cluster.expert_forms import ExpertForm
from elastic_moe.model.formats.interface import (
    ORDER,
    SCALES,
    SHAPE,
    VALUES,
    ZEROS,
    BadPart,
    Codes,
    Header,
    Naming,
    expect,
    finite,
    in_range,
    multiply_groups,
)
from elastic_moe.model.formats.small_floats import WORD_BITS, in_nibbles, integers
from elastic_moe.model.int4 import FORMS, by_fine_groups, divides
from elastic_moe.model.int8 import GROUP


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedIntegers:
    """See the module."""

    bits: int
    group: int | None
    """Inputs with one scale; None: all of an output."""
    symmetric: bool
    field: str
    """The field of the configuration that says so."""

    @property
    def label(self) -> str:
        return f"INT{self.bits} {'by channel' if self.group is None else f'in groups of {self.group}'}"

    @property
    def namings(self) -> tuple[Naming, ...]:
        others = {
            SCALES: (".weight_scale",),
            ZEROS: (".weight_zero_point",),
            ORDER: (".weight_g_idx",),
            SHAPE: (".weight_shape",),
        }
        optional = frozenset({ORDER, SHAPE}) | (frozenset({ZEROS}) if self.symmetric else frozenset())
        return (Naming(values=".weight_packed", makes=".weight", others=others, optional=optional),)

    def holds(self, dtype: torch.dtype) -> bool:
        return dtype == torch.int32

    def shape(self, parts: Mapping[str, Header]) -> tuple[int, ...]:
        values, scales = parts[VALUES], parts[SCALES]
        if len(values.shape) != 2:
            raise BadPart(VALUES, f"has {values}, expected a matrix")
        rows, words = values.shape
        each = WORD_BITS // self.bits
        groups, columns = 1, words * each
        if self.group is not None:
            # the last word may be filled up, but groups are whole
            groups = columns // self.group
            columns = groups * self.group
            if -(-columns // each) != words:
                raise BadPart(
                    VALUES, f"has {values}: groups of {self.group}, as {self.field} says, do not divide its inputs"
                )
        what = f"{groups} groups for each of {rows} outputs, as {self.field} says"
        expect(SCALES, scales, (rows, groups), what)
        if ZEROS in parts:
            zeros = parts[ZEROS]
            packed = zeros.dtype == torch.int32
            expect(ZEROS, zeros, (-(-rows // each) if packed else rows, groups), what)
        if ORDER in parts:
            expect(ORDER, parts[ORDER], (columns,), "one for each input")
        return (rows, columns)

    def unpack(self, parts: Mapping[str, Tensor]) -> Tensor:
        scales = finite(SCALES, parts[SCALES])
        rows, groups = scales.shape
        values = self._numbers(parts)
        columns = values.shape[1]
        weight = values.float().sub_(2 ** (self.bits - 1))
        zeros = self._zeros(parts, rows) if ZEROS in parts else None
        order = parts.get(ORDER)
        if order is not None and bool((order >= 0).all()):
            index = in_range(ORDER, order, 0, groups - 1).long()
            if zeros is not None:
                weight -= zeros[:, index]
            return weight.mul_(scales[:, index])
        size = self.group or columns
        if zeros is not None:
            weight -= zeros.repeat_interleave(size, 1)
        return multiply_groups(weight, scales, size)

    def _numbers(self, parts: Mapping[str, Tensor]) -> Tensor:
        """[N, K] from 0 to 2^bits - 1."""
        values = integers(parts[VALUES], self.bits).flatten(-2)
        rows, groups = parts[SCALES].shape
        columns = values.shape[1] if self.group is None else groups * self.group
        if SHAPE in parts and parts[SHAPE].tolist() != [rows, columns]:
            raise BadPart(SHAPE, f"says {parts[SHAPE].tolist()}, but the numbers make {[rows, columns]}")
        return values[:, :columns]

    def _zeros(self, parts: Mapping[str, Tensor], rows: int) -> Tensor:
        zeros, offset = parts[ZEROS], 2 ** (self.bits - 1)
        if zeros.dtype == torch.int32:
            numbers: Tensor = integers(zeros.T, self.bits).flatten(-2)[:, :rows].T.float() - offset
            return numbers
        return in_range(ZEROS, zeros, -offset, offset - 1).float()

    def kept(self, parts: Mapping[str, Header]) -> ExpertForm:
        if ORDER in parts:
            return ExpertForm.PLAIN
        if self.bits == 8:
            plain = self.symmetric and divides(GROUP, self.group)
            return ExpertForm.INT8 if plain else ExpertForm.PLAIN
        return FORMS.get(parts[SCALES].dtype, ExpertForm.PLAIN) if divides(32, self.group) else ExpertForm.PLAIN

    def codes(self, parts: Mapping[str, Tensor]) -> Codes:
        finite(SCALES, parts[SCALES])
        numbers, scales = self._numbers(parts), parts[SCALES]
        if self.bits == 8:
            values = (numbers.to(torch.int16) - 128).to(torch.int8)
            return Codes(values=values, scales=by_fine_groups(scales.float(), self.group, values.shape[1], GROUP))
        zeros = self._zeros(parts, len(scales)) + 8 if ZEROS in parts else torch.full(scales.shape, 8)
        return Codes(
            values=in_nibbles(numbers),
            scales=by_fine_groups(scales, self.group, numbers.shape[1]),
            zeros=by_fine_groups(zeros.to(torch.uint8), self.group, numbers.shape[1]),
        )
