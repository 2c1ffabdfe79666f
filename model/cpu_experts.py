"""The experts of one layer on CPU, each in the layout in which its products read it.

In bfloat16 the native library does the arithmetic (model/native/experts.py), where there is one and it knows the
layer's gate; elsewhere PyTorch's operators, expert by expert.

Legend: R rows (tokens sent here), H hidden, F expert width, K experts per token, S sorted (row, choice) pairs.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence, Set

import torch
from torch import Tensor, nn

from cluster.errors import UserError
from model.layer_experts import Tensors
from model.linear import Weight, linear, nbytes, pack, unpack
from model.native import library, unavailable
from model.native.experts import NativeExperts, find_gate
from model.native.linear import Packed


class CpuExperts:
    """A LayerExperts."""

    def __init__(self, module: nn.Module, *, int8: bool = False) -> None:
        """`module` is the trunk's expert module, empty of weights: it knows layout and gate.

        int8: keep weights in 8 bits (model/int8.py). Raises UserError where the native library does not do that.
        """
        self._module = module
        self._int8 = int8
        self._weights: dict[int, dict[str, Weight]] = {}
        self.native = _native(module, 8 if int8 else 16)
        """The layer's arithmetic in the native library, if it does it."""
        if int8 and self.native is None:
            raise no_int8(unavailable() or "it is for bfloat16 on CPU, and for gates that it knows")

    def reserve(self, count: int) -> None: ...

    def put(self, expert: int, tensors: Tensors, *, borrowed: bool = False) -> None:
        if self.native is not None and not self.native.takes(tensors):
            if self._int8:
                raise no_int8("a matrix has an odd number of columns")
            self.native = None
        if borrowed:
            # packing is a copy already
            packs = self.native is not None
            tensors = {name: t if packs and t.dim() == 2 else t.clone() for name, t in tensors.items()}
        if self.native is not None:
            self._weights[expert] = self.native.put(expert, tensors)
            return
        plain = self._module.is_transposed
        self._weights[expert] = {
            name: tensor if plain or tensor.dim() != 2 else pack(tensor) for name, tensor in tensors.items()
        }

    def get(self, expert: int) -> Tensors:
        held = self._weights[expert]
        if self.native is not None:
            return self.native.get(held)
        return {name: unpack(weight) for name, weight in held.items()}

    def held(self) -> frozenset[int]:
        return frozenset(self._weights)

    def keep_only(self, wanted: Set[int]) -> None:
        for expert in self._weights.keys() - wanted:
            if self.native is not None:
                self.native.drop(expert)
            del self._weights[expert]

    @property
    def nbytes(self) -> int:
        return sum(nbytes(weight) for tensors in self._weights.values() for weight in tensors.values())

    def forward(self, x_RH: Tensor, index_RK: Tensor, weight_RK: Tensor) -> Tensor:
        """Rows are sorted by expert; then all gate-ups, one activation, all downs: as fast as a loop over experts and
        with fewer operators. Sums are in float32 whatever the dtype.
        """
        if self.native is not None:
            return self.native.forward(x_RH, index_RK, weight_RK)
        num_choices = index_RK.shape[1]
        flat = index_RK.reshape(-1)
        order = flat.argsort(stable=True)
        counts = torch.bincount(flat + 1).tolist() if flat.numel() else [0]
        order_S = order[counts[0] :]
        out_RH = torch.zeros(x_RH.shape, dtype=torch.float32, device=x_RH.device)
        if order_S.numel() == 0:
            return out_RH.to(x_RH.dtype)
        row_S = order_S.div(num_choices, rounding_mode="floor")
        groups = [(self._weights[e], n) for e, n in enumerate(counts[1:]) if n]
        y_SH = _run_experts(self._module, x_RH.index_select(0, row_S), groups)
        y_SH = y_SH.float() * weight_RK.reshape(-1)[order_S, None].float()
        return out_RH.index_add_(0, row_S, y_SH).to(x_RH.dtype)


def no_int8(reason: str) -> UserError:
    return UserError(f"expert_dtype: int8 needs the native library: {reason}")


def _native(module: nn.Module, bits: int) -> NativeExperts | None:
    """The native arithmetic of a layer, if there is one for its dtype, device and gate."""
    like = next(itertools.chain(module.parameters(), module.buffers()))
    if like.dtype != torch.bfloat16 or like.device.type != "cpu":
        return None
    lib = library()
    gate = None if lib is None else find_gate(module)
    return None if lib is None or gate is None else NativeExperts(lib, module, gate, bits=bits)


def _run_experts(module: nn.Module, x_SH: Tensor, groups: Sequence[tuple[Mapping[str, Weight], int]]) -> Tensor:
    """Rows of `x_SH` in consecutive groups, each through its expert."""
    transposed = bool(module.is_transposed)
    sizes = [count for _, count in groups]
    first = "gate_up_proj" if module.has_gate else "up_proj"

    def project(x: Tensor, name: str) -> Tensor:
        parts = torch.split(x, sizes)
        return torch.cat([_linear(part, w, name, transposed) for part, (w, _) in zip(parts, groups, strict=True)])

    hidden_SF = project(x_SH, first)
    hidden_SF = module._apply_gate(hidden_SF) if module.has_gate else module.act_fn(hidden_SF)  # type: ignore[operator]
    y_SH = project(hidden_SF, "down_proj")
    if getattr(module, "has_post_expert_norm", False):
        y_SH = module.post_expert_norm(y_SH)  # type: ignore[operator]
    return y_SH


def _linear(x: Tensor, tensors: Mapping[str, Weight], name: str, transposed: bool) -> Tensor:
    weight = tensors[name]
    bias: Tensor | None = tensors.get(f"{name}_bias")  # type: ignore[assignment]  # only matrices are packed
    if not transposed or isinstance(weight, Packed):
        return linear(x, weight, bias)
    return x @ weight if bias is None else torch.addmm(bias, x, weight)
