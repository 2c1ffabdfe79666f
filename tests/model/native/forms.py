"""Experts for tests of native products, in every form in which they are kept, and what they stand for."""

from __future__ import annotations

import ctypes
import math
from typing import Any

import torch
from torch import Tensor, nn

from elastic_moe.cluster.expert_forms import ExpertForm
from elastic_moe.model.formats.small_floats import E2M1
from elastic_moe.model.int4 import EACH, NVFP4_GROUP, ZERO
from elastic_moe.model.int8 import GROUP, SCALE, quantize
from elastic_moe.model.native.experts import Gate
from elastic_moe.model.native.linear import round4

FLOATS = (ExpertForm.PLAIN, ExpertForm.FP8, ExpertForm.MXFP8, ExpertForm.NVFP4)
"""Forms whose sums are of floats. With the others, rows become integers."""
FOUR_BITS = (ExpertForm.INT4, ExpertForm.INT4_HALF, ExpertForm.MXFP4)

GATES = {
    "silu": Gate(kind=0, interleaved=False, limit=math.inf, alpha=1.0),
    "silu-limited": Gate(kind=0, interleaved=False, limit=1.5, alpha=1.5),
    "gpt-oss": Gate(kind=1, interleaved=True, limit=1.5, alpha=1.75),
    "halves": Gate(kind=1, interleaved=False, limit=1.5, alpha=1.75),
    "gelu": Gate(kind=2, interleaved=False, limit=math.inf, alpha=1.0),
    "relu2": Gate(kind=3, interleaved=False, limit=math.inf, alpha=1.0),
}


def module(gate: Gate | None, experts: int, *, transposed: bool = False, **constants: float) -> Any:
    """A module with those parts of an expert module that a test needs."""
    made: Any = nn.Module()
    made.has_gate, made.is_transposed, made.num_experts = getattr(gate, "kind", 0) != 3, transposed, experts
    made._apply_gate = made.act_fn = gate
    for name, value in constants.items():
        setattr(made, name, value)
    return made


def draw(seed: int, *shape: int, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale).bfloat16()


def expert(
    seed: int, hidden: int, width: int, *, biased: bool, transposed: bool, gate: str = "silu"
) -> dict[str, Tensor]:
    first, parts = GATES[gate].first, GATES[gate].parts
    tensors = {
        first: draw(seed, parts * width, hidden, scale=hidden**-0.5),
        "down_proj": draw(seed + 1, hidden, width, scale=width**-0.5),
    }
    if transposed:
        tensors = {name: matrix.T.contiguous() for name, matrix in tensors.items()}
    if biased:
        tensors |= {f"{first}_bias": draw(seed + 2, parts * width), "down_proj_bias": draw(seed + 3, hidden)}
    return tensors


def sizes(form: ExpertForm) -> tuple[int, int]:
    """A hidden size and a width that fill no panel and no group. But NVFP4 has whole groups only."""
    return (304, 176) if form is ExpertForm.NVFP4 else (296, 168)


def dequantized(values_NK: Tensor, scales_NG: Tensor) -> Tensor:
    """[N, K] in float32."""
    return values_NK.float() * scales_NG.repeat_interleave(GROUP, dim=1)[:, : values_NK.shape[1]]


def draw_powers(random: torch.Generator, outputs: int, inputs: int) -> Tensor:
    """Powers of 2 in E8M0, around those that weights times 64 take: uint8 [N, groups of 32]."""
    return torch.randint(118, 124, (outputs, -(-inputs // 32)), generator=random, dtype=torch.uint8)


def times_powers(fp8_NK: Tensor, powers_NG: Tensor) -> Tensor:
    """[N, K] in float32."""
    scales = (powers_NG.double() - 127).exp2().float()
    return fp8_NK.float() * scales.repeat_interleave(32, dim=1)[:, : fp8_NK.shape[1]]


def draw_nvfp4(random: torch.Generator, outputs: int, inputs: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scales of groups and scales of outputs, of a matrix of about the size of an expert's."""
    codes = torch.randint(0, 256, (outputs, inputs // 2), generator=random, dtype=torch.uint8)
    scales = torch.rand(outputs, inputs // NVFP4_GROUP, generator=random) * 400
    each = torch.rand(outputs, 1, generator=random) / 200 / inputs**0.5
    return codes, scales.to(torch.float8_e4m3fn).view(torch.uint8), each


def times_scales(codes: Tensor, scales: Tensor, each: Tensor) -> Tensor:
    """[N, K] in float32, for scales of outputs that are 1 or with one more rounding."""
    values = torch.tensor(E2M1)[torch.stack([codes & 15, codes >> 4], dim=-1).flatten(1).int()]
    return values * scales.view(torch.float8_e4m3fn).float().repeat_interleave(NVFP4_GROUP, dim=1) * each


def dequantized4(codes: Tensor, scales_NG: Tensor, zeros_NG: Tensor | None) -> Tensor:
    """[N, K] in float32."""
    numbers = torch.stack([codes & 15, codes >> 4], dim=-1).flatten(1)
    scales = scales_NG.float().repeat_interleave(32, dim=1)[:, : numbers.shape[1]]
    if zeros_NG is None:
        # scales of E2M1 are kept halved
        return torch.tensor(E2M1)[numbers.int()] * 2 * scales
    return (numbers.float() - zeros_NG.repeat_interleave(32, dim=1)[:, : numbers.shape[1]]) * scales


def in_form(
    lib: ctypes.CDLL, form: ExpertForm, tensors: dict[str, Tensor], transposed: bool
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The expert as it may come to a layer that keeps `form`, and the expert that it stands for then."""
    comes: dict[str, Tensor] = {}
    meant: dict[str, Tensor] = {}
    random = torch.Generator().manual_seed(0)
    for name, tensor in tensors.items():
        comes[name] = meant[name] = tensor
        if tensor.dim() != 2 or form is ExpertForm.PLAIN:
            continue
        matrix = tensor.T.contiguous() if transposed else tensor
        if form is ExpertForm.INT8:
            values = dequantized(*quantize(matrix))
        elif form is ExpertForm.FP8:
            fp8 = (matrix * 64).to(torch.float8_e4m3fn)
            scales = torch.rand(len(matrix), -(-matrix.shape[1] // GROUP), generator=random) / 32
            comes |= {name: fp8.view(torch.int8), name + SCALE: scales}
            values = dequantized(fp8, scales)
        elif form is ExpertForm.MXFP8:
            fp8, powers = (matrix * 64).to(torch.float8_e4m3fn), draw_powers(random, *matrix.shape)
            comes |= {name: fp8.view(torch.int8), name + SCALE: powers}
            values = times_powers(fp8, powers)
        elif form is ExpertForm.NVFP4:
            made = draw_nvfp4(random, *matrix.shape)
            comes |= dict(zip((name, name + SCALE, name + EACH), made, strict=True))
            values = times_scales(*made)
        else:
            zeros: Tensor | None
            codes, scales, zeros = round4(lib, matrix)
            if form is ExpertForm.MXFP4:
                scales = torch.randint(-8, -5, scales.shape, generator=random).float().exp2().bfloat16()
                zeros = None
            if form is ExpertForm.INT4_HALF:
                scales = scales.half()
            if form is not ExpertForm.INT4:  # these come from checkpoints only
                comes |= {name: codes, name + SCALE: scales} | ({} if zeros is None else {name + ZERO: zeros})
            values = dequantized4(codes, scales, zeros)
        meant[name] = values.T if transposed else values
    return comes, meant


def in_8_bits(rows: Tensor, form: ExpertForm) -> Tensor:
    """Rows [R, K] as products with weights in 8 or 4 bits take them: integers times a scale for each 32 inputs.

    For weights in 4 bits the scale is that of the largest input (rows4.h). For 8 bits it is a number of eighths of the
    scale of 128 inputs (rows8.h).
    """
    # PyTorch divides a number by a tensor by a reciprocal, which ends otherwise just between two integers
    largest, all_factors = torch.tensor(127.0), torch.tensor(127.0 * 8)
    groups = nn.functional.pad(rows.float(), (0, -rows.shape[1] % GROUP)).unflatten(1, (-1, 4, 32))
    most = groups.abs().amax(-1, keepdim=True)
    if form is ExpertForm.INT8:
        together = most.amax(2, keepdim=True)
        factor = torch.where(together > 0, most / together * 8, 0).ceil().clamp(min=1)
        whole = torch.where(together > 0, groups * (all_factors / together / factor), 0).round() * factor
        scale = together / all_factors
    else:
        whole, scale = torch.where(most > 0, groups * (largest / most), 0).round(), most / largest
    return (whole.double() * scale.double()).flatten(1)[:, : rows.shape[1]]
