"""One token of layers that keep a matrix per head and sequence, for several sequences: see model/native/recurrent.cpp.

Legend: R sequences, S slots, K key heads, V value heads, D key size, E value size, N heads, G groups, P head size,
M state size, C channels, W width of a convolution. Numbers of slots are int64.
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


def _plain(tensor: Tensor) -> Tensor:
    return tensor.to(torch.float32).contiguous()
