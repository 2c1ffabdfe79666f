"""Root mean square normalisation: the formula, which native code and kernels compute too, by torch's operators."""

from __future__ import annotations

from dataclasses import dataclass

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
