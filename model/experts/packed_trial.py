"""Kernels for packed experts are tried on small matrices before they are used: another GPU, or another version of
Triton, may compile them wrongly or not at all. Then torch's operators unpack the experts.

Legend: S slots, N outputs, K inputs, R rows.
"""

from __future__ import annotations

import logging
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from elastic_moe.cluster.expert_forms import ExpertForm
from elastic_moe.model import int4, int8
from elastic_moe.model.experts.interface import Tensors
from elastic_moe.model.experts.unpacking import FORM_BYTES, Packing
from elastic_moe.model.gpu.refusals import gpu_refusal

log = logging.getLogger(__name__)

_SLOTS, _ROWS, _HIDDEN, _WIDTH = 3, 4, 160, 96
_CLOSE = 2.0**-6
"""Relative error of a weight or, by the largest number of all, of a sum: two units in the last place of bfloat16."""


def packed_refusal(form: ExpertForm, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why kernels do not read experts of this form, other than PLAIN, in this served dtype; None if they do."""
    return gpu_refusal(dtype, device) or tried(form, dtype, device)


@cache
def tried(form: ExpertForm, dtype: torch.dtype, device: torch.device) -> str | None:
    """What is wrong with the kernels for this form; None if they give what torch's operators give."""
    try:
        wrong = _wrong(Packing(form, dtype, device), device)
    except Exception as error:  # noqa: BLE001 - Triton raises errors of many kinds
        wrong = str(error).splitlines()[0] if str(error) else type(error).__name__
    if wrong is not None:
        log.warning("experts in %s are not read by kernels of their own: %s", form, wrong)
    return wrong


@torch.inference_mode()
def _wrong(packing: Packing, device: torch.device) -> str | None:
    from elastic_moe.model.gpu import few, few_packed, grouped, packed

    g = torch.Generator().manual_seed(0)
    sizes = {"up": (_SLOTS, 2 * _WIDTH, _HIDDEN), "down": (_SLOTS, _HIDDEN, _WIDTH)}
    stacks: Tensors = {}
    for name, size in sizes.items():
        stacks |= matrices(name, packing.form, *size, g)
    stacks = {name: tensor.to(device) for name, tensor in packing.kept(stacks).items()}
    up, down = (packing.stack(stacks, name) for name in ("up", "down"))
    plain_up, plain_down = packing.weights(stacks, "up"), packing.weights(stacks, "down")
    chosen = torch.tensor([2, 0], device=device)
    if not torch.allclose(packed.unpack(up, chosen, packing.dtype), plain_up[chosen], rtol=_CLOSE, atol=0.0):
        return "they unpack wrongly"
    x = torch.randn(_ROWS, _HIDDEN, generator=g).to(device, packing.dtype)
    ends = torch.tensor([1, 1, _ROWS], dtype=torch.int32, device=device)
    want = torch.stack([F.linear(row.float(), plain_up[0 if n < 1 else 2].float()) for n, row in enumerate(x)])
    if not _close(grouped.grouped(x, up, ends), want):
        return "they multiply wrongly"
    index = torch.tensor([[0, 2], [1, 0], [2, -1], [1, 2]], device=device)
    rest = torch.tensor([0, 1, 2, _SLOTS], device=device), x, index, torch.ones(_ROWS, 2, device=device)
    unpacked = few.run_few(plain_up, plain_down, *rest)
    return None if _close(few_packed.run_few(up, down, *rest), unpacked) else "they multiply few rows wrongly"


def _close(got: Tensor, want: Tensor) -> bool:
    return torch.allclose(got.float(), want.float(), rtol=_CLOSE, atol=_CLOSE * float(want.float().abs().max()))


def matrices(name: str, form: ExpertForm, slots: int, outputs: int, inputs: int, g: torch.Generator) -> Tensors:
    """Random matrices [S, N, K] of this name, in the tensors of a form other than PLAIN."""

    def drawn(*sizes: int, high: int = 256) -> Tensor:
        return torch.randint(0, high, sizes, generator=g).to(torch.uint8)

    lead, about = (slots, outputs), FORM_BYTES[form]
    groups = -(-inputs // about.group)
    # E4M3 without its largest exponent, in which it has codes that are no number
    codes = drawn(*lead, inputs // about.per_byte) & (0xF7 if about.per_byte == 1 else 0xFF)
    scales: Tensor = (torch.rand(*lead, groups, generator=g) + 0.5) / 64
    if form is ExpertForm.MXFP8:
        scales = drawn(*lead, groups, high=12) + 110
    elif form is ExpertForm.NVFP4:
        scales = drawn(*lead, groups, high=0x40)
    elif form is ExpertForm.INT4_HALF:
        scales = scales.half()
    elif about.per_byte == 2:
        scales = scales.bfloat16()
    found = {name: codes.view(torch.int8) if about.per_byte == 1 else codes, name + int8.SCALE: scales}
    if form in (ExpertForm.INT4, ExpertForm.INT4_HALF):
        found[name + int4.ZERO] = drawn(*lead, groups, high=16)
    elif form is ExpertForm.NVFP4:
        found[name + int4.EACH] = (torch.rand(*lead, 1, generator=g) + 0.5) / 64
    return found
