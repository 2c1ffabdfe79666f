"""Replaces functions of transformers' modelling files that layers with states call.

*Single tokens*: native code reads each sequence's state from one slot of the store and writes it to another, so that no
state is copied. *Scans*: native code takes the tokens of one sequence; without it, a function that begins every prompt
with an empty state goes on from a given one. All this happens only within a context manager of this file; any other
call goes to the original.

Legend: R sequences, N heads, T tokens, C channels, M state size.
"""

from __future__ import annotations

import ctypes
import math
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
from elastic_moe.model.states.recurrent import (
    DeltaInputs,
    SelectiveInputs,
    Slots,
    channel_scan,
    channel_update,
    convolve,
    convolve_tokens,
    delta_rule,
    delta_scan,
    selective_update,
)
from elastic_moe.model.states.recurrent import selective_scan as scan_selectively

_slots: ContextVar[Mapping[StateKind, Slots]] = ContextVar("slots", default=MappingProxyType({}))
_begin: ContextVar[Tensor | None] = ContextVar("begin", default=None)
_native_scans: ContextVar[set[str] | None] = ContextVar("native_scans", default=None)

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
def scans_begin_with(state: Tensor | None, native: set[str] | None = None) -> Iterator[None]:
    """While the block runs, a replaced scan begins with this state, and not with an empty one.

    If `native` is given, scans of single sequences are computed by native code where there is some, and their names are
    added to it.
    """
    tokens = _begin.set(state), _native_scans.set(native)
    try:
        yield
    finally:
        _begin.reset(tokens[0])
        _native_scans.reset(tokens[1])


def replace_functions(module: nn.Module, lib: ctypes.CDLL | None) -> None:
    """Replace the functions that the file of the module's class has; most of them only with `lib`."""
    file: Any = sys.modules[type(module).__module__]
    rules = _SCANS if lib is None else _SCANS | {name: make(lib) for name, make in _NATIVE.items()}
    for name, make in rules.items():
        present = getattr(file, name, None)
        # a model in another dtype may have replaced the function before
        original = getattr(present, "emoe_original", present)
        if present is None or (present is not original and not (lib is not None and name in _NATIVE)):
            continue
        if getattr(present, "emoe_native", False):
            continue
        rule: Any = make(original)
        rule.emoe_original, rule.emoe_native = original, lib is not None and name in _NATIVE
        setattr(file, name, rule)


# --- Single tokens ----------------------------------------------------------------------------------------------------


def delta_rule_of(lib: ctypes.CDLL) -> Callable[[Function], Function]:
    def replaced(original: Function) -> Function:
        def rule(query: Tensor, key: Tensor, value: Tensor, **given: Any) -> Any:
            slots = _slots.get().get(StateKind.RECURRENT)
            if slots is None:
                return original(query, key, value, **given)
            out = delta_rule(lib, _delta_inputs(query[:, 0], key[:, 0], value[:, 0], given, (slice(None), 0)), slots)
            return out[:, None], given["initial_state"]

        return rule

    return replaced


def _delta_inputs(query: Tensor, key: Tensor, value: Tensor, given: Mapping[str, Any], rows: Any) -> DeltaInputs:
    """`rows` of gates and beta belong to the other tensors."""
    return DeltaInputs(
        query=query,
        key=key,
        value=value,
        gates=given["g"][rows],
        beta=given["beta"][rows],
        unit=bool(given.get("use_qk_l2norm_in_kernel")),
    )


def selective_update_of(lib: ctypes.CDLL) -> Callable[[Function], Function]:
    def replaced(original: Function) -> Function:
        def update(
            state: Tensor, hidden_states: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, **given: Any
        ) -> Any:
            slots = _slots.get().get(StateKind.RECURRENT)
            if slots is None:
                return original(state, hidden_states, dt, A, B, C, D, **given)
            # a head has one time step and one decay, which the caller has spread over its channels
            inputs = SelectiveInputs(
                x=hidden_states,
                steps=dt[..., 0],
                read=C,
                written=B,
                rates=A[:, 0, 0],
                shift=given["dt_bias"][..., 0],
                skip=D[..., 0],
                softplus=bool(given.get("dt_softplus")),
            )
            return selective_update(lib, inputs, slots)

        return update

    return replaced


def channel_update_of(lib: ctypes.CDLL) -> Callable[[Function], Function]:
    def replaced(original: Function) -> Function:
        def update(
            state: Tensor, hidden_states: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, **given: Any
        ) -> Any:
            slots = _slots.get().get(StateKind.RECURRENT)
            if slots is None:
                return original(state, hidden_states, dt, A, B, C, D, **given)
            steps_RC, x_RC = F.softplus(dt.float() + given["dt_bias"].float()), hidden_states.float()
            out_RC = channel_update(lib, steps_RC, x_RC, A, C, B, slots) + x_RC * D.float()
            return (out_RC * F.silu(given["z"].float())).to(hidden_states.dtype)

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


# --- Native scans -----------------------------------------------------------------------------------------------------


def delta_scan_of(lib: ctypes.CDLL) -> Callable[[Function], Function]:
    def replaced(original: Function) -> Function:
        def scan(query: Tensor, key: Tensor, value: Tensor, **given: Any) -> Any:
            if not _scans_natively("delta rule", query):
                return original(query, key, value, **given)
            inputs = _delta_inputs(query[0], key[0], value[0], given, 0)
            out, last = delta_scan(lib, inputs, given.get("initial_state"))
            return out[None], last[None] if given.get("output_final_state") else None

        return scan

    return replaced


def selective_scan_of(lib: ctypes.CDLL) -> Callable[[Function], Function]:
    def replaced(original: Function) -> Function:
        def scan(
            hidden_states: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, chunk_size: int, **given: Any
        ) -> Any:
            if not _scans_natively("Mamba-2", hidden_states):
                return original(hidden_states, dt, A, B, C, chunk_size, **given)
            inputs = SelectiveInputs(
                x=hidden_states[0],
                steps=dt[0],
                read=C[0],
                written=B[0],
                rates=A,
                shift=given["dt_bias"],
                skip=given["D"],
                softplus=bool(given.get("dt_softplus")),
                limits=given.get("dt_limit", (0.0, math.inf)),
            )
            out, last = scan_selectively(lib, inputs, given.get("initial_states"))
            return (out[None], last[None]) if given.get("return_final_states") else out[None]

        return scan

    return replaced


def channel_scan_of(lib: ctypes.CDLL) -> Callable[[Function], Function]:
    def replaced(original: Function) -> Function:
        goes_on = selective_scan(original)

        def scan(
            hidden_states: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, *, z: Tensor | None = None, **given: Any
        ) -> Any:
            if not _scans_natively("Mamba", hidden_states):
                return goes_on(hidden_states, dt, A, B, C, z=z, **given)
            steps_TC, x_TC = dt[0].T.float(), hidden_states[0].T.float()
            if given.get("delta_bias") is not None:
                steps_TC = steps_TC + given["delta_bias"].float()
            if given.get("delta_softplus"):
                steps_TC = F.softplus(steps_TC)
            out_TC, last = channel_scan(lib, steps_TC, x_TC, A, C[0].T, B[0].T, _begin.get())
            if given.get("D") is not None:
                out_TC = out_TC + x_TC * given["D"].float()
            if z is not None:
                out_TC = out_TC * F.silu(z[0].T.float())
            out = out_TC.T[None].to(hidden_states.dtype)
            return (out, last[None]) if given.get("return_last_state") else out

        return scan

    return replaced


def convolution_scan_of(lib: ctypes.CDLL) -> Callable[[Function], Function]:
    def replaced(original: Function) -> Function:
        def convolved(
            hidden_states: Tensor,
            weight: Tensor,
            bias: Tensor | None = None,
            activation: str | None = None,
            **given: Any,
        ) -> Any:
            if hidden_states.dtype != torch.bfloat16 or not _scans_natively("convolution", hidden_states):
                return original(hidden_states, weight, bias, activation, **given)
            assert activation in (None, "silu")
            return convolve_tokens(lib, hidden_states[0], weight, bias, silu=activation is not None)[None]

        return convolved

    return replaced


def _scans_natively(name: str, x: Tensor) -> bool:
    """Whether native code computes a scan over x, whose first dimension is that of sequences."""
    used = _native_scans.get()
    if used is None or x.shape[0] != 1:
        return False
    used.add(name)
    return True


_NATIVE: dict[str, Callable[[ctypes.CDLL], Callable[[Function], Function]]] = {
    "torch_recurrent_gated_delta_rule": delta_rule_of,
    "recurrent_kimi_delta_attention": delta_rule_of,
    "mamba2_selective_state_update": selective_update_of,
    "mamba_selective_state_update": channel_update_of,
    "causal_conv1d_update": convolution_of,
    "torch_chunk_gated_delta_rule": delta_scan_of,
    "chunk_kimi_delta_attention": delta_scan_of,
    "mamba2_chunk_scan": selective_scan_of,
    "mamba_selective_scan": channel_scan_of,
    "causal_conv1d_fn": convolution_scan_of,
}
"""By the names that modelling files use. A trial of the layer decides whether a replacement is used."""
