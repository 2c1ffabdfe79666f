"""The packed matrices of a layer's experts, as kernels read them. It does without Triton.

Legend: S slots, N outputs, K inputs, G groups of inputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

Code = Literal["int8", "e4m3", "uint4", "e2m1", "nvfp4"]
"""What a code is. `e2m1` counts twice, `nvfp4` is E2M1 too and counts once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stack:
    """The matrices of one name in all slots of a layer."""

    codes: Tensor
    """[S, N, K], or [S, N, K/2] of two codes in a byte."""
    scales: Tensor
    """[S, N, G], as bytes if they are powers of 2 in E8M0, or E4M3 for `nvfp4`."""
    more: Tensor | None = None
    """For `uint4` zero points [S, N, ceil(G / 2)], two in a byte; for `nvfp4` float32 scales of outputs [S, N, 1]."""
    code: Code
    group: int
    """Inputs that share a scale: a power of 2."""

    @property
    def outputs(self) -> int:
        return self.codes.shape[1]

    @property
    def inputs(self) -> int:
        return self.codes.shape[2] * (2 if self.code in ("uint4", "e2m1", "nvfp4") else 1)

    @property
    def memory(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """What kernels are given: codes, scales, and what there is more."""
        return self.codes, self.scales, self.more

    @property
    def lengths(self) -> tuple[int, int]:
        """Elements of a row of codes, and of scales."""
        return self.codes.shape[2], self.scales.shape[2]
