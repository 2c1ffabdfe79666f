"""Expert weights in 8 bits: rounded in groups of 128 inputs of each output, with a scale for each group.

Only weights are rounded to 8 bits; activations keep more bits than bfloat16 has (model/native/gemm8.h). In memory and
on its way between workers, an expert takes 52 % of the bytes that it takes in bfloat16.
"""

from __future__ import annotations

import torch
from torch import Tensor

GROUP = 128
"""Inputs that share one scale, as in gemm8.h."""
SCALE = "_scale"
"""The scales of a matrix have the matrix's name with this ending."""


def quantize(matrix_NK: Tensor) -> tuple[Tensor, Tensor]:
    """Round a matrix [N, K] to the nearest 8-bit values: (int8 [N, K], float32 scales [N, groups]).

    The largest weight of a group becomes 127 or -127.
    """
    n, k = matrix_NK.shape
    padded = torch.nn.functional.pad(matrix_NK.float(), (0, -k % GROUP)).view(n, -1, GROUP)
    scales_NG = padded.abs().amax(dim=-1) / 127
    # a group of zeros has a scale of zero
    rounded = (padded / scales_NG.clamp(min=1e-38)[..., None]).round_().clamp_(-127, 127)
    return rounded.to(torch.int8).view(n, -1)[:, :k].contiguous(), scales_NG
