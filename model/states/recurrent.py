"""Layers that keep a matrix per head and sequence: one token of several sequences, and scans over the tokens of one
sequence. See model/native/states/.

A scan begins with the state `begin`, which is zeros if it is None, and returns its outputs and the last state.

Legend: T tokens, R sequences, S slots, K key heads, V value heads, D key size, E value size, N heads, G groups, P head
size, M state size, C channels, W width of a convolution. Numbers of slots are int64.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Slots:
    """States of many sequences, and which of them a call reads and writes."""

    states: Tensor
    """[S, ...], contiguous."""
    sources: Tensor
    """[R]"""
    targets: Tensor
    """[R] slots that nobody reads in the same call."""

    @property
    def pointers(self) -> tuple[int, int, int]:
        """The addresses that every call of the native library takes."""
        return self.states.data_ptr(), self.sources.data_ptr(), self.targets.data_ptr()


@dataclass(frozen=True, slots=True, kw_only=True)
class DeltaInputs:
    """What the gated delta rule takes for some rows: tokens of one sequence, or sequences with one token each."""

    query: Tensor
    """[rows, K, D] float32 or bfloat16, as key and value."""
    key: Tensor
    value: Tensor
    """[rows, V, E]"""
    gates: Tensor
    """[rows, V], or [rows, V, D] if each channel has its own. The matrices are scaled by e^gates first."""
    beta: Tensor
    """[rows, V]"""
    unit: bool
    """Whether queries and keys are scaled to length 1."""

    def call(self, function: Any, states: Sequence[int | None]) -> Tensor:
        """Call a native function with `states`: [rows, V, E]."""
        rows, key_heads, key_size = self.key.shape
        value_heads, value_size = self.value.shape[1:]
        parts = [_rows(tensor) for tensor in (self.query, self.key, self.value)]
        gates, beta = _plain(self.gates), _plain(self.beta)
        out = torch.empty(rows, value_heads, value_size, dtype=self.value.dtype)
        function(
            *(number for part in parts for number in (part.data_ptr(), part.stride(0))),
            self.value.dtype == torch.float32,
            self.unit,
            gates.data_ptr(),
            beta.data_ptr(),
            rows,
            key_heads,
            value_heads,
            key_size,
            value_size,
            gates.dim() == 3,
            *states,
            out.data_ptr(),
            torch.get_num_threads(),
        )
        return out


def delta_rule(lib: ctypes.CDLL, inputs: DeltaInputs, slots: Slots) -> Tensor:
    """Run one token of several sequences, whose states are [S, V, D, E]: [R, V, E]."""
    return inputs.call(lib.emoe_delta_rule, slots.pointers)


@dataclass(frozen=True, slots=True, kw_only=True)
class SelectiveInputs:
    """What Mamba-2 takes for some rows: tokens of one sequence, or sequences with one token each."""

    x: Tensor
    """[rows, N, P] float32 or bfloat16, as steps, read and written."""
    steps: Tensor
    """[rows, N]"""
    read: Tensor
    """[rows, G, M], C in Mamba's words."""
    written: Tensor
    """[rows, G, M], B in Mamba's words."""
    rates: Tensor
    """[N]. A step of 1 scales a head's matrix by e^rates."""
    shift: Tensor
    """[N], added to steps."""
    skip: Tensor
    """[N]. x times this is added to the output."""
    softplus: bool
    limits: tuple[float, float] = (0.0, math.inf)
    """Of steps."""

    def call(self, function: Any, states: Sequence[int | None]) -> Tensor:
        """Call a native function with `states`: [rows, N, P]."""
        rows, heads, head_size = self.x.shape
        groups, state_size = self.read.shape[1:]
        parts = [_rows(tensor) for tensor in (self.x, self.steps, self.read, self.written)]
        vectors = [_plain(tensor) for tensor in (self.rates, self.shift, self.skip)]
        out = torch.empty(rows, heads, head_size, dtype=self.x.dtype)
        function(
            *(number for part in parts for number in (part.data_ptr(), part.stride(0))),
            self.x.dtype == torch.float32,
            self.softplus,
            *(vector.data_ptr() for vector in vectors),
            *self.limits,
            rows,
            heads,
            groups,
            head_size,
            state_size,
            *states,
            out.data_ptr(),
            torch.get_num_threads(),
        )
        return out


def selective_update(lib: ctypes.CDLL, inputs: SelectiveInputs, slots: Slots) -> Tensor:
    """Run one token of several sequences, whose states are [S, N, P, M]: [R, N, P]."""
    return inputs.call(lib.emoe_selective_update, slots.pointers)


def channel_update(
    lib: ctypes.CDLL, steps: Tensor, inputs: Tensor, rates: Tensor, read: Tensor, written: Tensor, slots: Slots
) -> Tensor:
    """Run one token of Mamba: steps and inputs [R, C] -> [R, C].

    The states [S, C, M] are scaled by e^(steps * rates [C, M]), steps times inputs times `written` [R, M] are added,
    and `read` [R, M] is what they are multiplied by.
    """
    rows, channels = inputs.shape
    arguments = [_plain(tensor) for tensor in (steps, inputs, rates, read, written)]
    out = torch.empty(rows, channels, dtype=torch.float32)
    lib.emoe_channel_update(
        *(tensor.data_ptr() for tensor in arguments),
        rows,
        channels,
        read.shape[1],
        *slots.pointers,
        out.data_ptr(),
        torch.get_num_threads(),
    )
    return out


def convolve(
    lib: ctypes.CDLL, x_RC: Tensor, weight_CW: Tensor, bias_C: Tensor | None, slots: Slots, *, silu: bool
) -> Tensor:
    """Run one token of a convolution over tokens in bfloat16: [R, C] -> [R, C]. The states are [S, C, W]."""
    x_RC, weight_CW = x_RC.contiguous(), weight_CW.contiguous()
    out = torch.empty(x_RC.shape, dtype=torch.bfloat16)
    lib.emoe_convolve(
        x_RC.data_ptr(),
        *x_RC.shape,
        weight_CW.shape[1],
        weight_CW.data_ptr(),
        None if bias_C is None else bias_C.data_ptr(),
        silu,
        *slots.pointers,
        out.data_ptr(),
        torch.get_num_threads(),
    )
    return out


def delta_scan(lib: ctypes.CDLL, inputs: DeltaInputs, begin: Tensor | None) -> tuple[Tensor, Tensor]:
    """As `delta_rule`, for the tokens of one sequence: ([T, V, E], [V, D, E])."""
    state, pointers, kept = _scanned(begin, inputs.value.shape[1], inputs.key.shape[2], inputs.value.shape[2])
    out = inputs.call(lib.emoe_delta_scan, pointers)
    del kept
    return out, state


def selective_scan(lib: ctypes.CDLL, inputs: SelectiveInputs, begin: Tensor | None) -> tuple[Tensor, Tensor]:
    """As `selective_update`, for the tokens of one sequence: ([T, N, P], [N, P, M])."""
    state, pointers, kept = _scanned(begin, *inputs.x.shape[1:], inputs.read.shape[2])
    out = inputs.call(lib.emoe_selective_scan, pointers)
    del kept
    return out, state


def channel_scan(
    lib: ctypes.CDLL,
    steps: Tensor,
    inputs: Tensor,
    rates: Tensor,
    read: Tensor,
    written: Tensor,
    begin: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """As `channel_update`, for steps and inputs [T, C], read and written [T, M]: ([T, C], [C, M])."""
    tokens, channels = inputs.shape
    arguments = [_plain(tensor) for tensor in (steps, inputs, rates, read, written)]
    state, pointers, kept = _scanned(begin, channels, read.shape[1])
    out = torch.empty(tokens, channels, dtype=torch.float32)
    lib.emoe_channel_scan(
        *(tensor.data_ptr() for tensor in arguments),
        tokens,
        channels,
        read.shape[1],
        *pointers,
        out.data_ptr(),
        torch.get_num_threads(),
    )
    del kept
    return out, state


def convolve_tokens(lib: ctypes.CDLL, x_CT: Tensor, weight_CW: Tensor, bias_C: Tensor | None, *, silu: bool) -> Tensor:
    """As `convolve`, over the tokens of one sequence, with zeros before them: [C, T] -> [C, T]."""
    x_CT, weight_CW = x_CT.contiguous(), weight_CW.contiguous()
    out_CT = torch.empty(x_CT.shape, dtype=torch.bfloat16)
    lib.emoe_convolve_tokens(
        x_CT.data_ptr(),
        *x_CT.shape,
        weight_CW.shape[1],
        weight_CW.data_ptr(),
        None if bias_C is None else bias_C.data_ptr(),
        silu,
        out_CT.data_ptr(),
        torch.get_num_threads(),
    )
    return out_CT


def _scanned(begin: Tensor | None, *shape: int) -> tuple[Tensor, tuple[int | None, int], Tensor | None]:
    """A scan's state, the addresses of the first state and of the last one, and what must live as long as they do."""
    state = torch.empty(shape, dtype=torch.float32)
    first = None if begin is None else _plain(begin)
    assert first is None or first.numel() == state.numel()
    return state, (None if first is None else first.data_ptr(), state.data_ptr()), first


def _rows(tensor: Tensor) -> Tensor:
    """The tensor itself if each of its rows is dense, else a dense copy."""
    return tensor if tensor[:1].is_contiguous() else tensor.contiguous()


def _plain(tensor: Tensor) -> Tensor:
    return tensor.to(torch.float32).contiguous()
