"""What the numbers of 4 and 8 bits mean, by the OCP specification of microscaling formats (MX v1.0)."""

from __future__ import annotations

import torch
from torch import Tensor

from elastic_moe.model.formats.interface import BadPart

FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
POWERS = (torch.uint8, torch.float8_e8m0fnu)
"""Dtypes of scales that are powers of 2: E8M0, also called ue8m0, as bytes or under its own name."""

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""The value of each code of FP4."""
_E8M0_BIAS = 127
_E8M0_NAN = 255

WORD_BITS = 32
"""Bits of a word that `integers` reads."""


def exponents(role: str, scales: Tensor) -> Tensor:
    """The bytes of E8M0 scales. Raises BadPart if one is not a number."""
    stored = scales.view(torch.uint8)
    if bool((stored == _E8M0_NAN).any()):
        raise BadPart(role, "has a scale that is not a number")
    return stored


def powers_of_two(role: str, scales: Tensor) -> Tensor:
    """E8M0 scales in float32. Raises BadPart if one is not a number."""
    return torch.exp2((exponents(role, scales).int() - _E8M0_BIAS).float())


def nibbles(packed: Tensor) -> Tensor:
    """Codes [..., 2 n] from bytes [..., n]: the low half of a byte comes first."""
    raw = packed.view(torch.uint8)
    return torch.stack([raw & 15, raw >> 4], dim=-1).flatten(-2)


def in_nibbles(codes: Tensor) -> Tensor:
    """Bytes [..., n] from codes [..., 2 n], the opposite of `nibbles`."""
    packed: Tensor = codes[..., 0::2] | codes[..., 1::2] << 4
    return packed


def fp4_values(packed: Tensor) -> Tensor:
    """FP4 values [..., 2 n] in float32 from bytes [..., n]."""
    return torch.tensor(E2M1)[nibbles(packed).int()]


def integers(words: Tensor, bits: int) -> Tensor:
    """Unsigned numbers [..., n, 32 / bits] from words of 32 bits [..., n]: the lowest bits come first. uint8."""
    shifts = torch.arange(0, WORD_BITS, bits, dtype=torch.int32)
    numbers: Tensor = (words[..., None] >> shifts) & (2**bits - 1)
    return numbers.to(torch.uint8)
