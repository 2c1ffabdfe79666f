"""The interface to one way of packing a weight into several stored tensors.

Legend: N outputs, K inputs (a weight is [N, K], as in nn.Linear), G groups of inputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from elastic_moe.cluster.expert_forms import ExpertForm

VALUES = "values"
SCALES = "scales"
SECOND_SCALES = "second scales"
ZEROS = "zero points"
ORDER = "group of each input"
SHAPE = "shape"
"""What the tensors of a packed weight are for: their roles."""


@dataclass(frozen=True, slots=True)
class Header:
    """What a file's header says about a tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"the shape {list(self.shape)} in {str(self.dtype).removeprefix('torch.')}"


class BadPart(Exception):
    """A tensor of a packed weight is not as its format has it. `role` says which; the message continues its name."""

    def __init__(self, role: str, text: str) -> None:
        super().__init__(text)
        self.role = role


@dataclass(frozen=True, slots=True, kw_only=True)
class Naming:
    """How the tensors of one weight are named: by endings to one base."""

    values: str
    makes: str
    """The ending of the weight that they make."""
    others: Mapping[str, tuple[str, ...]]
    """Role -> endings that it may have, the usual one first."""
    optional: frozenset[str] = field(default_factory=frozenset)

    def base(self, name: str) -> str | None:
        """The base of a tensor that may hold values; None if its name has another ending."""
        return name.removesuffix(self.values) if name.endswith(self.values) else None


class Format(Protocol):
    """One way of packing, with what the configuration says of it."""

    @property
    def label(self) -> str:
        """Its name in messages."""
        ...

    @property
    def namings(self) -> tuple[Naming, ...]: ...

    def holds(self, dtype: torch.dtype) -> bool:
        """Whether a tensor of this dtype can hold its values."""
        ...

    def shape(self, parts: Mapping[str, Header]) -> tuple[int, ...]:
        """The weight's shape. Raises BadPart if the tensors do not fit together or contradict the configuration."""
        ...

    def unpack(self, parts: Mapping[str, Tensor]) -> Tensor:
        """The weight in float32. `parts` have shapes that `shape` has taken. Raises BadPart for impossible values."""
        ...

    def kept(self, parts: Mapping[str, Header]) -> ExpertForm:
        """The form in which the weight can be kept without rounding it; PLAIN if there is none."""
        ...

    def codes(self, parts: Mapping[str, Tensor]) -> Codes:
        """The weight in the form that `kept` has said. Raises BadPart for impossible values."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Codes:
    """A weight [N, K] in a form that is computed; see model/int8.py and model/int4.py."""

    values: Tensor
    """int8 [N, K], or nibbles in uint8 [N, K/2] with the lower half of a byte first."""
    scales: Tensor
    """[N, G]"""
    zeros: Tensor | None = None
    """uint8 [N, G]"""
    each: Tensor | None = None
    """float32 [N, 1]: scales of outputs beside those of groups."""


def expect(role: str, header: Header, shape: tuple[int, ...], why: str) -> None:
    """Raise BadPart unless the header has this shape."""
    if header.shape != shape:
        raise BadPart(role, f"has {header}, expected the shape {list(shape)} ({why})")


def finite(role: str, scales: Tensor) -> Tensor:
    """The scales in float32. Raises BadPart if one is infinite or not a number."""
    scales = scales.float()
    if not bool(scales.isfinite().all()):
        raise BadPart(role, "has a scale that is infinite or not a number")
    return scales


def in_range(role: str, numbers: Tensor, least: int, most: int) -> Tensor:
    """The numbers. Raises BadPart if one is outside least .. most."""
    if numbers.numel():
        low, high = (int(number) for number in numbers.aminmax())
        if low < least or high > most:
            raise BadPart(role, f"has numbers from {low} to {high}, expected {least} to {most}")
    return numbers


def multiply_groups(weight: Tensor, scales: Tensor, group: int) -> Tensor:
    """Multiply `weight` [..., K] in place by `scales` [..., ceil(K / group)], one for each `group` inputs."""
    whole = weight.shape[-1] // group * group
    weight[..., :whole].view(*weight.shape[:-1], -1, group).mul_(scales[..., : whole // group, None])
    if whole < weight.shape[-1]:
        weight[..., whole:].mul_(scales[..., -1:])
    return weight
