"""INT4 and INT8 as GPTQ's tools pack them.

Numbers [K, N] lie in words [K/8, N] along the inputs (of 8 bits: K/4), the first in the lowest bits. Zero points lie in
words [G, N/8] along the outputs; the first version of the format stores each less 1. With act-order, `g_idx` [K] says
which group an input belongs to. A weight is (number - zero point) x scale.
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
    VALUES,
    ZEROS,
    BadPart,
    Codes,
    Header,
    Naming,
    expect,
    finite,
    in_range,
)
from elastic_moe.model.formats.small_floats import WORD_BITS, in_nibbles, integers
from elastic_moe.model.int4 import FORMS, by_fine_groups, divides


@dataclass(frozen=True, slots=True, kw_only=True)
class Gptq:
    """See the module."""

    bits: int
    group: int | None
    """Inputs with one scale; None: all of an output."""
    act_order: bool
    less_one: bool
    """Whether zero points are stored less 1."""

    @property
    def label(self) -> str:
        return f"GPTQ INT{self.bits}"

    @property
    def namings(self) -> tuple[Naming, ...]:
        others = {SCALES: (".scales",), ZEROS: (".qzeros",), ORDER: (".g_idx",)}
        optional = frozenset() if self.act_order else frozenset({ORDER})
        return (Naming(values=".qweight", makes=".weight", others=others, optional=optional),)

    def holds(self, dtype: torch.dtype) -> bool:
        return dtype == torch.int32

    def shape(self, parts: Mapping[str, Header]) -> tuple[int, ...]:
        values, each = parts[VALUES], WORD_BITS // self.bits
        if len(values.shape) != 2:
            raise BadPart(VALUES, f"has {values}, expected a matrix")
        words, outputs = values.shape
        depth = words * each
        group = depth if self.group is None else self.group
        if depth % group or outputs % each:
            raise BadPart(VALUES, f"has {values}: group_size {group} does not divide its {depth} inputs")
        expect(SCALES, parts[SCALES], (depth // group, outputs), f"for group_size {group}")
        expect(ZEROS, parts[ZEROS], (depth // group, outputs // each), f"for group_size {group} and {self.bits} bits")
        if ORDER in parts:
            expect(ORDER, parts[ORDER], (depth,), "one for each input")
        return (outputs, depth)

    def unpack(self, parts: Mapping[str, Tensor]) -> Tensor:
        scales_GN = finite(SCALES, parts[SCALES])
        zeros_GN = self._zeros(parts).float()
        numbers_NK = integers(parts[VALUES].T, self.bits).flatten(-2).float()
        depth, groups = numbers_NK.shape[1], len(scales_GN)
        index_K = parts[ORDER] if ORDER in parts else torch.arange(depth) // (depth // groups)
        index_K = in_range(ORDER, index_K, 0, groups - 1).long()
        return numbers_NK.sub_(zeros_GN.T[:, index_K]).mul_(scales_GN.T[:, index_K])

    def _zeros(self, parts: Mapping[str, Tensor]) -> Tensor:
        """[G, N]"""
        zeros_GN = integers(parts[ZEROS], self.bits).flatten(-2).int()
        return in_range(ZEROS, zeros_GN + 1, 0, 2**self.bits - 1) if self.less_one else zeros_GN

    def kept(self, parts: Mapping[str, Header]) -> ExpertForm:
        if self.bits != 4 or self.act_order or not divides(32, self.group):
            return ExpertForm.PLAIN
        return FORMS.get(parts[SCALES].dtype, ExpertForm.PLAIN)

    def codes(self, parts: Mapping[str, Tensor]) -> Codes:
        finite(SCALES, parts[SCALES])
        numbers, scales = integers(parts[VALUES].T, self.bits).flatten(-2), parts[SCALES].T
        depth = numbers.shape[1]
        if ORDER in parts and not torch.equal(parts[ORDER].long(), torch.arange(depth) // (self.group or depth)):
            raise BadPart(ORDER, "has inputs out of order, but desc_act of quantization_config says that none is")
        return Codes(
            values=in_nibbles(numbers),
            scales=by_fine_groups(scales, self.group, depth),
            zeros=by_fine_groups(self._zeros(parts).T.to(torch.uint8), self.group, depth),
        )
