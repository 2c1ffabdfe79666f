"""Replaces functions of transformers' modelling files that layers with states call.

*Single tokens*: native code reads each sequence's state from one slot of the store and writes it to another, so that no
state is copied. *Scans*: a function that begins every prompt with an empty state goes on from a given one. Both happen
only within a context manager of this file; any other call goes to the original.

Legend: R sequences, N heads, T tokens, C channels, M state size.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elastic_moe.model.states.finding import StateKind
from elastic_moe.model.states.recurrent import Slots, convolve, delta_rule, selective_update

_slots: ContextVar[Mapping[StateKind, Slots]] = ContextVar("slots", default=MappingProxyType({}))
_begin: ContextVar[Tensor | None] = ContextVar("begin", default=None)

Function = Callable[..., Any]


@contextmanager
def slots_in_use(slots: Mapping[StateKind, Slots]) -> Iterator[None]:
    """While the block runs, replaced functions take states of these kinds from slots, whatever they are passed."""
    token = _slots.set(slots)
    try:
        yield
    finally:
        _slots.reset(token)


@contextmanager
def scans_begin_with(state: Tensor | None) -> Iterator[None]:
    """While the block runs, a replaced scan begins with this state, and not with an empty one."""
    token = _begin.set(state)
    try:
        yield
    finally:
        _begin.reset(token)


def replace_functions(module: nn.Module, lib: ctypes.CDLL | None) -> None:
    """Replace the functions that the file of the module's class has; those for single tokens only with `lib`."""
    file: Any = sys.modules[type(module).__module__]
    rules = _SCANS if lib is None else _SCANS | {name: make(lib) for name, make in _SINGLE_TOKENS.items()}
    for name, make in rules.items():
        original = getattr(file, name, None)
        if original is not None and not hasattr(original, "emoe_original"):
            rule: Any = make(original)
            rule.emoe_original = original
            setattr(file, name, rule)


# --- Single tokens ----------------------------------------------------------------------------------------------------


def delta_rule_of(lib: ctypes.CDLL) -> Callable[[Function], Function]:
    def replaced(original: Function) -> Function:
        def rule(query: Tensor, key: Tensor, value: Tensor, **given: Any) -> Any:
            slots = _slots.get().get(StateKind.RECURRENT)
            if slots is None:
                return original(query, key, value, **given)
            query_RND, key_RND = query[:, 0].float(), key[:, 0].float()
            if given.get("use_qk_l2norm_in_kernel"):
                query_RND, key_RND = _unit(query_RND), _unit(key_RND)
            query_RND = query_RND * query_RND.shape[-1] ** -0.5
            decay, beta = given["g"][:, 0].float().exp(), given["beta"][:, 0]
            out = delta_rule(lib, query_RND, key_RND, value[:, 0], decay, beta, slots)
            return out[:, None].to(query.dtype), given["initial_state"]

        return rule

    return replaced


def _unit(x: Tensor) -> Tensor:
    return x * torch.rsqrt((x * x).sum(-1, keepdim=True) + 1e-6)


def selective_update_of(lib: ctypes.CDLL) -> Callable[[Function], Function]:
    def replaced(original: Function) -> Function:
        def update(
            state: Tensor, hidden_states: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, **given: Any
        ) -> Any:
            slots = _slots.get().get(StateKind.RECURRENT)
            if slots is None:
                return original(state, hidden_states, dt, A, B, C, D, **given)
            # a head has one time step and one decay, which the caller has spread over its channels
            steps_RN = F.softplus(dt[..., 0].float() + given["dt_bias"][..., 0].float())
            x = hidden_states.float()
            decay_RN = torch.exp(steps_RN * A[:, 0, 0].float())
            out = selective_update(lib, decay_RN, x * steps_RN[..., None], C, B, slots)
            return (out + x * D.float()).to(hidden_states.dtype)

        return update

    return replaced


def convolution_of(lib: ctypes.CDLL) -> Callable[[Function], Function]:
    def replaced(original: Function) -> Function:
        def update(
            hidden_states: Tensor,
            conv_state: Tensor,
            weight: Tensor,
            bias: Tensor | None = None,
            activation: str | None = None,
        ) -> Any:
            slots = _slots.get().get(StateKind.CONVOLUTION)
            if slots is None:
                return original(hidden_states, conv_state, weight, bias, activation)
            assert activation in (None, "silu")
            out = convolve(lib, hidden_states[..., 0], weight, bias, slots, silu=activation is not None)
            return out[..., None]

        return update

    return replaced


_SINGLE_TOKENS: dict[str, Callable[[ctypes.CDLL], Callable[[Function], Function]]] = {
    "torch_recurrent_gated_delta_rule": delta_rule_of,
    "recurrent_kimi_delta_attention": delta_rule_of,
    "mamba2_selective_state_update": selective_update_of,
    "causal_conv1d_update": convolution_of,
}
"""By the names that modelling files use. A trial of the layer decides whether a replacement is used."""


# --- Scans ------------------------------------------------------------------------------------------------------------


def selective_scan(original: Function) -> Function:
    """Mamba's scan over tokens. What it begins with decays and is read along with what the tokens add."""

    def scan(
        hidden_states: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, *, z: Tensor | None = None, **given: Any
    ) -> Any:
        begin = _begin.get()
        if begin is None or not given.get("return_last_state"):
            return original(hidden_states, dt, A, B, C, z=z, **given)
        out_CT, last = original(hidden_states, dt, A, B, C, z=None, **given)
        if given.get("delta_bias") is not None:
            dt = dt + given["delta_bias"].to(dt.dtype)[..., None]
        steps = F.softplus(dt) if given.get("delta_softplus") else dt
        left = torch.exp(A[None, :, None] * steps.float().cumsum(-1)[..., None]) * begin.float()[:, :, None]
        out_CT = out_CT + torch.einsum("bctm,bmt->bct", left, C.float())
        out_CT = out_CT if z is None else out_CT * F.silu(z)
        return out_CT.to(hidden_states.dtype), last + left[:, :, -1].to(last.dtype)

    return scan


_SCANS: dict[str, Callable[[Function], Function]] = {"mamba_selective_scan": selective_scan}
