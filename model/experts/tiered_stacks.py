"""The experts of one layer on a GPU of which some come when a step needs them; those in the stacks are always there.

A layer whose experts all lie in the stacks is computed as in stacked.py, and the CPU waits for nothing. Otherwise the
CPU must know which experts the rows have chosen. It waits for that once, when the layer begins. Then it only launches:
the products of the experts that are there, the copies of those that come (model/tiers/far.py), and their products, for
which the device waits by itself. Few rows of an expert that lies in the host's memory may be computed there by the
host's cores, while the device computes the others.

Outputs are kept by (row, choice) and added up as in stacked.py, so a sum does not depend on the order in which experts
came.

Legend: R rows (tokens sent to this worker), H hidden, K experts per token, N = R*K (row, choice) pairs, S slots of the
stacks, E logical experts, X = E + 1.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from elastic_moe.model import staging
from elastic_moe.model.experts.interface import ABSENT, Next, Tensors
from elastic_moe.model.experts.stacked import Slots, StackedExperts, feed_forward, weighted_sum
from elastic_moe.model.experts.unpacking import Packing
from elastic_moe.model.record_layout import RecordLayout, lay_out

HOST_ROWS = 64
"""Most rows of a step that are copied to the host beside their choices, so that its cores may compute some of them."""

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Pairs:
    """The pairs of a step, in the order in which they are computed: those of the stacks by slot, then the others."""

    order_N: IntArray
    key_N: IntArray
    """Slot of the pair's expert; S + expert if it has no slot; S + E if it is ABSENT. Sorted."""
    rows: Mapping[int, slice]
    """The pairs of each active expert, in the order of the experts."""

    @classmethod
    def of(cls, index_N: IntArray, experts: Sequence[int], num_experts: int) -> _Pairs:
        """index_N: expert of each pair, or ABSENT. experts: [S] expert in each slot, or less than 0."""
        size = len(experts)
        # the last entry is ABSENT's, which is the index -1
        key_X = size + np.arange(num_experts + 1)
        for slot, expert in enumerate(experts):
            if expert >= 0:
                key_X[expert] = slot
        keys = key_X[index_N]
        order_N = keys.argsort(kind="stable")
        key_N = keys[order_N]
        found, begins = np.unique(key_N, return_index=True)
        ends = [*begins[1:].tolist(), len(key_N)]
        rows = {
            int(key - size) if key >= size else experts[key]: slice(begin, end)
            for key, begin, end in zip(found.tolist(), begins.tolist(), ends, strict=True)
            if key < size + num_experts
        }
        return cls(order_N=order_N, key_N=key_N, rows=dict(sorted(rows.items())))


class TieredStacks(StackedExperts):
    """A SlottedExperts for GPUs: the slots of its cache are memory of the device."""

    def __init__(self, module: nn.Module, *, kernels: bool = False, packing: Packing | None = None) -> None:
        super().__init__(module, kernels=kernels, packing=packing)
        self._layout: RecordLayout | None = None
        self._next: Next | None = None
        self._served: frozenset[int] = frozenset()
        self._in_slots: dict[int, Tensors] = {}
        self._lent: dict[int, Tensors] = {}
        self._steps: list[list[int]] = []
        self.borrows = False
        """Whether the host's cores may compute experts. It is set once."""
        self.can_borrow = False
        """Whether they may in the layer's present step."""

    def forward(self, x_RH: Tensor, index_RK: Tensor, weight_RK: Tensor) -> Tensor:
        """See LayerExperts. Blocks until the device has computed `index_RK`, if not all experts are in the stacks."""
        slots = self._slots
        if not len(x_RH) or self._all_in_stacks(slots):
            return super().forward(x_RH, index_RK, weight_RK)
        self.can_borrow = self.borrows and len(x_RH) <= HOST_ROWS
        near = staging.to_host([index_RK.long(), x_RH] if self.can_borrow else [index_RK.long()])
        pairs = _Pairs.of(near[0].numpy().reshape(-1), slots.experts, int(self._module.num_experts))  # type: ignore[arg-type]
        if all(expert in slots.experts for expert in pairs.rows):
            self._steps.append(list(pairs.rows))
            return super().forward(x_RH, index_RK, weight_RK)
        order_N, y_NH = self._as_they_come(slots, pairs, x_RH, near[-1], index_RK.shape[1])
        return weighted_sum(y_NH, order_N, index_RK.reshape(-1) == ABSENT, weight_RK).to(x_RH.dtype)

    def _all_in_stacks(self, slots: Slots) -> bool:
        """Whether the steps to come need no other experts than those of the stacks."""
        return self._next is None or self._served.issubset(slots.experts)

    @property
    def memory(self) -> object | None:
        return super().memory if self._all_in_stacks(self._slots) else None

    def _as_they_come(
        self, slots: Slots, pairs: _Pairs, x_RH: Tensor, near_RH: Tensor, choices: int
    ) -> tuple[Tensor, Tensor]:
        """([N] the pairs' order, [N, H] their outputs). `near_RH`: the rows in the host's memory, if `can_borrow`."""
        assert self._next is not None
        size = len(slots.experts)
        end_S = pairs.key_N.searchsorted(np.arange(size), side="right")
        order_N, slot_N, ends_S = staging.to_device(
            [pairs.order_N, pairs.key_N.clip(max=max(0, size - 1)), end_S], x_RH.device
        )
        x_NH = x_RH.index_select(0, order_N.div(choices, rounding_mode="floor"))
        y_NH = torch.empty_like(x_NH)
        stacked = slice(0, int(end_S[-1]) if size else 0)
        ready = self._next(list(pairs.rows), [rows.stop - rows.start for rows in pairs.rows.values()])
        while ready:
            outside = [expert for expert in ready if expert not in slots.experts]
            if len(outside) < len(ready):
                # those in the stacks are handed out together
                y_NH[stacked] = self._run(slots.stacks, x_NH[stacked], slot_N[stacked], ends_S.int())
            for expert in outside:
                rows = pairs.rows[expert]
                if expert in self._lent:
                    near = torch.from_numpy(pairs.order_N[rows] // choices)
                    y_NH[rows] = self._run_near(expert, near_RH.index_select(0, near), x_RH.device)
                else:
                    y_NH[rows] = self._run_one(self._tensors(expert), x_NH[rows])
            ready = self._next(ready, None)
        return order_N, y_NH

    def _run_one(self, tensors: Tensors, x_NH: Tensor) -> Tensor:
        """Run rows through one expert, where it lies."""

        def project(x: Tensor, name: str) -> Tensor:
            if self.packing is not None:
                weight = self.packing.matrix(tensors, name).T
            else:
                weight = tensors[name] if self._module.is_transposed else tensors[name].T
            y, bias = x @ weight, tensors.get(f"{name}_bias")
            return y if bias is None else y + bias

        return feed_forward(self._module, x_NH, project)

    def _run_near(self, expert: int, x_NH: Tensor, device: torch.device) -> Tensor:
        """Run rows through a lent expert on the host's cores. The output is copied to the device without a wait."""
        y_NH = self._run_one(self._lent[expert], x_NH)
        return (y_NH.pin_memory() if device.type == "cuda" else y_NH).to(device, non_blocking=True)

    def _tensors(self, expert: int) -> Tensors:
        found = self._in_slots.get(expert) or self._beside.get(expert)
        assert found is not None, f"expert {expert} is not in the device"
        return found

    # --- Experts in slots of a cache ----------------------------------------------------------------------------

    def layout(self, tensors: Tensors) -> RecordLayout:
        if self._layout is None:
            packing = self.packing
            kept = tensors if packing is None else packing.kept(tensors)
            self._layout = lay_out("plain" if packing is None else f"rows, {packing.form}", kept)
        return self._layout

    def write(self, tensors: Tensors, slot: Tensor) -> None:
        if self.packing is not None:
            tensors = self.packing.kept(tensors)
        for name, view in self._views(slot).items():
            view.copy_(tensors[name])

    def read(self, slot: Tensor) -> Tensors:
        return {name: view.clone() for name, view in self._views(slot).items()}

    def _views(self, slot: Tensor) -> Tensors:
        assert self._layout is not None
        return self._layout.views(slot)

    def bind(self, expert: int, slot: Tensor) -> None:
        self._in_slots[expert] = self._views(slot)

    def unbind(self, expert: int) -> None:
        del self._in_slots[expert]

    def serve(self, experts: Collection[int]) -> None:
        self._served = frozenset(experts)

    def lend(self, slots: Mapping[int, Tensor]) -> None:
        """Compute these experts from slots of the host's memory, until the next call."""
        self._lent = {expert: self._views(slot) for expert, slot in slots.items()}

    def run_lent(self, slot: Tensor) -> None:
        """Run one row through the expert in a slot of the host's memory, to see how long it takes."""
        tensors = self._views(slot)
        first = tensors["gate_up_proj" if self._module.has_gate else "up_proj"]
        if self.packing is not None:
            hidden, dtype = self.packing.inputs(first), self.packing.dtype
        else:
            hidden, dtype = first.shape[0 if self._module.is_transposed else 1], first.dtype
        self._run_one(tensors, torch.zeros(1, hidden, dtype=dtype))

    def supply(self, layer: int, next_ready: Next) -> None:
        self._next = next_ready

    def take_steps(self) -> list[list[int]]:
        steps, self._steps = self._steps, []
        return steps

    def take_error(self) -> BaseException | None:
        return None
