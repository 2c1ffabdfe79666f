"""Expert weights in 8 bits: rounded in groups of 128 inputs of each output, with a scale for each group.

Only weights are rounded so: activations keep more bits than bfloat16 has (model/native/gemm8.h). In memory and on its
way between workers, an expert takes 52 % of what it takes in bfloat16.
"""

from __future__ import annotations

import torch
from torch import Tensor

GROUP = 128
"""As in gemm8.h."""
SCALE = "_scale"
"""Appended to the name of a matrix, it names its scales."""


def quantize(matrix_NK: Tensor) -> tuple[Tensor, Tensor]:
    """A matrix [N, K] to (int8 [N, K], scales in float32 [N, groups]), to nearest.

    The largest weight of a group becomes 127 or -127.
    """
    n, k = matrix_NK.shape
    padded = torch.nn.functional.pad(matrix_NK.float(), (0, -k % GROUP)).view(n, -1, GROUP)
    scales_NG = padded.abs().amax(dim=-1) / 127
    # a group of zeros has a scale of zero
    rounded = (padded / scales_NG.clamp(min=1e-38)[..., None]).round_().clamp_(-127, 127)
    return rounded.to(torch.int8).view(n, -1)[:, :k].contiguous(), scales_NG
