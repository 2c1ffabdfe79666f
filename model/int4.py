"""Expert weights in 4 bits, in groups of 32 inputs of each output: (code - zero point) x scale, or E2M1 codes x scale.

Codes lie as nibbles in uint8 [N, K/2], the lower half of a byte first; scales [N, G] in 16 bits; zero points in uint8
[N, G], which E2M1 has not. NVFP4 has groups of 16: its scales are bytes of E4M3 in uint8 [N, G], and each output has a
float32 scale besides: [N, 1]. In memory an expert takes 29 % of its bytes in bfloat16 (model/native/products/gemm4.h).
"""

from __future__ import annotations

import torch
from torch import Tensor

from elastic_moe.cluster.expert_forms import ExpertForm

GROUP = 32
"""Inputs that share one scale, as in gemm4.h."""
NVFP4_GROUP = 16
"""Inputs that share one scale of NVFP4, as in gemmf4.h."""
ZERO = "_zero"
"""The zero points of a matrix have the matrix's name with this ending; its scales have that of model/int8.py."""
EACH = "_each"
"""The ending of the scales of outputs, which NVFP4 has."""

FORMS = {torch.bfloat16: ExpertForm.INT4, torch.float16: ExpertForm.INT4_HALF}
"""The form of codes with zero points, by the dtype of their scales."""


def divides(group: int, larger: int | None) -> bool:
    """Whether groups of `larger` inputs, or of all if it is None, can be written as groups of `group`."""
    return larger is None or larger % group == 0


def by_fine_groups(numbers: Tensor, group: int | None, inputs: int, fine: int = GROUP) -> Tensor:
    """Numbers of each `group` inputs [N, G], written for each `fine` inputs: [N, ceil(inputs / fine)]."""
    count = -(-inputs // fine)
    if group is None:
        return numbers.expand(-1, count).contiguous()
    return numbers.repeat_interleave(group // fine, 1)[:, :count].contiguous()
