"""Packs a matrix that is both a model's embedding and its output layer (tied embeddings).

The output layer reads all of it in every step, and the native library is two to three times as fast as a product with
the plain matrix. The embedding takes a few rows of the same panels, so that no second copy is needed.

Legend: T tokens, V vocabulary, H hidden.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elastic_moe.cluster.expert_forms import ExpertForm
from elastic_moe.cluster.fit import CodePath, FitNotes, Part
from elastic_moe.model.native.linear import PANEL, Packed, can_pack, linear
from elastic_moe.model.native.linear import rows as narrow_rows
from elastic_moe.model.torch_private import plain_tensors
from elastic_moe.model.trunk.linear import NarrowEmbedding, PackedLinear, label, pack, replace_module


class _PackedEmbedding(nn.Parameter):
    """A matrix [V, H] of which the packed form alone is kept. It has the shape, and the values are not there."""

    packed: Packed

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = kwargs or {}
        if func is F.embedding and isinstance(args[1], cls):
            return rows_of(args[1].packed, args[0])
        if func is F.linear and isinstance(args[1], cls):
            return linear(args[0], args[1].packed, args[2] if len(args) == 3 else given.get("bias"))
        with plain_tensors():
            return func(*args, **given)


def pack_tied(model: nn.Module, notes: FitNotes, form: ExpertForm = ExpertForm.PLAIN) -> int:
    """Pack each matrix that an nn.Linear shares with an embedding, and with nothing else. With INT8 it is rounded to 8
    bits. Call it where the native library is there.

    Returns the bytes of the packed matrices less those that the model's parameters still count for them.
    """
    users: dict[int, list[nn.Module]] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            users.setdefault(id(parameter), []).append(module)
    total = 0
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is not nn.Linear or not can_pack(child.weight.data):
                continue
            others = [module for module in users[id(child.weight)] if module is not child]
            if len(others) != 1 or not isinstance(others[0], nn.Embedding) or others[0].max_norm is not None:
                continue
            packed = pack(child.weight.detach(), form)
            assert isinstance(packed, Packed)
            setattr(parent, name, PackedLinear(packed, child.bias))
            notes.add(Part.LINEARS, label(type(child).__name__, packed), CodePath.NATIVE)
            total += _embed(model, others[0], packed)
    return total


def _embed(model: nn.Module, embedding: nn.Embedding, packed: Packed) -> int:
    """Have an embedding read a packed matrix. Returns its bytes less those of the parameter that stands for it.

    The parameter has the shape of 16 bits per weight, which is too much for a matrix in 8 bits.
    """
    if packed.form is ExpertForm.INT8 and type(embedding) is nn.Embedding:
        replace_module(model, embedding, NarrowEmbedding(packed))
        return packed.nbytes
    weight = embedding.weight.detach()
    shape = _PackedEmbedding(weight.new_zeros(1).expand(weight.shape), requires_grad=False)
    shape.packed = packed
    embedding.weight = shape
    return packed.nbytes - shape.nbytes


def rows_of(packed: Packed, rows: Tensor) -> Tensor:
    """Rows of the matrix that was packed, by their numbers: [...] -> [..., H]."""
    if packed.form is ExpertForm.INT8:
        return narrow_rows(packed, rows)
    panels = packed.data.view(torch.int32).view(-1, packed.depth // 2, PANEL)
    flat = rows.reshape(-1)
    taken = panels[flat // PANEL, :, flat % PANEL]
    return taken.view(torch.bfloat16).view(*rows.shape, packed.depth)
