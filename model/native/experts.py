"""Holds and computes the experts of one layer in the native library.

Legend: R rows, H hidden, F expert width, K experts per token, E logical experts.
"""

from __future__ import annotations

import ctypes
import itertools
import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elastic_moe.model.int8 import SCALE, quantize
from elastic_moe.model.native.linear import Packed, can_pack, pack, pack8, unpack, unpack8
from elastic_moe.model.transformers_private import apply_gate


@dataclass(frozen=True, slots=True, kw_only=True)
class Gate:
    """The activation of gate and up. `limit` clamps both first (the gate from above only)."""

    kind: int
    """0: silu(gate) * up; 1: gate * sigmoid(alpha * gate) * (up + 1), which is gpt-oss's."""
    interleaved: bool
    """Whether gate and up are the even and the odd columns, and not the first and the second half."""
    limit: float
    alpha: float

    def __call__(self, gate_up: Tensor) -> Tensor:
        """Apply the gate by torch's operators: [R, 2F] -> [R, F]."""
        gate, up = (gate_up[..., ::2], gate_up[..., 1::2]) if self.interleaved else gate_up.chunk(2, dim=-1)
        gate, up = gate.clamp(max=self.limit), up.clamp(min=-self.limit, max=self.limit)
        if self.kind == 0:
            return F.silu(gate) * up
        return (up + 1) * (gate * torch.sigmoid(gate * self.alpha))


def find_gate(module: nn.Module) -> Gate | None:
    """Find the gate of an expert module by trials, since families override it and a list of names would go out of date.

    Returns None if no known gate gives the module's values.
    """
    if not module.has_gate:
        return None
    constants = sorted({float(v) for v in vars(module).values() if isinstance(v, float) and v > 0})
    generator = torch.Generator().manual_seed(0)
    # values from tiny ones to ones beyond any limit
    probe = torch.randn(64, 64, generator=generator) * torch.logspace(-2, 3, 64)[:, None]
    probe = probe.to(torch.bfloat16)
    expected = apply_gate(module, probe)
    for kind, interleaved, limit, alpha in itertools.product(
        (0, 1), (False, True), (math.inf, *constants), constants or (1.0,)
    ):
        gate = Gate(kind=kind, interleaved=interleaved, limit=limit, alpha=alpha)
        if torch.equal(gate(probe), expected):
            return gate
    return None


Held = dict[str, Tensor | Packed]
"""One expert's packed matrices and its biases, by parameter name."""


class NativeExperts:
    """Holds the packed experts of one layer, and computes the weighted sum of their outputs.

    It owns their memory, and the table of addresses that the library reads.
    """

    def __init__(self, lib: ctypes.CDLL, module: nn.Module, gate: Gate, *, bits: int = 16) -> None:
        """`bits` 16 keeps bfloat16 weights, 8 rounds them (model/int8.py)."""
        self.lib = lib
        self.bits = bits
        self._gate = gate
        self._transposed = bool(module.is_transposed)
        self._tables_4E = torch.zeros(4, module.num_experts, dtype=torch.int64)  # type: ignore[call-overload]
        """Addresses of gate_up, its bias, down and its bias, by logical expert; 0 if there is no such tensor."""
        self._held: dict[int, Held] = {}
        self._shape: tuple[int, int] | None = None

    def takes(self, tensors: dict[str, Tensor]) -> bool:
        """Whether the library can compute an expert with these tensors. All experts of a layer have the same shapes."""
        return all(
            tensors[name].dtype == torch.int8 or can_pack(self._turned(tensors[name]))
            for name in ("gate_up_proj", "down_proj")
        )

    def put(self, expert: int, tensors: dict[str, Tensor]) -> None:
        """Pack an expert and hold it until `drop`. Matrices are copied; dense biases are kept without a copy."""
        held: Held = {
            "gate_up_proj": self._pack(tensors, "gate_up_proj", parts=2, interleaved=self._gate.interleaved),
            "down_proj": self._pack(tensors, "down_proj"),
        }
        down: Any = held["down_proj"]
        self._shape = (down.columns, down.depth)
        biases = ("gate_up_proj_bias", "down_proj_bias")
        held |= {name: tensors[name].contiguous() for name in biases if name in tensors}
        for row, name in enumerate(("gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias")):
            item: Any = held.get(name)
            data = item.data if isinstance(item, Packed) else item
            self._tables_4E[row, expert] = 0 if data is None else data.data_ptr()
        # the expert's old tensors are freed only now, when the table has the new addresses
        self._held[expert] = held

    def _pack(self, tensors: dict[str, Tensor], name: str, **order: Any) -> Packed:
        matrix = tensors[name]
        if self.bits == 16:
            return pack(self.lib, self._turned(matrix), **order)
        # an expert from another worker is rounded already
        rounded = matrix.dtype == torch.int8
        values, scales = (matrix, tensors[name + SCALE]) if rounded else quantize(self._turned(matrix))
        return pack8(self.lib, values, scales, **order)

    def get(self, expert: int) -> dict[str, Tensor]:
        """The tensors as they were put. But matrices in 8 bits are always [out, in], with their scales.

        Raises KeyError for an expert that is not held.
        """
        tensors: dict[str, Tensor] = {}
        for name, item in self._held[expert].items():
            if not isinstance(item, Packed):
                tensors[name] = item
            elif item.bits == 8:
                tensors[name], tensors[name + SCALE] = unpack8(item)
            else:
                tensors[name] = self._turned(unpack(item)).contiguous()
        return tensors

    def drop(self, expert: int) -> None:
        self._tables_4E[:, expert] = 0
        del self._held[expert]

    def held(self) -> frozenset[int]:
        return frozenset(self._held)

    @property
    def nbytes(self) -> int:
        return sum(item.nbytes for held in self._held.values() for item in held.values())

    def _turned(self, matrix: Tensor) -> Tensor:
        return matrix.T if self._transposed else matrix

    @property
    def arguments(self) -> tuple[int | float, ...]:
        """Arguments of native functions that compute these experts. They are valid until the next `put`."""
        gate = self._gate
        _, width = self._shape or (0, 0)
        tables = self._tables_4E
        return (
            width,
            tables.shape[1],
            tables.data_ptr(),
            self.bits,
            gate.interleaved,
            gate.kind,
            gate.alpha,
            gate.limit,
        )

    def forward(self, x_RH: Tensor, index_RK: Tensor, weight_RK: Tensor) -> Tensor:
        """Weighted sum over those of each row's experts that are held here: [R, H]. Choices below 0 are left out."""
        out_RH = torch.empty(x_RH.shape, dtype=torch.bfloat16)
        if self._shape is None:
            return out_RH.zero_()
        x_RH, index_RK, weight_RK = x_RH.contiguous(), index_RK.contiguous(), weight_RK.contiguous()
        self.lib.emoe_experts(
            x_RH.data_ptr(),
            *x_RH.shape,
            *self.arguments,
            index_RK.data_ptr(),
            index_RK.itemsize,
            weight_RK.data_ptr(),
            weight_RK.itemsize,
            index_RK.shape[1],
            out_RH.data_ptr(),
            torch.get_num_threads(),
        )
        return out_RH
