"""The experts that one worker holds, and their arithmetic: transformers' own, expert by expert.

Owns the weights in the slots. Where tokens come from and go to is the dispatcher's business (model/dispatch.py).
In bfloat16 on CPU the native library does the arithmetic (model/native/experts.py), where there is one and it knows the
layer's gate.

Legend: R rows (tokens sent here), H hidden, F expert width, K experts per token, S sorted (row, choice) pairs.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from cluster.errors import UserError
from model.linear import Weight, linear, nbytes, pack, unpack
from model.native import library, unavailable
from model.native.experts import NativeExperts, find_gate
from model.native.linear import Packed

NAME = "emoe"
"""Of our experts function in transformers' registry."""

ABSENT = -1
"""In an index of choices: an expert that is computed elsewhere."""

Tensors = dict[str, Tensor]
"""One expert's tensors by parameter name, each shaped as a row of the stacked parameter."""

Forward = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""(layer, hidden [T, H], top_k_index [T, K], top_k_weights [T, K]) -> [T, H]"""


class ExpertStore:
    """Weights by (layer, logical expert), and the sum of a layer's held experts over rows sent here."""

    def __init__(self, modules: Sequence[nn.Module], *, int8: bool = False) -> None:
        """`modules` are the trunk's expert modules in layer order, empty of weights: they know layout and gate.

        int8: keep weights in 8 bits (model/int8.py). Raises UserError where the native library does not do that.
        """
        self._modules = tuple(modules)
        self._weights: list[dict[int, dict[str, Weight]]] = [{} for _ in modules]
        self._int8 = int8
        self._native = [_native(module, 8 if int8 else 16) for module in modules]
        if int8 and not self.native:
            raise _no_int8(unavailable() or "it is for bfloat16 on CPU, and for gates that it knows")

    @property
    def num_layers(self) -> int:
        return len(self._modules)

    @property
    def native(self) -> bool:
        """Whether every layer's arithmetic is native."""
        return all(native is not None for native in self._native)

    def native_layer(self, layer: int) -> tuple[int | float, ...]:
        """The layer's experts held here, as native functions take them. Only where `native`."""
        native = self._native[layer]
        assert native is not None
        return native.arguments

    def put(self, layer: int, expert: int, tensors: Tensors, *, borrowed: bool = False) -> None:
        """Hold an expert. Its tensors belong to the store from now on; of borrowed ones nothing is kept."""
        native = self._native[layer]
        if native is not None and not native.takes(tensors):
            if self._int8:
                raise _no_int8(f"of layer {layer}, a matrix has an odd number of columns")
            native = self._native[layer] = None
        if borrowed:
            # packing is a copy already
            packs = native is not None
            tensors = {name: t if packs and t.dim() == 2 else t.clone() for name, t in tensors.items()}
        if native is not None:
            self._weights[layer][expert] = native.put(expert, tensors)
            return
        plain = self._modules[layer].is_transposed
        self._weights[layer][expert] = {
            name: tensor if plain or tensor.dim() != 2 else pack(tensor) for name, tensor in tensors.items()
        }

    def get(self, layer: int, expert: int) -> Tensors:
        """The expert's tensors, good for another store's `put`. Raises KeyError where it is not held."""
        held, native = self._weights[layer][expert], self._native[layer]
        return {name: unpack(weight) for name, weight in held.items()} if native is None else native.get(held)

    def held(self, layer: int) -> frozenset[int]:
        return frozenset(self._weights[layer])

    def keep_only(self, experts: Sequence[Iterable[int]]) -> None:
        """Drop what is not in `experts` ([L] sets of logical experts)."""
        for layer, wanted in enumerate(experts):
            chosen = set(wanted)
            for expert in [e for e in self._weights[layer] if e not in chosen]:
                if (native := self._native[layer]) is not None:
                    native.drop(expert)
                del self._weights[layer][expert]

    @property
    def nbytes(self) -> int:
        return sum(nbytes(t) for layer in self._weights for tensors in layer.values() for t in tensors.values())

    def forward(self, layer: int, x_RH: Tensor, index_RK: Tensor, weight_RK: Tensor) -> Tensor:
        """Weighted sum over each row's experts held here: [R, H]. ABSENT choices count for nothing.

        Rows are sorted by expert; then all gate-ups, one activation, all downs: as fast on CPU as a loop over
        experts and with fewer operators. Sums are in float32 whatever the dtype.
        """
        if (native := self._native[layer]) is not None:
            return native.forward(x_RH, index_RK, weight_RK)
        num_choices = index_RK.shape[1]
        flat = index_RK.reshape(-1)
        order = flat.argsort(stable=True)
        counts = torch.bincount(flat + 1).tolist() if flat.numel() else [0]
        order_S = order[counts[0] :]
        out_RH = torch.zeros(x_RH.shape, dtype=torch.float32, device=x_RH.device)
        if order_S.numel() == 0:
            return out_RH.to(x_RH.dtype)
        row_S = order_S.div(num_choices, rounding_mode="floor")
        groups = [(self._weights[layer][e], n) for e, n in enumerate(counts[1:]) if n]
        y_SH = _run_experts(self._modules[layer], x_RH.index_select(0, row_S), groups)
        y_SH = y_SH.float() * weight_RK.reshape(-1)[order_S, None].float()
        return out_RH.index_add_(0, row_S, y_SH).to(x_RH.dtype)


def _no_int8(reason: str) -> UserError:
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


def attach(modules: Sequence[nn.Module], forward: Forward) -> None:
    """From now on the trunk's expert modules hand their tokens to `forward`, saying which layer they are."""
    for layer, module in enumerate(modules):
        # bare attributes, not registered ones: they must not turn up in the state dict
        object.__setattr__(module, "emoe_layer", layer)
        object.__setattr__(module, "emoe_forward", forward)


def _experts_function(module: nn.Module, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    out: Tensor = module.emoe_forward(module.emoe_layer, hidden, top_k_index, top_k_weights)  # type: ignore[operator]
    return out


ALL_EXPERTS_FUNCTIONS.register(NAME, _experts_function)
