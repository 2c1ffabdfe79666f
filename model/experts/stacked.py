"""The experts of one layer in slots of stacked tensors, for GPUs. One grouped product computes them.

Rows are sorted and counted on the device, so that the CPU never waits for it; in bfloat16 the kernels of model/gpu/ do
this, and add up the outputs. An expert that arrives while steps run
lies beside the stacks, in tensors of its own. `keep_only`, which runs between two steps, writes it into a slot that has
become free. So a slot that a step may read is never written, and no spare slots are needed. If the number of experts
changes, the layer's stacks are made anew, one parameter at a time.

Slots are written on the device's default stream, which runs operations in the order in which they were launched. What
other threads read and bring runs beside it (staging.py). A flip changes many slots of all layers while no step runs, so
`keep_together` launches their copies as one, and sends all tables at once. Packed experts lie packed in the stacks
(unpacking.py). Kernels read them there for few rows, and for some rows of each; otherwise those that have rows are
unpacked first.

Legend: R rows (tokens sent to this worker), H hidden, F expert width, K experts per token, N = R*K (row, choice) pairs,
S slots, E logical experts, X = E + 1.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from types import ModuleType

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elastic_moe.model.experts.interface import Tensors
from elastic_moe.model.experts.packed_trial import tried
from elastic_moe.model.experts.unpacking import Packing, active_slots
from elastic_moe.model.native.experts import find_gate
from elastic_moe.model.staging import beside_steps, passed, recorded, to_device
from elastic_moe.model.torch_private import copy_all
from elastic_moe.model.transformers_private import apply_gate

Gated = Callable[[Tensor], Tensor]
"""Applies a gate: [R, 2F] -> [R, F]."""

_FREE = -1
_ALIGNED = 16
"""A grouped product needs matrices whose rows are a multiple of this number of bytes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Slots:
    """What a step reads. It never changes, except in slots that hold no expert."""

    stacks: Tensors = field(default_factory=dict)
    """[S, ...] by parameter name."""
    experts: tuple[int, ...] = ()
    """[S] logical expert in each slot, or _FREE."""
    slot_X: Tensor = field(default_factory=lambda: torch.empty(0))
    """Slot of each logical expert, or S if it has no slot. The last entry is for ABSENT and is S. Its memory stays the
    same while S does, so that a CUDA graph reads the entries as they are."""
    number_S: Tensor = field(default_factory=lambda: torch.empty(0))
    """0, 1, ... S - 1."""


class StackedExperts:
    """A LayerExperts for GPUs."""

    def __init__(self, module: nn.Module, *, kernels: bool = False, packing: Packing | None = None) -> None:
        """`module` is the trunk's expert module, without weights; it knows layout and gate. `kernels`: whether those of
        model/gpu/ serve its dtype and device. `packing`: how experts come and are kept; None: in the served dtype."""
        self._module = module
        self.num_experts = int(module.num_experts)  # type: ignore[arg-type]
        self.packing = packing
        self._pairs: ModuleType | None = None
        self._few: ModuleType | None = None
        self._run_few: Callable[..., Tensor] | None = None
        self._grouped: ModuleType | None = None
        self._gate: Gated | None = None
        if kernels:
            # Triton, which they need, is there only with torch for CUDA
            from elastic_moe.model.gpu import few, few_packed, grouped, packed, pairs, rows

            self._pairs = pairs
            reads = packing is None or tried(packing.form, packing.dtype, packing.device) is None
            if packing is not None and reads:
                packing.kernels, self._grouped = packed, grouped
            gate = find_gate(module)
            if gate is not None and gate.kind == 0 and not gate.interleaved and math.isinf(gate.limit):
                self._gate = rows.silu_gate
                # it reads matrices where they lie
                self._few = None if module.is_transposed or not reads else few
                self._run_few = few.run_few if packing is None else few_packed.run_few
        self._lock = threading.Lock()
        self._slots = Slots()
        self._beside: dict[int, Tensors] = {}
        self._left: list[Tensors] = []
        """Those that the last flip has copied into slots."""
        self._filled: torch.cuda.Event | None = None
        """When the slots have what was last written."""
        self._reads: list[torch.cuda.Event] = []
        """When those are done that other streams have begun."""

    def reserve(self, count: int) -> None:
        with self._lock:
            assert not self._slots.stacks, "reserve() comes before the first put()"
            self._slots = Slots(experts=(_FREE,) * count)

    def put(self, expert: int, tensors: Tensors, *, borrowed: bool = False) -> None:
        if borrowed:
            tensors = {name: tensor.clone() for name, tensor in tensors.items()}
        if self.packing is not None:
            tensors = self.packing.kept(tensors)
        with self._lock:
            slots = self._slots
            if expert in slots.experts:
                return
            if _FREE not in slots.experts:
                self._beside[expert] = tensors
                return
            stacks = slots.stacks or {
                name: tensor.new_empty(len(slots.experts), *tensor.shape) for name, tensor in tensors.items()
            }
            self._left = []
            _write([_Filling.of(self, stacks, slots.experts, {expert: tensors})])

    def get(self, expert: int) -> Tensors:
        with self._lock:
            held = next(iter((self._beside.get(expert) or self._slots.stacks).values()), None)
        device = torch.device("cpu") if held is None else held.device
        with beside_steps(device), read_together([self], [(0, expert)]) as found:
            if not found:
                raise KeyError(expert)
            return {name: tensor.clone() for name, tensor in found[0, expert].items()}

    def _tensors_of(self, expert: int) -> Tensors | None:
        if expert in self._beside:
            return self._beside[expert]
        if expert not in self._slots.experts:
            return None
        slot = self._slots.experts.index(expert)
        return {name: stack[slot] for name, stack in self._slots.stacks.items()}

    def held(self) -> frozenset[int]:
        with self._lock:
            return frozenset(self._slots.experts).union(self._beside) - {_FREE}

    def keep_only(self, wanted: Set[int]) -> None:
        keep_together([self], [wanted])

    def _keep(self, wanted: Set[int]) -> _Filling | None:
        """What is to be written so that the slots hold these experts; None if they do. The lock is held."""
        beside = {expert: tensors for expert, tensors in self._beside.items() if expert in wanted}
        experts = tuple(expert if expert in wanted else _FREE for expert in self._slots.experts)
        kept = [slot for slot, expert in enumerate(experts) if expert != _FREE]
        self._beside = {}
        stacks = self._slots.stacks
        if len(kept) == len(experts) and not beside:
            return None
        if not stacks and not beside:
            self._slots = Slots()
            return None
        if len(kept) + len(beside) != len(experts):
            stacks = self._resize(kept, beside)
            experts = tuple(experts[slot] for slot in kept) + (_FREE,) * len(beside)
        self._left = list(beside.values())
        return _Filling.of(self, stacks, experts, beside)

    def release(self) -> None:
        """Free the memory in which experts lay until the last flip. It takes as long as some hundred launches, so a
        flip leaves it to its caller's next quiet moment."""
        with self._lock:
            self._left = []

    def _resize(self, kept: list[int], beside: dict[int, Tensors]) -> Tensors:
        """Make stacks of the kept slots and of one free slot for each expert in `beside`."""
        old = self._slots.stacks or {name: t.new_empty(0, *t.shape) for name, t in next(iter(beside.values())).items()}
        new: Tensors = {}
        for name, stack in old.items():
            new[name] = stack.new_empty(len(kept) + len(beside), *stack.shape[1:])
            for slot, kept_slot in enumerate(kept):
                new[name][slot].copy_(stack[kept_slot])
        return new

    def _written(self, filling: _Filling, table: Tensor, number: Tensor, filled: torch.cuda.Event | None) -> None:
        old, size = self._slots, len(filling.experts)
        self._filled, self._reads = filled, []
        if old.stacks and len(old.number_S) == size:
            table, number = old.slot_X.copy_(table), old.number_S
        self._slots = Slots(stacks=filling.stacks, experts=filling.experts, slot_X=table, number_S=number)

    @property
    def memory(self) -> object | None:
        """What a CUDA graph of `forward` reads. The graph is right as long as this is the same object; None if forward
        needs the CPU: without kernels it reads how many rows each expert has."""
        return self._slots.stacks or None if self._pairs is not None else None

    @property
    def nbytes(self) -> int:
        with self._lock:
            return sum(t.nbytes for tensors in (self._slots.stacks, *self._beside.values()) for t in tensors.values())

    def forward(self, x_RH: Tensor, index_RK: Tensor, weight_RK: Tensor) -> Tensor:
        """See LayerExperts. A row is summed in the order of its choices and in float32, whatever the dtype."""
        slots = self._slots
        size, (rows, choices) = len(slots.experts), index_RK.shape
        if not slots.stacks or not rows or not size:
            return torch.zeros_like(x_RH)
        biased = any(name.endswith("_bias") for name in slots.stacks)
        if self._few is not None and index_RK.numel() <= self._few.MOST_PAIRS and not biased:
            assert self._run_few is not None
            names, packing = ("gate_up_proj", "down_proj"), self.packing
            stacks = [slots.stacks[n] if packing is None else packing.stack(slots.stacks, n) for n in names]
            return self._run_few(*stacks, slots.slot_X, x_RH, index_RK, weight_RK)
        if self._pairs is not None:
            place_N, end_S = self._pairs.places(slots.slot_X, index_RK, size)
            x_NH = self._pairs.spread(x_RH, place_N, choices)
            slot_N = None
            if biased:
                number_N = torch.arange(len(x_NH), device=x_NH.device, dtype=torch.int32)
                slot_N = torch.searchsorted(end_S, number_N, right=True).clamp(max=size - 1)
            sums_RH: Tensor = self._pairs.gather_sum(
                self._run(slots.stacks, x_NH, slot_N, end_S), place_N, end_S, weight_RK
            )
            return sums_RH
        slot_N = slots.slot_X[index_RK.reshape(-1).long()]
        sorted_N, order_N = slot_N.sort(stable=True)
        end_S = torch.searchsorted(sorted_N, slots.number_S, right=True, out_int32=True)
        x_NH = x_RH.index_select(0, order_N.div(choices, rounding_mode="floor"))
        y_NH = self._run(slots.stacks, x_NH, sorted_N.clamp(max=size - 1), end_S)
        return weighted_sum(y_NH, order_N, slot_N == size, weight_RK).to(x_RH.dtype)

    def _run(self, stacks: Tensors, x_NH: Tensor, slot_N: Tensor | None, end_S: Tensor) -> Tensor:
        """Run rows, which are sorted by slot, through their experts. Only biases need `slot_N`."""
        chosen_A = None
        packed = self._grouped if self._grouped and len(x_NH) <= self._grouped.MOST_ROWS * len(end_S) else None
        if self.packing is not None and packed is None and len(x_NH) < len(end_S):
            # no more slots than rows are unpacked
            chosen_A, end_S = active_slots(end_S, len(x_NH))

        def project(x: Tensor, name: str) -> Tensor:
            if packed is not None and self.packing is not None:
                y: Tensor = packed.grouped(x, self.packing.stack(stacks, name), end_S)
            elif self.packing is not None:
                y = grouped_product(x, self.packing.weights(stacks, name, chosen_A).transpose(1, 2), end_S)
            else:
                weight = stacks[name] if self._module.is_transposed else stacks[name].transpose(1, 2)
                y = grouped_product(x, weight, end_S)
            bias = stacks.get(f"{name}_bias")
            return y if bias is None else y + bias[slot_N]

        return feed_forward(self._module, x_NH, project, self._gate)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Filling:
    """Experts that are to be written into free slots of a layer."""

    layer: StackedExperts
    stacks: Tensors
    experts: tuple[int, ...]
    """[S] as Slots has them, when that is done."""
    targets: list[Tensor]
    sources: list[Tensor]
    slot_X: npt.NDArray[np.int64]

    @classmethod
    def of(
        cls, layer: StackedExperts, stacks: Tensors, experts: tuple[int, ...], new: Mapping[int, Tensors]
    ) -> _Filling:
        filled, size = list(experts), len(experts)
        targets: list[Tensor] = []
        sources: list[Tensor] = []
        # the views of all slots at once, where there are many to write
        views = {name: stack.unbind() if len(new) > 1 else stack for name, stack in stacks.items()}
        for expert, tensors in new.items():
            slot = filled.index(_FREE)
            filled[slot] = expert
            targets += [views[name][slot] for name in tensors]
            sources += tensors.values()
        slot_X = np.full(layer.num_experts + 1, size, dtype=np.int64)
        for slot, expert in enumerate(filled):
            if expert != _FREE:
                slot_X[expert] = slot
        return cls(layer=layer, stacks=stacks, experts=tuple(filled), targets=targets, sources=sources, slot_X=slot_X)


def _write(fillings: Sequence[_Filling]) -> None:
    """Launch the copies of all layers together, and send all tables at once."""
    if not fillings:
        return
    for read in {read for filling in fillings for read in filling.layer._reads}:
        read.wait()
    stacks = [stack for filling in fillings for stack in filling.stacks.values()]
    device = stacks[0].device if stacks else torch.device("cpu")
    by_dtype: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]] = {}
    for filling in fillings:
        for target, source in zip(filling.targets, filling.sources, strict=True):
            targets, sources = by_dtype.setdefault(target.dtype, ([], []))
            targets.append(target)
            sources.append(source)
    for targets, sources in by_dtype.values():
        copy_all(targets, sources)
    tables = to_device(
        [array for filling in fillings for array in (filling.slot_X, np.arange(len(filling.experts)))], device
    )
    filled = recorded() if device.type == "cuda" else None
    for filling, table, number in zip(fillings, tables[::2], tables[1::2], strict=True):
        filling.layer._written(filling, table, number, filled)


@contextmanager
def read_together(
    layers: Sequence[StackedExperts], pairs: Sequence[tuple[int, int]]
) -> Iterator[dict[tuple[int, int], Tensors]]:
    """Those of the experts, given as (layer, expert), that are held. Within the block, what is launched on the present
    stream may read their tensors: flips wait for it, on the device. The caller keeps the tensors until it has waited
    for the stream."""
    with ExitStack() as locks:
        taken = [layers[number] for number in sorted({number for number, _ in pairs})]
        for layer in taken:
            locks.enter_context(layer._lock)
        for filled in {layer._filled for layer in taken if layer._filled is not None}:
            filled.wait()
        held = {pair: layers[pair[0]]._tensors_of(pair[1]) for pair in pairs}
        found = {pair: tensors for pair, tensors in held.items() if tensors is not None}
        yield found
        if any(tensor.is_cuda for tensors in found.values() for tensor in tensors.values()):
            read = recorded()
            for layer in taken:
                layer._reads = [*(event for event in layer._reads if not passed(event)), read]


def keep_together(layers: Sequence[StackedExperts], wanted: Sequence[Set[int]]) -> None:
    """`keep_only` of several layers, with as few launches as possible."""
    with ExitStack() as locks:
        for layer in layers:
            locks.enter_context(layer._lock)
        fillings = [layer._keep(experts) for layer, experts in zip(layers, wanted, strict=True)]
        _write([filling for filling in fillings if filling is not None])


def feed_forward(
    module: nn.Module, x_NH: Tensor, project: Callable[[Tensor, str], Tensor], gate: Gated | None = None
) -> Tensor:
    """Run rows through experts. `project` multiplies rows by the matrix of the given name, and adds its bias. `gate`
    computes what the module's gate does; None: the module's own code does it."""
    hidden_NF = project(x_NH, "gate_up_proj" if module.has_gate else "up_proj")
    if gate is not None:
        gated_NF = gate(hidden_NF)
    else:
        gated_NF = apply_gate(module, hidden_NF) if module.has_gate else module.act_fn(hidden_NF)  # type: ignore[operator]
    return project(gated_NF, "down_proj")


def weighted_sum(y_NH: Tensor, order_N: Tensor, absent_N: Tensor, weight_RK: Tensor) -> Tensor:
    """[R, H] in float32: the sum over each row's choices, in their order.

    Row n of `y_NH` is the output of pair order_N[n]. Pairs that are `absent_N` count nothing: they were not computed,
    so their rows hold whatever was in memory, even NaN.
    """
    place_N = torch.empty_like(order_N)
    place_N[order_N] = torch.arange(len(order_N), device=order_N.device)
    y_RKH = y_NH.index_select(0, place_N).view(*weight_RK.shape, -1).float()
    y_RKH = y_RKH * weight_RK[..., None].float()
    return y_RKH.masked_fill_(absent_N.view(*weight_RK.shape, 1), 0.0).sum(1)


def grouped_product(x_NI: Tensor, weight_SIO: Tensor, end_S: Tensor) -> Tensor:
    """Multiply rows before end_S[0] by the first matrix, rows before end_S[1] by the second, and so on: [N, O].

    Rows past the last end are not written. In bfloat16 on Hopper and later GPUs it is one kernel. In other dtypes and
    on older GPUs PyTorch multiplies slot by slot, and the CPU waits for the ends.
    """
    itemsize = x_NI.dtype.itemsize
    if all(size * itemsize % _ALIGNED == 0 for size in weight_SIO.shape[1:]):
        return F.grouped_mm(x_NI, weight_SIO, offs=end_S)
    y_NO = x_NI.new_empty(len(x_NI), weight_SIO.shape[2])
    begin = 0
    for slot, end in enumerate(end_S.tolist()):
        torch.matmul(x_NI[begin:end], weight_SIO[slot], out=y_NO[begin:end])
        begin = end
    return y_NO
