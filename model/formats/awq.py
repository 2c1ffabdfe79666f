"""INT4 as AutoAWQ packs it (version GEMM).

Numbers [K, N] lie in words [K, N/8] along the outputs, in an order of their own: of eight outputs, those of even number
come first. Zero points [G, N/8] lie in the same way. A weight is (number - zero point) x scale.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from elastic_moe.cluster.expert_forms import ExpertForm
from elastic_moe.model.formats.interface import SCALES, VALUES, ZEROS, BadPart, Codes, Header, Naming, expect, finite
from elastic_moe.model.formats.small_floats import in_nibbles, integers
from elastic_moe.model.int4 import FORMS, by_fine_groups, divides

_EACH = 8
_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)
"""The place, from the lowest bits, of each of eight outputs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Awq:
    """See the module."""

    group: int | None
    """Inputs with one scale; None: all of an output."""
    zeros: bool
    """Whether there are zero points; otherwise each is 8."""

    @property
    def label(self) -> str:
        return "AWQ"

    @property
    def namings(self) -> tuple[Naming, ...]:
        others = {SCALES: (".scales",), ZEROS: (".qzeros",)}
        optional = frozenset() if self.zeros else frozenset({ZEROS})
        return (Naming(values=".qweight", makes=".weight", others=others, optional=optional),)

    def holds(self, dtype: torch.dtype) -> bool:
        return dtype == torch.int32

    def shape(self, parts: Mapping[str, Header]) -> tuple[int, ...]:
        values = parts[VALUES]
        if len(values.shape) != 2:
            raise BadPart(VALUES, f"has {values}, expected a matrix")
        depth, words = values.shape
        group = depth if self.group is None else self.group
        if depth % group:
            raise BadPart(VALUES, f"has {values}: group_size {group} does not divide its {depth} inputs")
        expect(SCALES, parts[SCALES], (depth // group, words * _EACH), f"for group_size {group}")
        if ZEROS in parts:
            expect(ZEROS, parts[ZEROS], (depth // group, words), f"for group_size {group}")
        return (words * _EACH, depth)

    def unpack(self, parts: Mapping[str, Tensor]) -> Tensor:
        scales_GN = finite(SCALES, parts[SCALES])
        numbers_KN = _outputs(parts[VALUES]).float()
        zeros_GN = _outputs(parts[ZEROS]).float() if self.zeros else torch.full_like(scales_GN, 8)
        weight_GIN = numbers_KN.view(len(scales_GN), -1, numbers_KN.shape[1])
        weight: Tensor = weight_GIN.sub_(zeros_GN[:, None]).mul_(scales_GN[:, None]).flatten(0, 1).T.contiguous()
        return weight

    def kept(self, parts: Mapping[str, Header]) -> ExpertForm:
        return FORMS.get(parts[SCALES].dtype, ExpertForm.PLAIN) if divides(32, self.group) else ExpertForm.PLAIN

    def codes(self, parts: Mapping[str, Tensor]) -> Codes:
        finite(SCALES, parts[SCALES])
        numbers, scales = _outputs(parts[VALUES]).T, parts[SCALES].T
        zeros = _outputs(parts[ZEROS]).T if self.zeros else torch.full_like(scales, 8, dtype=torch.uint8)
        return Codes(
            values=in_nibbles(numbers),
            scales=by_fine_groups(scales, self.group, numbers.shape[1]),
            zeros=by_fine_groups(zeros, self.group, numbers.shape[1]),
        )


def _outputs(words: Tensor) -> Tensor:
    return integers(words, 4)[..., list(_PLACES)].flatten(-2)
