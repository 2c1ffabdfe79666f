"""How lock-step workers exchange bytes: one operation, all-to-all, behind one Protocol.

    LocalTransport         one worker: there is nothing to do
    SharedMemoryTransport  CPU workers of one node: publish, wait for the others, read (shared_memory.py)
    DeviceMemoryTransport  workers that share one GPU: write into the others' memory there (model/shared_gpu/)
    TcpTransport           CPU workers of several nodes, and workers that cannot use any other (tcp.py)
    NcclTransport          GPUs, through torch.distributed's process group

Workers of one node that all have the native library use model/native/exchange.py instead.

No global process group is used. Every set of members has a group of its own, and a dead group is dropped.
"""

from __future__ import annotations

import datetime
import socket
from collections.abc import Sequence
from typing import Any, Protocol

import psutil
import torch
from torch import Tensor

from elastic_moe.cluster.errors import StepAborted
from elastic_moe.model.torch_private import PrefixStore, TCPStore, alltoall, nccl_group


class Transport(Protocol):
    """Exchanges bytes between workers in lock-step."""

    rank: int
    size: int
    launches: bool
    """An exchange whose sizes are known is only launched: the CPU does not wait for it."""

    def all_to_all(self, send: Sequence[Sequence[Tensor]], recv_bytes: Sequence[int] | None) -> list[Tensor]:
        """Send `send[r]` (its tensors' bytes, one after another) to rank r. Returns each rank's message, as uint8.

        `recv_bytes` [W] are the sizes of the messages if the caller knows them; then some transports exchange no sizes.
        The second call after this one may overwrite the result. The entry of the own rank is ignored, and its result is
        empty. Blocks, unless a device does the exchange (see `check`). Raises StepAborted if a peer is gone, or after
        `abort()`.
        """
        ...

    def check(self) -> None:
        """Raises StepAborted if an exchange that did not block has failed. Its result is invalid then."""
        ...

    def abort(self) -> None:
        """Wake a blocked `all_to_all`. Another thread calls it. The transport cannot be used afterwards."""
        ...

    def close(self) -> None: ...


class LocalTransport:
    """The transport of a single worker."""

    rank = 0
    size = 1
    launches = False

    def all_to_all(self, send: Sequence[Sequence[Tensor]], recv_bytes: Sequence[int] | None) -> list[Tensor]:
        return [torch.empty(0, dtype=torch.uint8)]

    def check(self) -> None: ...

    def abort(self) -> None: ...

    def close(self) -> None: ...


class NcclTransport:
    """NCCL, with a rendezvous store of its own.

    Sizes travel first if the caller does not know them. The CPU does not block: the engine notices a peer's death,
    `abort` ends the waiting kernels, and then `check` raises.
    """

    launches = True

    def __init__(self, *, rendezvous: str, group: str, rank: int, size: int, timeout_s: float) -> None:
        """`rendezvous` is host:port of a store (`open_store`) that outlives the group; `group` prefixes its keys."""
        self.rank = rank
        self.size = size
        self._aborted = False
        self._device = torch.device("cuda", torch.cuda.current_device())
        host, port = rendezvous.rsplit(":", 1)
        # members reach each other at this address; a machine may resolve its own name to 127.0.1.1
        address = _address_towards(host, int(port))
        timeout = datetime.timedelta(seconds=timeout_s)
        store = PrefixStore(group, TCPStore(host, int(port), is_master=False, timeout=timeout))
        self._group: Any = nccl_group(store, rank, size, timeout, interface_of(address))
        # a first exchange, after which all members have joined. It runs on a stream of its own, since steps of
        # another group may wait for one another on the device's stream
        with torch.cuda.stream(torch.cuda.Stream()):  # type: ignore[no-untyped-call]
            self._sizes([0] * size)

    def all_to_all(self, send: Sequence[Sequence[Tensor]], recv_bytes: Sequence[int] | None) -> list[Tensor]:
        parts = [
            [] if rank == self.rank else [t.contiguous().view(-1).view(torch.uint8) for t in tensors]
            for rank, tensors in enumerate(send)
        ]
        sent = [sum(t.numel() for t in tensors) for tensors in parts]
        flat = [t for tensors in parts for t in tensors]
        payload = torch.cat(flat) if flat else torch.empty(0, dtype=torch.uint8, device=self._device)
        try:
            received = self._sizes(sent) if recv_bytes is None else [int(n) for n in recv_bytes]
            received[self.rank] = 0
            out = torch.empty(sum(received), dtype=torch.uint8, device=self._device)
            self._refuse_if_ended()
            alltoall(self._group, out, payload, received, sent)
        except RuntimeError as error:
            # the error's traceback would keep the group and its sockets alive
            message = str(error).splitlines()[0]
            self._group = None
            raise StepAborted(f"exchange failed: {message}") from None
        return list(torch.split(out, received))

    def check(self) -> None:
        if self._aborted:
            raise StepAborted("the process group was aborted")

    def _refuse_if_ended(self) -> None:
        if self._aborted or self._group is None:
            raise StepAborted("the process group was aborted")

    def _sizes(self, sent: Sequence[int]) -> list[int]:
        self._refuse_if_ended()
        mine = torch.tensor(sent, dtype=torch.int64, device=self._device)
        theirs = torch.empty_like(mine)
        ones = [1] * self.size
        alltoall(self._group, theirs, mine, ones, ones)
        return [int(n) for n in theirs.tolist()]

    def abort(self) -> None:
        self._aborted = True
        self._end()

    def close(self) -> None:
        self._end()
        self._group = None

    def _end(self) -> None:
        """End the group's waiting kernels. The group itself is kept, since another thread may be about to use it."""
        group = self._group
        if group is not None:
            group.abort()


def open_store(address: str) -> TCPStore:
    """Open a store for the rendezvous of one process group, on a free port of `address` only.

    Anybody who reaches the port can read and write the store, so the network between nodes must be trusted.
    """
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    listener = socket.create_server((address, 0), family=family)
    port = listener.getsockname()[1]
    # without a listener of ours, a store listens on every address of the machine
    return TCPStore(address, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach())


def _address_towards(host: str, port: int) -> str:
    """This machine's address on the route to `host`. Nothing is sent."""
    family, kind, protocol, _, there = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.connect(there)
        return str(probe.getsockname()[0])


def interface_of(address: str) -> str | None:
    """The name of the network interface with this IP address; None if this machine has no such interface."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(known.address.split("%")[0] == address for known in addresses):
            return name
    return None
