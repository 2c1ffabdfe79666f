"""Computes the MoE layers of the workers of one node together in native code: see exchange.h and moe.cpp."""

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
from elastic_moe.model.native.experts import check_available
from elastic_moe.model.native.segments import DIRECTORY, join

_ROUND_TOKENS = 1024
"""The most tokens of a rank in one round."""
_SEGMENT_BYTES = 128 << 20
"""The most bytes of a rank's segment. Rounds have fewer tokens if a segment would take more."""
_GROUPS = 2
"""Groups whose segments must have room at the same time: one in use, and the next one."""
_LEAST_TOKENS = 16

_DONE, _ABORTED, _SILENT = 0, 1, 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Waited:
    """How long a rank waited for its peers: for their tokens, and for their partial sums."""

    tokens_s: float
    sums_s: float


class NativeExchange:
    """A group of workers in lock-step. The constructor blocks until all ranks have joined."""

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
        one_round: bool = False,
    ) -> None:
        """`group` is a name that is unique on the node. `max_tokens` is the most that a rank runs in a step.
        `one_round`: a step's tokens travel in one round if the segments have room for them, since experts that are not
        in memory would be read in every round. All ranks must say the same.

        Raises StepAborted if a peer does not join within `timeout_s`, or if /dev/shm has no room.
        """
        self.rank = rank
        self.size = size
        self.threads: int | None = None
        """Threads that compute a layer's experts; None means torch's number. The trunk may borrow threads that peers
        need for their experts, so the two numbers differ.
        """
        self._lib = lib
        self._timeout_s = timeout_s
        room_bytes = _room_bytes(size)
        # where experts have replicas, sums take twice the room, and a round has half as many tokens
        capacity = 2 * max_tokens if one_round else max(2, min(max_tokens, _ROUND_TOKENS))
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
        """Begin a step, in which rank r runs `tokens_per_rank[r]` tokens."""
        self._lib.emoe_exchange_begin(self.handle, (ctypes.c_int64 * self.size)(*tokens_per_rank))

    def decline(self) -> None:
        """End a step in which this rank may have asked others for help with its output head. Call it in every step with
        tokens of this rank, since ranks without any wait for it."""
        self._lib.emoe_exchange_decline(self.handle)

    def layer(
        self, experts: Sequence[Any], routes_WE: Tensor, x_TH: Tensor, index_TK: Tensor, weight_TK: Tensor
    ) -> Tensor:
        """Compute the experts of one layer for the tokens of all ranks. Returns this rank's sums [T, H] in bfloat16.

        `experts` are the layer's arguments in moe.cpp. `routes_WE` (int16) is the rank that computes expert E for the
        tokens of rank W by the placement alone; of replicas, all ranks choose by the tokens of the round. Blocks on the
        other ranks. Raises StepAborted if one of them is gone, or after `abort()`.
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
        """How long this rank has waited since the last call."""
        times = (ctypes.c_int64 * 2)()
        self._lib.emoe_exchange_waited(self.handle, times)
        return Waited(tokens_s=times[0] / 1e9, sums_s=times[1] / 1e9)

    def abort(self) -> None:
        self._lib.emoe_exchange_abort(self.handle)

    def close(self) -> None:
        """Do nothing: the memory is freed with the object, which a step may still use."""

    def check(self, status: int) -> None:
        """Raise StepAborted if the status that a native function returned means so."""
        if status == _ABORTED:
            raise StepAborted("the exchange was aborted")
        if status == _SILENT:
            raise StepAborted(f"a peer has not answered for {self._timeout_s:g} s")
        check_available(status)
        assert status == _DONE, "the ranks disagree about a step's tokens"


def _room_bytes(size: int) -> int:
    """The most bytes of a rank's segment. A container's /dev/shm may have 64 MB in all.

    All ranks must get the same number, since their rounds must be equal. So it does not depend on the free space.
    """
    there = os.statvfs(DIRECTORY)
    return min(_SEGMENT_BYTES, there.f_frsize * there.f_blocks // (_GROUPS * size))
