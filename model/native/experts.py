"""Holds and computes the experts of one layer in the native library.

Legend: R rows, H hidden, F expert width, K experts per token, E logical experts.
"""

from __future__ import annotations

import ctypes
import itertools
import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elastic_moe.cluster.errors import EmoeError
from elastic_moe.cluster.expert_forms import ExpertForm
from elastic_moe.model.int4 import EACH, ZERO
from elastic_moe.model.int8 import SCALE, quantize
from elastic_moe.model.native.linear import (
    NUMBERS,
    Packed,
    can_pack,
    pack,
    pack4,
    pack8,
    pack_nvfp4,
    round4,
    unpack,
    unpack4,
    unpack8,
    unpack_nvfp4,
)
from elastic_moe.model.native.structs import SUPPLY_NEXT
from elastic_moe.model.native.structs import Supply as _Supply
from elastic_moe.model.record_layout import RecordLayout, lay_out
from elastic_moe.model.transformers_private import apply_gate


@dataclass(frozen=True, slots=True, kw_only=True)
class Gate:
    """The activation of gate and up. `limit` clamps both first (the gate from above only)."""

    kind: int
    """0: silu(gate) * up; 1: gate * sigmoid(alpha * gate) * (up + 1), which is gpt-oss's; 2: gelu(gate) * up, where
    gelu is approximated by tanh; 3: relu(up) squared, without a gate."""
    interleaved: bool
    """Whether gate and up are the even and the odd columns, and not the first and the second half."""
    limit: float
    alpha: float

    @property
    def parts(self) -> int:
        """Matrices in the first product: gate and up, or up alone."""
        return 1 if self.kind == 3 else 2

    @property
    def first(self) -> str:
        """The name of the first product's matrix."""
        return "up_proj" if self.kind == 3 else "gate_up_proj"

    def __call__(self, gate_up: Tensor) -> Tensor:
        """Apply the gate by torch's operators: [R, 2F] -> [R, F], or [R, F] -> [R, F] without a gate."""
        if self.kind == 3:
            return F.relu(gate_up).square()
        gate, up = (gate_up[..., ::2], gate_up[..., 1::2]) if self.interleaved else gate_up.chunk(2, dim=-1)
        if not math.isinf(self.limit):
            gate, up = gate.clamp(max=self.limit), up.clamp(min=-self.limit, max=self.limit)
        if self.kind == 0:
            return F.silu(gate) * up
        if self.kind == 2:
            return F.gelu(gate, approximate="tanh") * up
        return (up + 1) * (gate * torch.sigmoid(gate * self.alpha))


def find_gate(module: nn.Module) -> Gate | None:
    """Find the gate of an expert module by trials, since families override it and a list of names would go out of date.

    Returns None if no known gate gives the module's values.
    """
    constants = sorted({float(v) for v in vars(module).values() if isinstance(v, float) and v > 0})
    generator = torch.Generator().manual_seed(0)
    # values from tiny ones to ones beyond any limit
    probe = torch.randn(64, 64, generator=generator) * torch.logspace(-2, 3, 64)[:, None]
    probe = probe.to(torch.bfloat16)
    if not module.has_gate:
        gate = Gate(kind=3, interleaved=False, limit=math.inf, alpha=1.0)
        return gate if torch.equal(gate(probe), module.act_fn(probe)) else None  # type: ignore[operator]
    expected = apply_gate(module, probe)
    for kind, interleaved, limit, alpha in itertools.product(
        (0, 1, 2), (False, True), (math.inf, *constants), constants or (1.0,)
    ):
        gate = Gate(kind=kind, interleaved=interleaved, limit=limit, alpha=alpha)
        if torch.equal(gate(probe), expected):
            return gate
    return None


_RECORDED = {ExpertForm.PLAIN: "16 bits", ExpertForm.INT8: "8 bits"}
"""How the layout of a record names a form; other forms have their own name."""

Held = dict[str, Tensor | Packed]
"""One expert's packed matrices and its biases, by parameter name."""

_DOWN = "down_proj"
_BIAS = "_bias"

Next = Callable[[list[int], list[int] | None], list[int]]
"""Brings experts into memory: see `next` of Supply in experts.h. It raises an error if an expert cannot be read."""

UNAVAILABLE = 4
"""What native functions return if an expert cannot be read: kUnavailable in experts.h."""

_LOG = 4096
"""Numbers of a supply's log. A step of many rounds may log more; then the rest is not counted."""


class ExpertUnavailable(EmoeError):
    """An expert could not be brought into memory. The layer's `Supply` has the reason."""


def check_available(status: int) -> None:
    """Raise ExpertUnavailable if the status that a native function returned means so."""
    if status == UNAVAILABLE:
        raise ExpertUnavailable("an expert could not be brought into memory")


class Supply:
    """Lets native functions call `next_ready` when an active expert of a layer is not in memory."""

    def __init__(self, layer: int, next_ready: Next) -> None:
        self.error: BaseException | None = None
        """What `next_ready` has raised, since an error cannot pass through native code."""
        self._next = next_ready
        self._log = (ctypes.c_int64 * _LOG)()
        self._native = _Supply(SUPPLY_NEXT(self._call), layer, self._log, _LOG, 0)
        self.address = ctypes.addressof(self._native)

    def _call(self, layer: int, count: int, experts: Any, rows: Any, ready: Any) -> int:
        try:
            found = self._next(experts[:count], rows[:count] if rows else None)
        except BaseException as error:  # noqa: BLE001 - no error passes through native code
            self.error = error
            return -1
        for n, expert in enumerate(found):
            ready[n] = expert
        return len(found)

    def take_log(self) -> list[list[int]]:
        """The active experts of each step since the last call whose experts were all in memory."""
        numbers = self._log[: self._native.log_used]
        self._native.log_used = 0
        steps = []
        while numbers:
            count = numbers[0]
            steps.append(numbers[1 : 1 + count])
            numbers = numbers[1 + count :]
        return steps


class NativeExperts:
    """Holds the packed experts of one layer, and computes the weighted sum of their outputs.

    It owns their memory, and the table of addresses that the library reads.
    """

    def __init__(self, lib: ctypes.CDLL, module: nn.Module, gate: Gate, form: ExpertForm = ExpertForm.PLAIN) -> None:
        """Experts that come in bfloat16 are rounded to `form`."""
        self.lib = lib
        self.form = form
        self._gate = gate
        self._names = (gate.first, gate.first + _BIAS, _DOWN, _DOWN + _BIAS)
        """The tensors whose addresses the library reads, in the order of its tables."""
        self._transposed = bool(module.is_transposed)
        self._tables_4E = torch.zeros(4, module.num_experts, dtype=torch.int64)  # type: ignore[call-overload]
        """Addresses of gate_up, its bias, down and its bias, by logical expert; 0 if there is no such tensor."""
        self._addresses_E4 = self._tables_4E.numpy().T
        self._held: dict[int, Held] = {}
        self._in_slots: dict[int, Tensor] = {}
        """Experts that lie in slots of a cache, and the slots."""
        self._shape: tuple[int, int] | None = None
        self._template: Held = {}
        """An expert without its data. It has what is known of every expert of the layer."""
        self._layout: RecordLayout | None = None
        self._offsets: list[int | None] = []
        """Where in a slot each of the tables' tensors begins, in bytes; None for a tensor that there is not."""
        self._lock = threading.Lock()
        """Held while an expert's row of the table changes. Steps read rows of other experts meanwhile."""
        self.supply: Supply | None = None
        """Brings experts that are not in memory when a step needs them; None if all are always in memory."""

    def takes(self, tensors: dict[str, Tensor]) -> bool:
        """Whether the library can compute an expert with these tensors. All experts of a layer have the same shapes."""
        return all(
            not tensors[name].is_floating_point() or can_pack(self._turned(tensors[name]))
            for name in (self._gate.first, _DOWN)
        )

    def put(self, expert: int, tensors: dict[str, Tensor]) -> None:
        """Pack an expert and hold it until `drop`. Matrices are copied; dense biases are kept without a copy."""
        self._hold(expert, self._packed(tensors))

    def _hold(self, expert: int, held: Held) -> None:
        down: Any = held[_DOWN]
        self._shape = (down.columns, down.depth)
        with self._lock:
            # the expert's old tensors are freed only after the table has the new addresses
            before = self._held.get(expert)
            self._write(expert, self._addresses(held))
            self._held[expert] = held
        del before

    def _packed(self, tensors: dict[str, Tensor], into: dict[str, Tensor] | None = None) -> Held:
        """Pack an expert, into the bytes of a slot if they are given."""
        places = into or {}
        gate = self._gate
        held: Held = {
            gate.first: self._pack(
                tensors, gate.first, parts=gate.parts, interleaved=gate.interleaved, into=places.get(gate.first)
            ),
            _DOWN: self._pack(tensors, _DOWN, into=places.get(_DOWN)),
        }
        biases = (gate.first + _BIAS, _DOWN + _BIAS)
        return held | {name: tensors[name].contiguous() for name in biases if name in tensors}

    def _addresses(self, held: Held) -> list[int]:
        items = (held.get(name) for name in self._names)
        data = (item.data if isinstance(item, Packed) else item for item in items)
        return [0 if tensor is None else tensor.data_ptr() for tensor in data]

    def _write(self, expert: int, addresses: Sequence[int]) -> None:
        """Write an expert's row of the table. A step that sees its first address sees the others too."""
        first, *others = addresses
        self._addresses_E4[expert, 1:] = others
        self._addresses_E4[expert, 0] = first

    def _slot_addresses(self, expert: int) -> list[int]:
        slot = self._in_slots.get(expert)
        if slot is None:
            return [0] * len(self._names)
        begin = slot.data_ptr()
        return [begin + offset if offset is not None else 0 for offset in self._offsets]

    def _pack(self, tensors: dict[str, Tensor], name: str, **order: Any) -> Packed:
        matrix = tensors[name]
        if self.form is ExpertForm.PLAIN:
            return pack(self.lib, self._turned(matrix), **order)
        # an expert from another worker is rounded already, and so is one that was packed in the checkpoint
        rounded = not matrix.is_floating_point()
        if self.form is ExpertForm.INT8:
            values, scales = (matrix, tensors[name + SCALE]) if rounded else quantize(self._turned(matrix))
            return pack8(self.lib, values, scales, self.form, **order)
        if self.form in (ExpertForm.FP8, ExpertForm.MXFP8):
            assert rounded, "nothing is rounded to FP8"
            return pack8(self.lib, matrix, tensors[name + SCALE], self.form, **order)
        if self.form is ExpertForm.NVFP4:
            return pack_nvfp4(self.lib, matrix, tensors[name + SCALE], tensors[name + EACH], **order)
        if rounded:
            codes = (matrix, tensors[name + SCALE], tensors.get(name + ZERO))
        else:
            codes = round4(self.lib, self._turned(matrix))
        return pack4(self.lib, *codes, self.form, **order)

    # --- Experts in slots of a cache ----------------------------------------------------------------------------

    def layout(self, tensors: dict[str, Tensor]) -> RecordLayout:
        """How an expert lies in a slot. `tensors` are those of any expert of the layer. Call it before `bind`."""
        if self._layout is None:
            held = self._packed(tensors)
            down: Any = held[_DOWN]
            self._shape = (down.columns, down.depth)
            nothing = torch.empty(0, dtype=torch.uint8)
            self._template = {
                name: replace(item, data=nothing) if isinstance(item, Packed) else item for name, item in held.items()
            }
            raw = {name: item.data if isinstance(item, Packed) else item for name, item in held.items()}
            self._layout = lay_out(f"panels of 64, {_RECORDED.get(self.form, self.form)}", raw)
            offsets = {part.name: part.offset for part in self._layout.parts}
            self._offsets = [offsets.get(name) for name in self._names]
        return self._layout

    def _of_slot(self, slot: Tensor) -> Held:
        assert self._layout is not None
        views = self._layout.views(slot)
        items = self._template.items()
        return {n: replace(item, data=views[n]) if isinstance(item, Packed) else views[n] for n, item in items}

    def write(self, tensors: dict[str, Tensor], slot: Tensor) -> None:
        """Pack an expert into a slot."""
        assert self._layout is not None
        views = self._layout.views(slot)
        for name, item in self._packed(tensors, views).items():
            if not isinstance(item, Packed):
                views[name].copy_(item)

    def read(self, slot: Tensor) -> dict[str, Tensor]:
        """The tensors of the expert in a slot, as `get` returns them, in memory of their own."""
        return {name: tensor.clone() for name, tensor in self._tensors(self._of_slot(slot)).items()}

    def bind(self, expert: int, slot: Tensor) -> None:
        """Compute an expert from the slot that it lies in, until `unbind`. Call it between two products."""
        with self._lock:
            self._in_slots[expert] = slot
            if expert not in self._held:
                self._write(expert, self._slot_addresses(expert))

    def unbind(self, expert: int) -> None:
        with self._lock:
            del self._in_slots[expert]
            if expert not in self._held:
                self._write(expert, self._slot_addresses(expert))

    def get(self, expert: int) -> dict[str, Tensor]:
        """The tensors as they were put. But matrices in 8 and 4 bits are always [out, in], with their scales.

        Raises KeyError for an expert that is not held.
        """
        return self._tensors(self._held[expert])

    def _tensors(self, held: Held) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {}
        for name, item in held.items():
            if not isinstance(item, Packed):
                tensors[name] = item
            elif item.form is ExpertForm.PLAIN:
                tensors[name] = self._turned(unpack(item)).contiguous()
            elif item.form in (ExpertForm.INT8, ExpertForm.FP8, ExpertForm.MXFP8):
                tensors[name], tensors[name + SCALE] = unpack8(item)
            elif item.form is ExpertForm.NVFP4:
                tensors[name], tensors[name + SCALE], tensors[name + EACH] = unpack_nvfp4(item)
            else:
                tensors[name], tensors[name + SCALE], zeros = unpack4(item)
                if zeros is not None:
                    tensors[name + ZERO] = zeros
        return tensors

    def drop(self, expert: int) -> None:
        with self._lock:
            held = self._held.pop(expert)
            self._write(expert, self._slot_addresses(expert))
        del held

    def held(self) -> frozenset[int]:
        return frozenset(self._held)

    @property
    def nbytes(self) -> int:
        return sum(item.nbytes for held in self._held.values() for item in held.values())

    def _turned(self, matrix: Tensor) -> Tensor:
        return matrix.T if self._transposed else matrix

    @property
    def arguments(self) -> tuple[int | float | None, ...]:
        """Arguments of native functions that compute these experts. They are valid until the next `put`."""
        gate = self._gate
        _, width = self._shape or (0, 0)
        tables = self._tables_4E
        return (
            width,
            tables.shape[1],
            tables.data_ptr(),
            NUMBERS[self.form],
            gate.interleaved,
            gate.kind,
            gate.alpha,
            gate.limit,
            None if self.supply is None else self.supply.address,
        )

    def forward(self, x_RH: Tensor, index_RK: Tensor, weight_RK: Tensor) -> Tensor:
        """Weighted sum over those of each row's experts that are held here: [R, H]. Choices below 0 are left out."""
        out_RH = torch.empty(x_RH.shape, dtype=torch.bfloat16)
        if self._shape is None:
            return out_RH.zero_()
        x_RH, index_RK, weight_RK = x_RH.contiguous(), index_RK.contiguous(), weight_RK.contiguous()
        status = self.lib.emoe_experts(
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
        check_available(status)
        return out_RH
