"""Workers of one node that compute their MoE layers together in native code: see exchange.h and moe.cpp."""

from __future__ import annotations

import ctypes
import mmap
import os
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from elastic_moe.cluster.errors import StepAborted
from elastic_moe.model.native.segments import DIRECTORY, join

_ROUND_TOKENS = 1024
"""Most tokens of a rank in one round."""
_SEGMENT_BYTES = 128 << 20
"""What a rank's segment may take; rounds are smaller where it would take more."""
_GROUPS = 2
"""Whose segments must have room at a time: a group, and the one that takes its place."""
_LEAST_TOKENS = 16

_DONE, _ABORTED, _SILENT = 0, 1, 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Waited:
    """Seconds that a rank waited for its peers: for their tokens, and for their partial sums."""

    tokens_s: float
    sums_s: float


class NativeExchange:
    """A group of workers in lock-step. Constructing blocks until all ranks have come."""

    def __init__(
        self,
        lib: ctypes.CDLL,
        *,
        group: str,
        rank: int,
        size: int,
        hidden: int,
        top_k: int,
        max_tokens: int,
        timeout_s: float,
    ) -> None:
        """`group` is unique on the node, `max_tokens` the most that a rank runs in a step.

        Raises StepAborted where a peer does not come within `timeout_s`, or where there is no room.
        """
        self.rank = rank
        self.size = size
        self.threads: int | None = None
        """Threads of a layer; None: torch's number. The trunk may have borrowed some that peers need for experts."""
        self._lib = lib
        self._timeout_s = timeout_s
        room_bytes = _room_bytes(size)
        capacity = min(max_tokens, _ROUND_TOKENS)
        while capacity > _LEAST_TOKENS and lib.emoe_exchange_bytes(size, capacity, hidden, top_k) > room_bytes:
            capacity //= 2

        def meet(memories: Sequence[mmap.mmap]) -> None:
            # the views keep the memory mapped
            self._views = [torch.frombuffer(memory, dtype=torch.uint8) for memory in memories]
            bases = (ctypes.c_int64 * size)(*(view.data_ptr() for view in self._views))
            limit_ns = int(timeout_s * 1e9)
            self.handle = lib.emoe_exchange_new(rank, size, capacity, hidden, top_k, bases, limit_ns)
            weakref.finalize(self, lib.emoe_exchange_free, self.handle)
            self.check(lib.emoe_exchange_meet(self.handle))

        join(group, rank, size, lib.emoe_exchange_bytes(size, capacity, hidden, top_k), timeout_s, meet)

    def begin(self, tokens_per_rank: Sequence[int]) -> None:
        """A step begins, in which each rank runs so many tokens."""
        self._lib.emoe_exchange_begin(self.handle, (ctypes.c_int64 * self.size)(*tokens_per_rank))

    def layer(
        self, experts: Sequence[Any], routes_WE: Tensor, x_TH: Tensor, index_TK: Tensor, weight_TK: Tensor
    ) -> Tensor:
        """The experts of one layer for the tokens of all ranks: [T, H] for ours, in bfloat16.

        `experts` are the layer's arguments in moe.cpp; `routes_WE` (int16) says who serves which rank's tokens.
        Blocks on the other ranks. Raises StepAborted when one of them is gone, or after `abort()`.
        """
        x_TH, index_TK, weight_TK = x_TH.contiguous(), index_TK.contiguous(), weight_TK.float().contiguous()
        assert x_TH.dtype == torch.bfloat16
        assert index_TK.dtype == torch.int64
        out_TH = torch.empty_like(x_TH)
        status = self._lib.emoe_exchange_layer(
            self.handle,
            *experts,
            routes_WE.data_ptr(),
            x_TH.data_ptr(),
            index_TK.data_ptr(),
            weight_TK.data_ptr(),
            out_TH.data_ptr(),
            self.threads or torch.get_num_threads(),
        )
        self.check(status)
        return out_TH

    def take_waited(self) -> Waited:
        """Since the last call."""
        times = (ctypes.c_int64 * 2)()
        self._lib.emoe_exchange_waited(self.handle, times)
        return Waited(tokens_s=times[0] / 1e9, sums_s=times[1] / 1e9)

    def abort(self) -> None:
        self._lib.emoe_exchange_abort(self.handle)

    def close(self) -> None:
        """Nothing to do: the memory goes with the object, which a step may still be using."""

    def check(self, status: int) -> None:
        """Raises StepAborted for what a native function returns, if it says so."""
        if status == _ABORTED:
            raise StepAborted("the exchange was aborted")
        if status == _SILENT:
            raise StepAborted(f"no word from a peer for {self._timeout_s:g} s")
        assert status == _DONE, "the ranks disagree about a step's tokens"


def _room_bytes(size: int) -> int:
    """Of a rank's segment. A container's /dev/shm may have 64 MB in all.

    It depends on what is the same for all ranks, since their rounds must be equal: not on what is free at the moment.
    """
    there = os.statvfs(DIRECTORY)
    return min(_SEGMENT_BYTES, there.f_frsize * there.f_blocks // (_GROUPS * size))
