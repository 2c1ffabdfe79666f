"""How one expert lies in one piece of memory: in a record on the disk, and in a slot of a cache, byte for byte alike.

An object that computes experts says in which form it reads them (`lay_out`). So a record that is read from the disk is
computed where it lies, without a copy.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

PAGE = 4096
"""Records and slots are multiples of this number of bytes, and begin at multiples of it, as direct reads need."""
_LINE = 64
"""Tensors begin at multiples of this number of bytes, which is a cache line."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One tensor: its bytes are those from `offset` on."""

    name: str
    dtype: str
    """The name of torch's dtype, without the prefix `torch.`."""
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordLayout:
    """The tensors of one expert of one layer."""

    kind: str
    """The form in which matrices are stored, such as `panels of 64, 16 bits`."""
    parts: tuple[Part, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of a slot: a multiple of PAGE."""
        last = self.parts[-1]
        return -(-(last.offset + last.nbytes) // PAGE) * PAGE

    def text(self) -> str:
        """One line that differs for different layouts."""
        return json.dumps(asdict(self), sort_keys=True)

    def views(self, slot: Tensor) -> dict[str, Tensor]:
        """The tensors that lie in a slot [nbytes] of uint8."""
        found = {}
        for part in self.parts:
            raw = slot[part.offset : part.offset + part.nbytes]
            found[part.name] = raw.view(getattr(torch, part.dtype)).view(part.shape)
        return found


def lay_out(kind: str, tensors: Mapping[str, Tensor]) -> RecordLayout:
    """The layout of contiguous tensors, one after the other in the order of their names."""
    parts = []
    offset = 0
    for name in sorted(tensors):
        tensor = tensors[name]
        parts.append(
            Part(
                name=name,
                dtype=str(tensor.dtype).removeprefix("torch."),
                shape=tuple(tensor.shape),
                offset=offset,
                nbytes=tensor.nbytes,
            )
        )
        offset += -(-tensor.nbytes // _LINE) * _LINE
    return RecordLayout(kind=kind, parts=tuple(parts))
