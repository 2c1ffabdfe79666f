"""How lock-step workers exchange bytes: one operation, all-to-all, behind one Protocol.

    LocalTransport       one worker: nothing to do
    SharedMemoryTransport  CPU workers of one node: publish, wait for the others, read (shared_memory.py)
    CollectiveTransport  gloo between nodes, NCCL between GPUs, through torch.distributed's process groups

Workers of one node that all have the native library need no bytes exchanged: model/native/exchange.py.

No global process group is used: every epoch's membership has its own, and a dead one is simply let go.
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
from elastic_moe.model.torch_private import PrefixStore, TCPStore, alltoall, gloo_group, nccl_group


class Transport(Protocol):
    """A group of workers that exchange bytes in lock-step."""

    rank: int
    size: int

    def all_to_all(self, send: Sequence[Sequence[Tensor]], recv_bytes: Sequence[int] | None) -> list[Tensor]:
        """Send `send[r]` (its tensors' bytes, one after another) to rank r; get what each rank sent here, as uint8.

        `recv_bytes` [W] says what will come where the caller knows, which saves some transports an exchange of sizes.
        What is returned may be overwritten by the second call after this one. The entry of one's own rank is ignored
        and comes back empty. Blocks, unless a device carries it out (see `check`). Raises StepAborted when a peer is
        gone, or after `abort()`.
        """
        ...

    def check(self) -> None:
        """Raises StepAborted where exchanges that returned at once have come to nothing: what they brought is void."""
        ...

    def abort(self) -> None:
        """Wake a blocked `all_to_all`, from another thread; the transport is of no use afterwards."""
        ...

    def close(self) -> None: ...


class LocalTransport:
    """The group of one."""

    rank = 0
    size = 1

    def all_to_all(self, send: Sequence[Sequence[Tensor]], recv_bytes: Sequence[int] | None) -> list[Tensor]:
        return [torch.empty(0, dtype=torch.uint8)]

    def check(self) -> None: ...

    def abort(self) -> None: ...

    def close(self) -> None: ...


class CollectiveTransport:
    """gloo or NCCL over a store of this group's own.

    Sizes travel first where the caller does not know them. With gloo, a peer's death closes its sockets, which raises
    here; workers that share a GPU use it too, and their tensors travel by the host. With NCCL the host goes on at once:
    a peer's death is noticed by the engine, `abort` ends the waiting kernels, and `check` says so.
    """

    def __init__(self, backend: str, *, rendezvous: str, group: str, rank: int, size: int, timeout_s: float) -> None:
        """`rendezvous` is host:port of a store (`open_store`) that outlives the group; `group` prefixes its keys."""
        self.rank = rank
        self.size = size
        self._aborted = False
        self._device = torch.device("cuda", torch.cuda.current_device()) if backend == "nccl" else torch.device("cpu")
        host, port = rendezvous.rsplit(":", 1)
        # the one address that members are known to be reached by: a machine's own name may be 127.0.1.1 to itself
        address = _address_towards(host, int(port))
        timeout = datetime.timedelta(seconds=timeout_s)
        store = PrefixStore(group, TCPStore(host, int(port), is_master=False, timeout=timeout))
        self._group: Any
        if backend == "nccl":
            self._group = nccl_group(store, rank, size, timeout, interface_of(address))
            # a first word, so that members have met; on a stream of its own, since steps of another group may wait for
            # one another on this device's
            with torch.cuda.stream(torch.cuda.Stream()):  # type: ignore[no-untyped-call]
                self._sizes([0] * size)
        else:
            self._group = gloo_group(store, rank, size, timeout, address)

    def all_to_all(self, send: Sequence[Sequence[Tensor]], recv_bytes: Sequence[int] | None) -> list[Tensor]:
        parts = [
            [] if rank == self.rank else [t.contiguous().view(-1).view(torch.uint8) for t in tensors]
            for rank, tensors in enumerate(send)
        ]
        sent = [sum(t.numel() for t in tensors) for tensors in parts]
        flat = [t for tensors in parts for t in tensors]
        home = flat[0].device if flat else self._device
        payload = torch.cat(flat).to(self._device) if flat else torch.empty(0, dtype=torch.uint8, device=self._device)
        try:
            received = self._sizes(sent) if recv_bytes is None else [int(n) for n in recv_bytes]
            received[self.rank] = 0
            out = torch.empty(sum(received), dtype=torch.uint8, device=self._device)
            self._refuse_if_ended()
            alltoall(self._group, out, payload, received, sent)
        except RuntimeError as error:
            # the traceback would keep the group, and its sockets, alive
            message = str(error).splitlines()[0]
            self._group = None
            raise StepAborted(f"exchange failed: {message}") from None
        return list(torch.split(out.to(home), received))

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
        if self._device.type == "cuda":
            self._end_nccl()
        else:
            # gloo cannot be woken: a hung peer must be killed, and then its sockets close
            self._group = None

    def close(self) -> None:
        if self._device.type == "cuda":
            self._end_nccl()
        self._group = None

    def _end_nccl(self) -> None:
        """End its kernels, wherever they wait. The group is kept: another thread may be about to use it."""
        group = self._group
        if group is not None:
            group.abort()


def open_store(address: str) -> TCPStore:
    """A store for the rendezvous of one process group, on a free port of `address` and nowhere else.

    Anybody who reaches the port can read and write it: the network between nodes has to be a trusted one.
    """
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    listener = socket.create_server((address, 0), family=family)
    port = listener.getsockname()[1]
    # left to itself, a store listens on every address of the machine
    return TCPStore(address, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach())


def _address_towards(host: str, port: int) -> str:
    """This machine's address on the way to `host`. Nothing is sent."""
    family, kind, protocol, _, there = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.connect(there)
        return str(probe.getsockname()[0])


def interface_of(address: str) -> str | None:
    """The name of the network interface with this IP address; None where this machine has none."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(known.address.split("%")[0] == address for known in addresses):
            return name
    return None
