"""The experts of one layer on CPU, each in the layout in which its products read it.

In bfloat16 the native library holds and computes the experts (model/native/experts.py), if it is available and knows
the layer's gate. Otherwise PyTorch's operators compute them, expert by expert.

Legend: R rows (tokens sent to this worker), H hidden, F expert width, K experts per token, S sorted (row, choice)
pairs.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping, Sequence, Set

import torch
from torch import Tensor, nn

from elastic_moe.cluster.errors import UserError
from elastic_moe.cluster.expert_forms import ExpertForm
from elastic_moe.model.experts.interface import Next, Tensors
from elastic_moe.model.native.experts import NativeExperts, Supply
from elastic_moe.model.native.linear import Packed
from elastic_moe.model.record_layout import RecordLayout, lay_out
from elastic_moe.model.transformers_private import apply_gate
from elastic_moe.model.trunk.linear import Weight, linear, nbytes, pack, unpack


class CpuExperts:
    """A SlottedExperts for CPUs."""

    def __init__(self, module: nn.Module, native: NativeExperts | str = "it was not asked for") -> None:
        """`module` is the trunk's expert module, without weights; it knows layout and gate.

        `native` holds and computes the experts in the native library, or is the reason why the library cannot.
        """
        self._module = module
        self._weights: dict[int, dict[str, Weight]] = {}
        """Experts that PyTorch's operators compute. Empty if the native library computes them."""
        self._in_slots: dict[int, dict[str, Weight]] = {}
        """Experts that PyTorch's operators compute from slots of a cache."""
        self._layout: RecordLayout | None = None
        self._next: Next | None = None
        self._steps: list[list[int]] = []
        self.native: NativeExperts | None = native if isinstance(native, NativeExperts) else None
        self.reason = native if isinstance(native, str) else None
        """Why the native library does not compute the experts; None if it does."""

    def reserve(self, count: int) -> None: ...

    def put(self, expert: int, tensors: Tensors, *, borrowed: bool = False) -> None:
        self._choose(tensors)
        if borrowed:
            # packing a matrix copies it anyway
            packs = self.native is not None
            tensors = {name: t if packs and t.dim() == 2 else t.clone() for name, t in tensors.items()}
        if self.native is not None:
            self.native.put(expert, tensors)
            return
        self._weights[expert] = self._as_weights(tensors)

    def _as_weights(self, tensors: Tensors) -> dict[str, Weight]:
        plain = self._module.is_transposed
        return {name: tensor if plain or tensor.dim() != 2 else pack(tensor) for name, tensor in tensors.items()}

    def _choose(self, tensors: Tensors) -> None:
        if self.native is not None and not self.native.takes(tensors):
            self._leave_native("a matrix has an odd number of columns")

    def _leave_native(self, reason: str) -> None:
        """Compute this layer by PyTorch. All its experts have the same shapes, so the first one decides."""
        assert self.native is not None
        assert not self.native.held()
        if self.native.form is not ExpertForm.PLAIN:
            raise not_native(self.native.form, reason)
        self.native, self.reason = None, reason

    def get(self, expert: int) -> Tensors:
        if self.native is not None:
            return self.native.get(expert)
        return {name: unpack(weight) for name, weight in self._weights[expert].items()}

    def held(self) -> frozenset[int]:
        return frozenset(self._weights) if self.native is None else self.native.held()

    def keep_only(self, wanted: Set[int]) -> None:
        for expert in self.held() - wanted:
            if self.native is not None:
                self.native.drop(expert)
            else:
                del self._weights[expert]

    @property
    def nbytes(self) -> int:
        if self.native is not None:
            return self.native.nbytes
        return sum(nbytes(weight) for tensors in self._weights.values() for weight in tensors.values())

    def forward(self, x_RH: Tensor, index_RK: Tensor, weight_RK: Tensor) -> Tensor:
        """Compute LayerExperts.forward."""
        return self.sums(x_RH, index_RK, weight_RK).to(x_RH.dtype)

    def sums(self, x_RH: Tensor, index_RK: Tensor, weight_RK: Tensor) -> Tensor:
        """As `forward`, but in float64 for rows in float32: a sum is then rounded once, by whoever has all its parts,
        and is the same in whatever parts it comes. For other rows the sums are in float32, and rounded.

        Rows are sorted by expert; then come all gate-up products, one activation, and all down products. This is as
        fast as a loop over whole experts and needs fewer operators.
        """
        if self.native is not None:
            return self.native.forward(x_RH, index_RK, weight_RK)
        num_choices = index_RK.shape[1]
        flat = index_RK.reshape(-1)
        order = flat.argsort(stable=True)
        counts = torch.bincount(flat + 1).tolist() if flat.numel() else [0]
        order_S = order[counts[0] :]
        exact = x_RH.dtype == torch.float32
        out_RH = torch.zeros(x_RH.shape, dtype=torch.float64 if exact else torch.float32, device=x_RH.device)
        if order_S.numel() == 0:
            return out_RH if exact else out_RH.to(x_RH.dtype)
        row_S = order_S.div(num_choices, rounding_mode="floor")
        active = {e: n for e, n in enumerate(counts[1:]) if n}
        y_SH = self._outputs(x_RH, row_S, active)
        y_SH = y_SH.float() * weight_RK.reshape(-1)[order_S, None].float()
        out_RH.index_add_(0, row_S, y_SH.to(out_RH.dtype))
        return out_RH if exact else out_RH.to(x_RH.dtype)

    def _outputs(self, x_RH: Tensor, row_S: Tensor, active: Mapping[int, int]) -> Tensor:
        """Outputs [S, H] of the sorted pairs. `active` are the experts and their pairs, in order."""
        if self._next is None or all(self._weight_of(e) is not None for e in active):
            if self._next is not None:
                self._steps.append(list(active))
            return self._run(x_RH, row_S, active)
        # experts come in any order, and their outputs are added up in the order of the experts all the same
        begins = dict(zip(active, itertools.accumulate([0, *active.values()]), strict=False))
        y_SH = x_RH.new_empty(len(row_S), x_RH.shape[1])
        ready = self._next(list(active), list(active.values()))
        while ready:
            for e in ready:
                here = slice(begins[e], begins[e] + active[e])
                y_SH[here] = self._run(x_RH, row_S[here], {e: active[e]})
            ready = self._next(ready, None)
        return y_SH

    def _weight_of(self, expert: int) -> Mapping[str, Weight] | None:
        return self._weights.get(expert) or self._in_slots.get(expert)

    def _run(self, x_RH: Tensor, row_S: Tensor, active: Mapping[int, int]) -> Tensor:
        groups = []
        for expert, count in active.items():
            weights = self._weight_of(expert)
            assert weights is not None, f"expert {expert} is not in memory"
            groups.append((weights, count))
        return _run_experts(self._module, x_RH.index_select(0, row_S), groups)

    # --- Experts in slots of a cache ----------------------------------------------------------------------------

    def layout(self, tensors: Tensors) -> RecordLayout:
        self._choose(tensors)
        if self.native is not None:
            return self.native.layout(tensors)
        if self._layout is None:
            self._layout = lay_out("plain", tensors)
        return self._layout

    def write(self, tensors: Tensors, slot: Tensor) -> None:
        if self.native is not None:
            self.native.write(tensors, slot)
            return
        assert self._layout is not None
        for name, view in self._layout.views(slot).items():
            view.copy_(tensors[name])

    def read(self, slot: Tensor) -> Tensors:
        if self.native is not None:
            return self.native.read(slot)
        assert self._layout is not None
        return {name: view.clone() for name, view in self._layout.views(slot).items()}

    def bind(self, expert: int, slot: Tensor) -> None:
        if self.native is not None:
            self.native.bind(expert, slot)
            return
        assert self._layout is not None
        self._in_slots[expert] = self._as_weights(self._layout.views(slot))

    def unbind(self, expert: int) -> None:
        if self.native is not None:
            self.native.unbind(expert)
        else:
            del self._in_slots[expert]

    def serve(self, experts: Collection[int]) -> None: ...

    def supply(self, layer: int, next_ready: Next) -> None:
        if self.native is not None:
            self.native.supply = Supply(layer, next_ready)
        else:
            self._next = next_ready

    def take_steps(self) -> list[list[int]]:
        if self.native is not None:
            return [] if self.native.supply is None else self.native.supply.take_log()
        steps, self._steps = self._steps, []
        return steps

    def take_error(self) -> BaseException | None:
        if self.native is None or self.native.supply is None:
            return None
        error, self.native.supply.error = self.native.supply.error, None
        return error


def not_native(form: ExpertForm, reason: str) -> UserError:
    return UserError(f"expert_dtype: {form} needs the native library: {reason}; bfloat16 does not need it")


def _run_experts(module: nn.Module, x_SH: Tensor, groups: Sequence[tuple[Mapping[str, Weight], int]]) -> Tensor:
    """Run rows of `x_SH` through their experts. `groups` are (expert, number of rows), in the order of the rows."""
    transposed = bool(module.is_transposed)
    sizes = [count for _, count in groups]
    first = "gate_up_proj" if module.has_gate else "up_proj"

    def project(x: Tensor, name: str) -> Tensor:
        parts = torch.split(x, sizes)
        return torch.cat([_linear(part, w, name, transposed) for part, (w, _) in zip(parts, groups, strict=True)])

    hidden_SF = project(x_SH, first)
    hidden_SF = apply_gate(module, hidden_SF) if module.has_gate else module.act_fn(hidden_SF)  # type: ignore[operator]
    return project(hidden_SF, "down_proj")


def _linear(x: Tensor, tensors: Mapping[str, Weight], name: str, transposed: bool) -> Tensor:
    weight = tensors[name]
    bias: Tensor | None = tensors.get(f"{name}_bias")  # type: ignore[assignment]  # only matrices are packed
    if not transposed or isinstance(weight, Packed):
        return linear(x, weight, bias)
    return x @ weight if bias is None else torch.addmm(bias, x, weight)
