"""Holds every use of torch that its documentation does not promise. Look here first when torch is upgraded.

tests/model/test_private_seams.py names each of them with its expected signature, so that an upgrade fails a test
instead of losing a path silently. This file imports nothing of this project.
"""

from __future__ import annotations

import datetime
import os
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import PrefixStore, TCPStore
from torch.nn.attention import varlen
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["PrefixStore", "TCPStore", "TorchDispatchMode", "varlen"]

READS_A_VALUE = torch.ops.aten._local_scalar_dense.default
"""The operator by which Python reads a tensor's value. A tensor on the meta device has no value."""


def onednn_pack(weight: Tensor, rows: int) -> Tensor:
    """Pack a bfloat16 matrix [out, in] on CPU in oneDNN's layout for about `rows` rows. Returns an opaque tensor."""
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), rows)
    return packed


def onednn_linear(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    """Compute `F.linear` with a matrix that `onednn_pack` has packed."""
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
    return out


def copy_all(targets: list[Tensor], sources: list[Tensor]) -> None:
    """Copy each source to its target. On a GPU, tensors of one dtype are copied by a few kernels in all."""
    torch._foreach_copy_(targets, sources)


def plain_tensors() -> AbstractContextManager[Any]:
    """Within the block, torch handles a subclass of Tensor as a plain tensor."""
    guard: AbstractContextManager[Any] = torch._C.DisableTorchFunctionSubclass()
    return guard


def nccl_group(store: Any, rank: int, size: int, timeout: datetime.timedelta, interface: str | None) -> Any:
    """Make an NCCL process group that is not part of torch.distributed's global state. None as `interface` leaves the
    choice of a network to NCCL.

    NCCL's watchdog is switched off: when a peer dies, it would end this process too, and the experts held here with it.
    """
    os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] = "0"
    if interface is not None:
        # NCCL reads the variable once, when the process joins its first group; "=" asks for this exact name
        os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={interface}")
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = timeout
    return dist.ProcessGroupNCCL(store, rank, size, options)


def alltoall(group: Any, out: Tensor, payload: Tensor, received: list[int], sent: list[int]) -> None:
    """Exchange rows of `payload` between all ranks. It is queued on the device's stream."""
    group.alltoall_base(out, payload, received, sent, dist.AllToAllOptions()).wait()
