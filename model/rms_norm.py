"""Norms by torch's operators: by the root mean square, also with a gate, and layer normalisation. Native code computes
them too, and kernels the first.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class RmsNorm:
    """Normalises bfloat16 rows as long as `weight`. Calling it computes in float32 and rounds the result."""

    weight: Tensor
    """The factors of the normalised values, in float32."""
    epsilon: float
    rounds: bool
    """Whether the normalised value is rounded to bfloat16 before it is multiplied."""

    def __call__(self, hidden_states: Tensor) -> Tensor:
        wide = hidden_states.float()
        wide = wide * wide.pow(2).mean(-1, keepdim=True).add(self.epsilon).rsqrt()
        return ((wide.bfloat16().float() if self.rounds else wide) * self.weight).bfloat16()


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerNorm:
    """Normalises bfloat16 rows as long as `weight`, without their mean. Computes in float32 and rounds the result."""

    weight: Tensor
    """The factors of the normalised values, in float32."""
    bias: Tensor | None
    """What is added to the product, in float32."""
    epsilon: float

    def __call__(self, hidden_states: Tensor) -> Tensor:
        size = (len(self.weight),)
        return F.layer_norm(hidden_states.float(), size, self.weight, self.bias, self.epsilon).bfloat16()


@dataclass(frozen=True, slots=True, kw_only=True)
class GatedRmsNorm:
    """Normalises groups of each bfloat16 row, and multiplies by an activation of another row, which is the gate."""

    weight: Tensor
    """The factors of the normalised values, in float32."""
    epsilon: float
    group: int
    """Numbers that are normalised together."""
    rounds: bool
    """Whether the normalised value is rounded to bfloat16 before and after it is multiplied by the weight."""
    gate_first: bool
    """Whether the gate comes before the normalisation."""
    silu: bool
    """Whether the gate's activation is silu, and not the logistic function."""

    def __call__(self, hidden_states: Tensor, gate: Tensor) -> Tensor:
        wide = hidden_states.float()
        factor = F.silu(gate.float()) if self.silu else gate.float().sigmoid()
        wide = wide * factor if self.gate_first else wide
        groups = wide.view(*wide.shape[:-1], -1, self.group)
        wide = (groups * groups.pow(2).mean(-1, keepdim=True).add(self.epsilon).rsqrt()).flatten(-2)
        wide = (wide.bfloat16() * self.weight.bfloat16()).float() if self.rounds else wide * self.weight
        return (wide if self.gate_first else wide * factor).bfloat16()
