"""Linear layers whose weights lie in memory in the order in which the CPU reads them.

In bfloat16 on CPU, a packed matrix is read at more than twice the speed of a plain one for a few rows (decode), and at
the same speed for many rows. Its layout is that of the native library if it is available, otherwise oneDNN's. On other
devices, and in float32, weights are not packed. Packing changes no bit of a weight.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elastic_moe.cluster.expert_forms import ExpertForm
from elastic_moe.cluster.fit import CodePath, FitNotes, Part
from elastic_moe.model.int8 import quantize
from elastic_moe.model.native import library
from elastic_moe.model.native import linear as native
from elastic_moe.model.native.linear import Packed
from elastic_moe.model.native.refusals import native_refusal
from elastic_moe.model.torch_private import onednn_linear, onednn_pack

_ROWS = 32
"""Rows of x for which oneDNN's layout is made. Of 1..512 it is the fastest for a whole server; a few rows lose 10 %."""

NARROW_OUTPUTS = 128
"""A matrix with fewer outputs is not rounded. Gates and routers have few: they decide much, and take few bytes."""

Weight = Tensor | Packed
"""A matrix [out, in] in any of the layouts."""


def pack(weight: Tensor, form: ExpertForm = ExpertForm.PLAIN) -> Weight:
    """Pack a matrix [out, in] in the best layout for `linear`. Returns the matrix itself if no layout is better.

    With INT8 it is rounded to 8 bits if the native library can pack it.
    """
    if weight.device.type != "cpu" or weight.dtype != torch.bfloat16:
        return weight
    lib = library()
    if lib is not None and native.can_pack(weight):
        return native.pack8(lib, *quantize(weight)) if form is ExpertForm.INT8 else native.pack(lib, weight)
    if not _onednn_packs():
        return weight
    return onednn_pack(weight, _ROWS)


@cache
def _onednn_packs() -> bool:
    """Whether oneDNN can pack. It refuses bfloat16 on CPUs with AVX2 only, where PyTorch multiplies plain matrices."""
    available: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return available and torch.backends.cpu.get_cpu_capability() == "AVX512"


def unpack(weight: Weight) -> Tensor:
    """The plain matrix that was packed without rounding, bit for bit."""
    if isinstance(weight, Packed):
        return native.unpack(weight)
    return weight.to_dense() if weight.is_mkldnn else weight


def nbytes(weight: Weight) -> int:
    return weight.nbytes if isinstance(weight, Packed) else weight.numel() * weight.dtype.itemsize


def linear(x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
    """`F.linear` for a weight that may be packed."""
    if isinstance(weight, Packed):
        return native.linear(x, weight, bias)
    if not weight.is_mkldnn:
        return F.linear(x, weight, bias)
    return onednn_linear(x, weight, bias)


class PackedLinear(nn.Module):
    """Replaces an nn.Linear. Its weight may be packed."""

    def __init__(self, packed: Weight, bias: Tensor | None) -> None:
        super().__init__()
        # some operations of modules fail on a buffer that is an opaque tensor, but not on a bare attribute
        object.__setattr__(self, "packed", packed)
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.packed, self.bias)  # type: ignore[arg-type]


class NarrowEmbedding(nn.Module):
    """Replaces an nn.Embedding whose matrix is in 8 bits. The output head may have the same matrix."""

    def __init__(self, packed: Packed) -> None:
        super().__init__()
        self.packed = packed

    def forward(self, input: Tensor) -> Tensor:
        return native.rows(self.packed, input)


def pack_linears(
    model: nn.Module, notes: FitNotes, plain: Collection[nn.Module] = (), form: ExpertForm = ExpertForm.PLAIN
) -> int:
    """Pack every plain nn.Linear of a model, one at a time. Returns the bytes of the packed weights.

    A layer is not packed if another module uses its weight too (tied embeddings, and those in `plain`), or if its class
    is a subclass of nn.Linear. Every linear layer is added to `notes`, packed or not.

    With INT8, weights are rounded to 8 bits, those of embeddings too, but not those of gates and routers. Call
    `pack_tied` before for matrices that are both an embedding and an output layer.
    """
    uses = Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))
    total = 0
    if form is ExpertForm.INT8:
        total += _narrow_embedding(model, uses)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if not isinstance(child, nn.Linear):
                continue
            kind = type(child).__name__
            if type(child) is not nn.Linear:
                notes.add(Part.LINEARS, kind, CodePath.TRANSFORMERS, "its class may compute more than a linear layer")
            elif uses[id(child.weight)] > 1 or child in plain:
                notes.add(Part.LINEARS, kind, CodePath.TORCH, "another module uses its weight too")
            else:
                packed = pack(child.weight.data, form if child.out_features >= NARROW_OUTPUTS else ExpertForm.PLAIN)
                notes.add(Part.LINEARS, label(kind, packed), *_layout(packed))
                if isinstance(packed, Packed) or packed.is_mkldnn:
                    setattr(parent, name, PackedLinear(packed, child.bias))
                    total += nbytes(packed)
    return total


def _narrow_embedding(model: Any, uses: Counter[int]) -> int:
    """Round the matrix of the embeddings, if nothing else has it. Returns its bytes, or 0 if it stays as it is."""
    embedding = model.get_input_embeddings()
    if type(embedding) is not nn.Embedding or embedding.max_norm is not None or not native.can_pack(embedding.weight):
        return 0
    if uses[id(embedding.weight)] != 1:
        return 0
    packed = pack(embedding.weight.data, ExpertForm.INT8)
    assert isinstance(packed, Packed)
    replace_module(model, embedding, NarrowEmbedding(packed))
    return packed.nbytes


def replace_module(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put `new` wherever the model has `old`."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if child is old:
                setattr(parent, name, new)


def label(kind: str, weight: Weight) -> str:
    """How a report names layers of this class with such a matrix."""
    return f"{kind} in {weight.form}" if isinstance(weight, Packed) and weight.form is not ExpertForm.PLAIN else kind


def _layout(weight: Weight) -> tuple[CodePath, str | None]:
    """Which code multiplies by the matrix, and why no faster code does."""
    if isinstance(weight, Packed):
        return CodePath.NATIVE, None
    why = native_refusal(weight.dtype, weight.device) or "the matrix has an odd number of columns"
    return (CodePath.ONEDNN if weight.is_mkldnn else CodePath.TORCH), (None if weight.device.type == "cuda" else why)
