"""Weights in 8 bits: rounded in groups of 128 inputs of each output, with a scale for each group.

In memory and on its way between workers, an expert takes 52 % of the bytes that it takes in bfloat16. Products round
activations to 8 bits too, in groups of 32 (model/native/products/rows8.h).
"""

from __future__ import annotations

import torch
from torch import Tensor

GROUP = 128
"""Inputs that share one scale, as in gemm8.h."""
SCALE = "_scale"
"""The scales of a matrix have the matrix's name with this ending."""


_PIECE = 1 << 22
"""Weights that are rounded at a time, which takes memory in float32."""


def quantize(matrix_NK: Tensor) -> tuple[Tensor, Tensor]:
    """Round a matrix [N, K] to the nearest 8-bit values: (int8 [N, K], float32 scales [N, groups]).

    The largest weight of a group becomes 127 or -127.
    """
    n, k = matrix_NK.shape
    values_NK, scales_NG = torch.empty(n, k, dtype=torch.int8), torch.empty(n, -(-k // GROUP), dtype=torch.float32)
    step = max(1, _PIECE // k)
    for at in range(0, n, step):
        rows = slice(at, at + step)
        padded = torch.nn.functional.pad(matrix_NK[rows].float(), (0, -k % GROUP)).view(-1, scales_NG.shape[1], GROUP)
        scales_NG[rows] = padded.abs().amax(dim=-1) / 127
        # a group of zeros has a scale of zero
        rounded = (padded / scales_NG[rows].clamp(min=1e-38)[..., None]).round_().clamp_(-127, 127)
        values_NK[rows] = rounded.view(len(rounded), -1)[:, :k]
    return values_NK, scales_NG
