"""Rounds experts for workers whose device computes packed ones, but cannot round them: the host does that."""

from __future__ import annotations

from elastic_moe.cluster.errors import UserError
from elastic_moe.cluster.expert_forms import ExpertForm
from elastic_moe.model.experts.interface import Tensors
from elastic_moe.model.int4 import ZERO
from elastic_moe.model.int8 import SCALE, quantize
from elastic_moe.model.native.library import library, unavailable
from elastic_moe.model.native.linear import can_pack, round4


def rounded(tensors: Tensors, form: ExpertForm, *, transposed: bool) -> Tensors:
    """One expert in INT8 or INT4: its matrices [out, in], with their scales and zero points. The others stay.

    tensors: in bfloat16 in the host's memory. transposed: whether its matrices are [in, out].
    Raises UserError if this machine cannot round to INT4.
    """
    made: Tensors = {}
    for name, tensor in tensors.items():
        if tensor.dim() != 2:
            made[name] = tensor
            continue
        matrix = tensor.T if transposed else tensor
        if form is ExpertForm.INT8:
            made[name], made[name + SCALE] = quantize(matrix)
            continue
        lib = library()
        if lib is None or not can_pack(matrix):
            reason = unavailable() or "a matrix has an odd number of columns"
            raise UserError(
                f"expert_dtype: {form} is rounded by the native library: {reason}; int8 and bfloat16 are not"
            )
        made[name], made[name + SCALE], made[name + ZERO] = round4(lib, matrix)
    return made
