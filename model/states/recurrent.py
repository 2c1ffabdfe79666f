"""Layers that keep a matrix per head and sequence: one token of several sequences, and scans over the tokens of one
sequence. See model/native/recurrent.cpp.

A scan begins with the state `begin`, which is zeros if it is None, and returns its outputs and the last state.

Legend: T tokens, R sequences, S slots, K key heads, V value heads, D key size, E value size, N heads, G groups, P head
size, M state size, C channels, W width of a convolution. Numbers of slots are int64.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

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


def delta_rule(
    lib: ctypes.CDLL, query: Tensor, key: Tensor, value: Tensor, decay: Tensor, beta: Tensor, slots: Slots
) -> Tensor:
    """Run one token: query and key [R, K, D], value [R, V, E], beta [R, V] -> [R, V, E].

    The states [S, V, D, E] are first scaled by `decay` [R, V], or [R, V, D] if each channel has its own.
    """
    rows, key_heads, key_size = key.shape
    value_heads, value_size = value.shape[1:]
    arguments = [_plain(tensor) for tensor in (query, key, value, decay, beta)]
    out = torch.empty(rows, value_heads, value_size, dtype=torch.float32)
    lib.emoe_delta_rule(
        *(tensor.data_ptr() for tensor in arguments),
        rows,
        key_heads,
        value_heads,
        key_size,
        value_size,
        decay.dim() == 3,
        *slots.pointers,
        out.data_ptr(),
        torch.get_num_threads(),
    )
    return out


def selective_update(
    lib: ctypes.CDLL, decay: Tensor, inputs: Tensor, read: Tensor, written: Tensor, slots: Slots
) -> Tensor:
    """Run one token of Mamba-2: inputs (times the time step) [R, N, P] -> [R, N, P].

    The states [S, N, P, M] are scaled by `decay` [R, N], the inputs times `written` [R, G, M] are added, and `read`
    [R, G, M] is what they are multiplied by.
    """
    rows, heads, head_size = inputs.shape
    groups, state_size = read.shape[1:]
    arguments = [_plain(tensor) for tensor in (decay, inputs, read, written)]
    out = torch.empty(rows, heads, head_size, dtype=torch.float32)
    lib.emoe_selective_update(
        *(tensor.data_ptr() for tensor in arguments),
        rows,
        heads,
        groups,
        head_size,
        state_size,
        *slots.pointers,
        out.data_ptr(),
        torch.get_num_threads(),
    )
    return out


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


def delta_scan(
    lib: ctypes.CDLL, query: Tensor, key: Tensor, value: Tensor, decay: Tensor, beta: Tensor, begin: Tensor | None
) -> tuple[Tensor, Tensor]:
    """As `delta_rule`, for query and key [T, K, D], value [T, V, E] and so on: ([T, V, E], [V, D, E])."""
    tokens, key_heads, key_size = key.shape
    value_heads, value_size = value.shape[1:]
    arguments = [_plain(tensor) for tensor in (query, key, value, decay, beta)]
    state, pointers, kept = _scanned(begin, value_heads, key_size, value_size)
    out = torch.empty(tokens, value_heads, value_size, dtype=torch.float32)
    lib.emoe_delta_scan(
        *(tensor.data_ptr() for tensor in arguments),
        tokens,
        key_heads,
        value_heads,
        key_size,
        value_size,
        decay.dim() == 3,
        *pointers,
        out.data_ptr(),
        torch.get_num_threads(),
    )
    del kept
    return out, state


def selective_scan(
    lib: ctypes.CDLL, decay: Tensor, inputs: Tensor, read: Tensor, written: Tensor, begin: Tensor | None
) -> tuple[Tensor, Tensor]:
    """As `selective_update`, for decay [T, N], inputs [T, N, P], read and written [T, G, M]: ([T, N, P], [N, P, M])."""
    tokens, heads, head_size = inputs.shape
    groups, state_size = read.shape[1:]
    arguments = [_plain(tensor) for tensor in (decay, inputs, read, written)]
    state, pointers, kept = _scanned(begin, heads, head_size, state_size)
    out = torch.empty(tokens, heads, head_size, dtype=torch.float32)
    lib.emoe_selective_scan(
        *(tensor.data_ptr() for tensor in arguments),
        tokens,
        heads,
        groups,
        head_size,
        state_size,
        *pointers,
        out.data_ptr(),
        torch.get_num_threads(),
    )
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


def _plain(tensor: Tensor) -> Tensor:
    return tensor.to(torch.float32).contiguous()
