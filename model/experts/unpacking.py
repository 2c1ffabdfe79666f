"""Experts that stay packed on a GPU: those that rows have chosen are unpacked into a buffer before the grouped product.

A weight gets the bits that it has where it is unpacked when it is loaded: code by scale in float32, rounded once to the
served dtype. In the stacks lie the tensors of model/int8.py and model/int4.py as they are, except that zero points lie
two in a byte. MXFP8 has bytes of E4M3 with a byte of E8M0 for every 32, and NVFP4 has two codes of E2M1 in a byte, a
byte of E4M3 for every 16, and a float32 for each output.

Legend: S slots, A active slots, N outputs, K inputs, G groups of inputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from elastic_moe.cluster.expert_forms import ExpertForm
from elastic_moe.model import int4, int8
from elastic_moe.model.experts.interface import Tensors
from elastic_moe.model.formats.small_floats import E2M1
from elastic_moe.model.gpu.stacks import Code, Stack

PIECE = 1 << 24
"""Weights that torch's operators unpack at a time, each of which takes up to WORK_BYTES meanwhile. A larger matrix is
one piece."""
WORK_BYTES = 12


@dataclass(frozen=True, slots=True, kw_only=True)
class FormBytes:
    """How a form lies in memory."""

    code: Code
    group: int
    """Inputs with one scale."""
    per_byte: int
    """Codes in a byte."""


FORM_BYTES: Mapping[ExpertForm, FormBytes] = {
    ExpertForm.INT8: FormBytes(code="int8", group=int8.GROUP, per_byte=1),
    ExpertForm.FP8: FormBytes(code="e4m3", group=int8.GROUP, per_byte=1),
    ExpertForm.MXFP8: FormBytes(code="e4m3", group=int4.GROUP, per_byte=1),
    ExpertForm.INT4: FormBytes(code="uint4", group=int4.GROUP, per_byte=2),
    ExpertForm.INT4_HALF: FormBytes(code="uint4", group=int4.GROUP, per_byte=2),
    ExpertForm.MXFP4: FormBytes(code="e2m1", group=int4.GROUP, per_byte=2),
    ExpertForm.NVFP4: FormBytes(code="nvfp4", group=int4.NVFP4_GROUP, per_byte=2),
}
"""Of all forms but PLAIN."""


class Packing:
    """One form of the experts of a layer, and the dtype that it is unpacked to.

    Kernels unpack in one pass over memory. Torch's operators, which do it elsewhere, take about ten.
    """

    def __init__(self, form: ExpertForm, dtype: torch.dtype, device: torch.device | None = None) -> None:
        """form: other than PLAIN. device: on which steps unpack; the host's cores may do so too."""
        self.form = form
        self.dtype = dtype
        self._bytes = FORM_BYTES[form]
        self.device = device or torch.device("cpu")
        devices = {self.device, torch.device("cpu")} if self._bytes.per_byte == 2 else set()
        self._pairs = {device: _pairs(form).to(device) for device in devices}
        """[256, 2] the two weights of a byte, by device: a step may not bring them there."""
        self._more = int4.EACH if form is ExpertForm.NVFP4 else int4.ZERO
        """The ending of what a matrix has besides codes and scales."""
        self.kernels: ModuleType | None = None
        """model/gpu/packed.py, where it can be used: it unpacks what lies on a GPU."""

    def kept(self, tensors: Tensors) -> Tensors:
        """One expert as it lies in the stacks. `tensors` are codes as they are loaded, or what this returned before."""
        return {
            name: _two_in_a_byte(tensor)
            if name.endswith(int4.ZERO) and tensor.shape == tensors[name.removesuffix(int4.ZERO) + int8.SCALE].shape
            else tensor
            for name, tensor in tensors.items()
        }

    def inputs(self, matrix: Tensor) -> int:
        """Inputs of a matrix of codes [..., N, K] or [..., N, K/2]."""
        return matrix.shape[-1] * self._bytes.per_byte

    def stack(self, stacks: Tensors, name: str) -> Stack:
        """The packed matrices of this name, for kernels."""
        return Stack(
            codes=stacks[name],
            scales=stacks[name + int8.SCALE],
            more=stacks.get(name + self._more),
            code=self._bytes.code,
            group=self._bytes.group,
        )

    def weights(self, stacks: Tensors, name: str, chosen_A: Tensor | None = None) -> Tensor:
        """The matrices of this name in all slots, or in the chosen ones: [A, N, K]. The CPU waits for nothing."""
        if self.kernels is not None and stacks[name].device.type == "cuda":
            unpacked: Tensor = self.kernels.unpack(self.stack(stacks, name), chosen_A, self.dtype)
            return unpacked
        parts = [stacks[name], stacks[name + int8.SCALE]]
        if (more := stacks.get(name + self._more)) is not None:
            parts.append(more)
        count = len(parts[0]) if chosen_A is None else len(chosen_A)
        outputs, inputs = parts[0].shape[1], self.inputs(parts[0])
        out = torch.empty(count, outputs, inputs, dtype=self.dtype, device=parts[0].device)
        step = max(1, PIECE // (outputs * inputs))
        for at in range(0, count, step):
            here = slice(at, at + step)
            pieces = [part[here] if chosen_A is None else part.index_select(0, chosen_A[here]) for part in parts]
            out[here] = self._unpacked(inputs, *pieces)
        return out

    def matrix(self, tensors: Tensors, name: str) -> Tensor:
        """One expert's matrix of this name: [N, K]."""
        return self.weights({key: tensor[None] for key, tensor in tensors.items()}, name)[0]

    def _unpacked(self, inputs: int, codes: Tensor, scales: Tensor, more: Tensor | None = None) -> Tensor:
        """[A, N, K] in float32. `more`: zero points, or the scales of outputs."""
        if self.form is ExpertForm.MXFP8:
            scales = scales.view(torch.float8_e8m0fnu)
        elif self.form is ExpertForm.NVFP4:
            assert more is not None
            scales, more = scales.view(torch.float8_e4m3fn).float() * more, None
        if self.form in (ExpertForm.FP8, ExpertForm.MXFP8):
            values = codes.view(torch.float8_e4m3fn).float()
        elif self.form is ExpertForm.INT8:
            values = codes.float()
        else:
            values = F.embedding(codes.int(), self._pairs[codes.device]).flatten(-2)
        groups = scales.shape[-1]
        values = F.pad(values, (0, groups * self._bytes.group - inputs)).view(*scales.shape, self._bytes.group)
        if more is not None:
            values = values.sub_(torch.stack((more & 15, more >> 4), -1).flatten(-2)[..., :groups, None].float())
        return values.mul_(scales[..., None].float()).flatten(-2)[..., :inputs]


def active_slots(end_S: Tensor, pairs: int) -> tuple[Tensor, Tensor]:
    """The slots that have rows, and where their rows end: both [min(pairs, S)]. Further entries have no rows.

    end_S: where the rows of each slot end, of at most `pairs`. The CPU does not wait to know how many slots have rows.
    """
    size = len(end_S)
    count = min(pairs, size)
    has_S = end_S > F.pad(end_S[:-1], (1, 0))
    # what has no rows goes to the place behind the last, which is cut off
    place_S = torch.where(has_S, has_S.cumsum(0) - 1, count)
    slot_S = torch.arange(size, device=end_S.device)
    slot_A = torch.zeros(count + 1, dtype=slot_S.dtype, device=end_S.device).scatter_(0, place_S, slot_S)
    end_A = end_S[-1:].repeat(count + 1).scatter_(0, place_S, end_S)
    return slot_A[:count], end_A[:count]


def _pairs(form: ExpertForm) -> Tensor:
    # codes of MXFP4 are kept as twice their values, beside half scales
    values = {ExpertForm.MXFP4: torch.tensor(E2M1) * 2, ExpertForm.NVFP4: torch.tensor(E2M1)}.get(
        form, torch.arange(16.0)
    )
    byte = torch.arange(256)
    return torch.stack((values[byte & 15], values[byte >> 4]), -1)


def _two_in_a_byte(zeros_NG: Tensor) -> Tensor:
    """Zero points of 4 bits [N, G], two in a byte: [N, ceil(G / 2)]."""
    padded = F.pad(zeros_NG, (0, zeros_NG.shape[-1] % 2))
    return padded[..., ::2] | (padded[..., 1::2] << 4)
