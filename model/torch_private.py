"""Every use of torch that its documentation does not promise: the one place to look when torch is upgraded.

tests/model/test_private_seams.py names each with the signature that is expected of it, so that an upgrade fails a test
instead of losing a path. Imports nothing of this project.
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
"""The operator by which Python reads a tensor's value, which a tensor on the meta device does not have."""


def onednn_pack(weight: Tensor, rows: int) -> Tensor:
    """A bfloat16 matrix [out, in] on CPU in oneDNN's layout for products with about so many rows; an opaque tensor."""
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), rows)
    return packed


def onednn_linear(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    """`F.linear` for a matrix of `onednn_pack`."""
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
    return out


def plain_tensors() -> AbstractContextManager[Any]:
    """Within the block, a subclass of Tensor is handled as a plain tensor."""
    guard: AbstractContextManager[Any] = torch._C.DisableTorchFunctionSubclass()
    return guard


def gloo_group(store: Any, rank: int, size: int, timeout: datetime.timedelta, address: str) -> Any:
    """A process group of its own, unknown to torch.distributed's global state. Its sockets listen at `address` only."""
    options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    options._timeout = timeout
    options._devices = [dist.ProcessGroupGloo.create_device(hostname=address)]
    return dist.ProcessGroupGloo(store, rank, size, options)


def nccl_group(store: Any, rank: int, size: int, timeout: datetime.timedelta, interface: str | None) -> Any:
    """As `gloo_group`, on GPUs, over the network interface of that name; None leaves the choice to NCCL.

    Its watchdog is off: it would end this process, and what it holds, with a dead peer.
    """
    os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] = "0"
    if interface is not None:
        # NCCL reads it once, when the process joins its first group; "=": this very name
        os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={interface}")
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = timeout
    return dist.ProcessGroupNCCL(store, rank, size, options)


def alltoall(group: Any, out: Tensor, payload: Tensor, received: list[int], sent: list[int]) -> None:
    """Exchange rows of `payload` between all ranks. Waits for gloo; NCCL is ordered on the device's stream."""
    group.alltoall_base(out, payload, received, sent, dist.AllToAllOptions()).wait()
