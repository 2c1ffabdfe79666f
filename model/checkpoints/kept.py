"""Finds the form in which packed experts can be kept as they come, and reads one expert in that form.

Codes, scales and zero points of a matrix have one row for each output. So a conversion that stacks and joins outputs
can be applied to each of the three as it is to a matrix.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from elastic_moe.cluster.expert_forms import ExpertForm
from elastic_moe.model.checkpoints.conversion import Conversion, ExpertGroup, convert
from elastic_moe.model.checkpoints.packed import PackedTensor, Stored
from elastic_moe.model.checkpoints.servability import Shape
from elastic_moe.model.formats.floats4 import BlocksMxfp4
from elastic_moe.model.int4 import EACH, ZERO
from elastic_moe.model.int8 import SCALE
from elastic_moe.model.transformers_private import Concatenate, MergeModulelist

if TYPE_CHECKING:
    from elastic_moe.model.checkpoints.checkpoint import Checkpoint


def kept_form(
    model: PreTrainedModel, shape: Shape, conversion: Conversion, tensors: Mapping[str, Stored]
) -> ExpertForm:
    """The form that all matrices of all experts have; PLAIN if there is no such form."""
    forms = {
        _form(model.get_submodule(name), part, tensors)
        for name, parts in zip(shape.expert_modules, conversion.experts, strict=True)
        for part in parts
        if not part.parameter.endswith("_bias")
    }
    return forms.pop() if len(forms) == 1 else ExpertForm.PLAIN


def _form(module: Any, part: ExpertGroup, tensors: Mapping[str, Stored]) -> ExpertForm:
    converter = part.group.converter
    if converter is not None:
        stacks = (
            isinstance(op, MergeModulelist) or (isinstance(op, Concatenate) and op.dim == 1)
            for op in converter.operations
        )
        if part.fused or module.is_transposed or not all(stacks):
            return ExpertForm.PLAIN
    forms = set()
    for name in part.group.names:
        weight = tensors[name]
        if not isinstance(weight, PackedTensor):
            return ExpertForm.PLAIN
        # outputs are rows of the codes, whichever way the module has its matrices
        if bool(module.is_transposed) != isinstance(weight.format, BlocksMxfp4):
            return ExpertForm.PLAIN
        forms.add(weight.kept)
    return forms.pop() if len(forms) == 1 else ExpertForm.PLAIN


def load_codes(checkpoint: Checkpoint, layer: int, expert: int, *, dtype: torch.dtype) -> dict[str, Tensor]:
    """One expert in the form that the checkpoint has it in: for each matrix its values, scales and zero points."""
    made: dict[str, Tensor] = {}
    for part in checkpoint.conversion.experts[layer]:
        row = expert if part.fused else None
        stored = {pattern: checkpoint.tensors[name] for pattern, name in part.sources_of(expert).items()}
        pieces: dict[str, dict[str, Tensor]] = {}
        for pattern, weight in stored.items():
            for ending, tensor in _tensors(weight, row, dtype).items():
                pieces.setdefault(ending, {})[pattern] = tensor
        for ending, tensors in pieces.items():
            groups = {pattern: [tensor] for pattern, tensor in tensors.items()}
            [tensor] = convert(part.group, groups, checkpoint.skeleton)[part.group.target].detach()
            made[part.parameter + ending] = tensor
    return made


def _tensors(weight: Stored, row: int | None, dtype: torch.dtype) -> dict[str, Tensor]:
    if not isinstance(weight, PackedTensor):
        return {"": weight.read(row).to(dtype)}
    codes = weight.read_codes(row)
    found = {"": codes.values, SCALE: codes.scales, ZERO: codes.zeros, EACH: codes.each}
    return {ending: tensor for ending, tensor in found.items() if tensor is not None}
