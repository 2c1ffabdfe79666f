"""Finds the layers of a trunk that keep a state per sequence, and gives them a forward for packed tokens.

*Joined* layers run single tokens by native calls alone: transformers' code spends more time between the calls of such a
step than in half of them. A layer is recognised by a trial: of random tokens and states, the calls must make the bits
that its own code makes with native functions (model/states/packed.py).

Legend: R sequences with one token, H hidden, C channels of the convolution, K key heads, V value heads, D key size,
E value size, N heads, G groups, P head size, M state size.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache

from elastic_moe.cluster.fit import CodePath, FitNotes, Part
from elastic_moe.model.fitting.probe import run_one_token
from elastic_moe.model.native import library
from elastic_moe.model.native.block import GatedNorm
from elastic_moe.model.native.refusals import native_refusal
from elastic_moe.model.operators.trials import OTHERWISE
from elastic_moe.model.states.finding import StateLayer, find_state_layers
from elastic_moe.model.states.packed import PackedStates
from elastic_moe.model.states.recurrent import (
    DeltaInputs,
    SelectiveInputs,
    Slots,
    convolve,
    delta_rule,
    selective_update,
)
from elastic_moe.model.transformers_private import LinearAttentionCacheLayerMixin


@dataclass(frozen=True, slots=True, kw_only=True)
class FittedStates:
    layers: tuple[StateLayer, ...] = ()
    """The layers in the order in which they run. Their forward takes packed tokens."""
    plain: Collection[nn.Module] = ()
    """Linear layers whose weights the layers' own code reads, so that they must stay as they are."""


@torch.inference_mode()
def fit_states(trunk: nn.Module, notes: FitNotes) -> FittedStates:
    """Replace the forward of each layer that keeps states. A probe must have taken the place of the trunk's experts."""
    config = getattr(trunk, "config", None)
    if config is None or not any(
        isinstance(layer, LinearAttentionCacheLayerMixin) for layer in DynamicCache(config=config).layers
    ):
        return FittedStates()
    called: set[nn.Module] = set()
    linears = [module for module in trunk.modules() if isinstance(module, nn.Linear)]
    handles = [module.register_forward_pre_hook(lambda module, _: called.add(module)) for module in linears]
    layers = find_state_layers(trunk, lambda: run_one_token(trunk))
    for handle in handles:
        handle.remove()
    for number, layer in enumerate(layers):
        _fit(layer, number, notes)
    inside = {module for layer in layers for module in layer.module.modules()}
    return FittedStates(layers=layers, plain=[linear for linear in linears if linear in inside - called])


def _fit(layer: StateLayer, number: int, notes: FitNotes) -> None:
    like = next(layer.module.parameters())
    refusal = native_refusal(layer.dtype, like.device)
    packed = PackedStates(layer, number, None if refusal else library())
    layer.module.forward = packed
    kinds = sorted({kept.kind for kept in layer.keeps})
    native = kinds == sorted(packed.native)
    path = CodePath.NATIVE if native else CodePath.TRANSFORMERS
    why = None if native else refusal
    if not native and not refusal:
        others = " and ".join(kind for kind in kinds if kind not in packed.native)
        why = f"no native function gives the values of its {others} states for single tokens"
    if native and packed.scans is None:
        why = "for single tokens only: no native function gives the values of a prompt"
    if not packed.goes_on:
        why = f"{why or 'for single tokens only'}; a prompt is run token by token behind its first chunk"
    notes.add(Part.STATES, type(layer.module).__name__, path, why)


# --- Joined layers ----------------------------------------------------------------------------------------------------


def join_states(lib: ctypes.CDLL, layers: Sequence[StateLayer]) -> int:
    """Join what single tokens run through in each layer that is recognised. Returns the number of these.

    Call it when the layers' linear layers are packed and their norms are native.
    """
    count = 0
    for layer in layers:
        packed = layer.module.forward
        if isinstance(packed, PackedStates):
            count += any(packed.join(step) for step in _candidates(lib, layer.module))
    return count


def _candidates(lib: ctypes.CDLL, module: Any) -> list[_Delta | _Selective]:
    found: list[_Delta | _Selective] = []
    for make in (_delta_of_one_matrix, _delta_of_four, _selective):
        try:
            found.append(make(lib, module))
        except OTHERWISE:  # an attribute is missing or of another kind
            continue
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class _Convolution:
    lib: ctypes.CDLL
    weight_CW: Tensor
    bias_C: Tensor | None
    silu: bool

    @classmethod
    def of(cls, lib: ctypes.CDLL, module: Any) -> _Convolution:
        conv: nn.Conv1d = module.conv1d
        weight_CW = conv.weight.detach().squeeze(1).contiguous()
        bias_C = None if conv.bias is None else conv.bias.detach()
        return cls(lib=lib, weight_CW=weight_CW, bias_C=bias_C, silu=module.activation == "silu")

    def __call__(self, x_RC: Tensor, slots: Slots) -> Tensor:
        return convolve(self.lib, x_RC, self.weight_CW, self.bias_C, slots, silu=self.silu)


# --- The gated delta rule ---------------------------------------------------------------------------------------------

Parts = tuple[Tensor, Tensor, Tensor, Tensor]
"""Of R tokens: what is convolved [R, C], the gate of the output [R, V * E], and what makes beta and gates [R, V]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Delta:
    lib: ctypes.CDLL
    project: Callable[[Tensor], Parts]
    convolution: _Convolution
    sizes: tuple[int, int, int, int]
    """K, D, V, E"""
    rates_V: Tensor
    """A step of 1 scales a head's matrix by e to the power of this."""
    shift_V: Tensor
    norm: GatedNorm
    out: nn.Module

    def __call__(self, x_RH: Tensor, convolution: Slots, recurrent: Slots) -> Tensor:
        key_heads, key_size, value_heads, value_size = self.sizes
        mixed_RC, gate, betas_RV, steps_RV = self.project(x_RH)
        query, key, value = torch.split(
            self.convolution(mixed_RC, convolution),
            [key_heads * key_size, key_heads * key_size, value_heads * value_size],
            -1,
        )
        rows = len(x_RH)
        inputs = DeltaInputs(
            query=query.view(rows, key_heads, key_size),
            key=key.view(rows, key_heads, key_size),
            value=value.view(rows, value_heads, value_size),
            gates=self.rates_V * F.softplus(steps_RV.float() + self.shift_V),
            beta=betas_RV.sigmoid(),
            unit=True,
        )
        made = delta_rule(self.lib, inputs, recurrent).view(-1, value_size)
        out: Tensor = self.out(self.norm(made, gate.reshape(-1, value_size)).view(rows, -1))
        return out


def _delta(lib: ctypes.CDLL, module: Any, project: Callable[[Tensor], Parts]) -> _Delta:
    return _Delta(
        lib=lib,
        project=project,
        convolution=_Convolution.of(lib, module),
        sizes=(module.num_k_heads, module.head_k_dim, module.num_v_heads, module.head_v_dim),
        rates_V=-module.A_log.detach().float().exp(),
        shift_V=module.dt_bias.detach(),
        norm=_gated_norm(module),
        out=module.out_proj,
    )


def _delta_of_one_matrix(lib: ctypes.CDLL, module: Any) -> _Delta:
    """Of a layer whose matrix mixes the parts of all heads (Qwen3-Next)."""
    wide, narrow = module.in_proj_qkvz, module.in_proj_ba
    columns = [torch.arange(linear.packed.columns)[None, None] for linear in (wide, narrow)]
    # the module's own code says which column belongs to which part
    query, key, value, gate, betas, steps = (part.flatten() for part in module.fix_query_key_value_ordering(*columns))
    mixed = torch.cat((query, key, value))

    def project(x_RH: Tensor) -> Parts:
        one, other = wide(x_RH), narrow(x_RH)
        return one[:, mixed], one[:, gate], other[:, betas], other[:, steps]

    return _delta(lib, module, project)


def _delta_of_four(lib: ctypes.CDLL, module: Any) -> _Delta:
    """Of a layer with a matrix for each part (Qwen3.5)."""
    linears = [getattr(module, f"in_proj_{name}") for name in ("qkv", "z", "b", "a")]

    def project(x_RH: Tensor) -> Parts:
        mixed, gate, betas, steps = (linear(x_RH) for linear in linears)
        return mixed, gate, betas, steps

    return _delta(lib, module, project)


# --- Mamba-2 ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class _Selective:
    lib: ctypes.CDLL
    project: nn.Module
    convolution: _Convolution
    sizes: tuple[int, int, int, int]
    """N, P, G, M"""
    rates_N: Tensor
    shift_N: Tensor
    skip_N: Tensor
    norm: GatedNorm
    out: nn.Module

    def __call__(self, x_RH: Tensor, convolution: Slots, recurrent: Slots) -> Tensor:
        heads, head_size, groups, state_size = self.sizes
        inner, beside = heads * head_size, groups * state_size
        gate, mixed_RC, steps_RN = torch.split(self.project(x_RH), [inner, inner + 2 * beside, heads], -1)
        x, written, read = torch.split(self.convolution(mixed_RC, convolution), [inner, beside, beside], -1)
        rows = len(x_RH)
        inputs = SelectiveInputs(
            x=x.view(rows, heads, head_size),
            steps=steps_RN,
            read=read.view(rows, groups, state_size),
            written=written.view(rows, groups, state_size),
            rates=self.rates_N,
            shift=self.shift_N,
            skip=self.skip_N,
            softplus=True,
        )
        made = selective_update(self.lib, inputs, recurrent).view(rows, inner)
        out: Tensor = self.out(self.norm(made, gate))
        return out


def _selective(lib: ctypes.CDLL, module: Any) -> _Selective:
    return _Selective(
        lib=lib,
        project=module.in_proj,
        convolution=_Convolution.of(lib, module),
        sizes=(module.num_heads, module.head_dim, module.n_groups, module.ssm_state_size),
        rates_N=-torch.exp(module.A_log.detach().float()),
        shift_N=module.dt_bias.detach().float(),
        skip_N=module.D.detach().float(),
        norm=_gated_norm(module),
        out=module.out_proj,
    )


def _gated_norm(module: Any) -> GatedNorm:
    norm = module.norm.forward
    if not isinstance(norm, GatedNorm):
        raise TypeError("the norm is not native")
    return norm
