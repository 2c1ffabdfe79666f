"""Every transport delivers each message to its receiver; a peer that dies or aborts wakes the others."""

from __future__ import annotations

import os
import threading
import time
import uuid

import psutil
import pytest
import torch

from elastic_moe.cluster.errors import StepAborted
from elastic_moe.model.exchange.shared_memory import SharedMemoryTransport
from elastic_moe.model.exchange.transports import interface_of, open_store
from elastic_moe.model.native.segments import DIRECTORY
from tests.model.groups import make_transports, run_group


@pytest.mark.parametrize(
    ("kind", "size"), [("local", 1), ("shm", 2), ("shm", 4), ("tcp", 2), ("tcp", 4), ("gpu", 2), ("gpu", 3)]
)
def test_every_byte_arrives(kind: str, size: int) -> None:
    transports = make_transports(kind, size)

    def message(source: int, target: int, turn: int) -> torch.Tensor:
        # lengths differ, and some messages are empty
        return torch.arange((source * 7 + target * 3 + turn) % 5 * 11, dtype=torch.float32) + 100 * source + target

    def exchange(rank: int) -> None:
        for turn in range(20):
            send = [[message(rank, peer, turn), torch.tensor([turn])] for peer in range(size)]
            known = [message(peer, rank, turn).nbytes + 8 for peer in range(size)] if turn % 2 else None
            received = transports[rank].all_to_all(send, known)
            for peer in range(size):
                if peer == rank:
                    assert received[peer].numel() == 0
                    continue
                # a copy: a tensor's bytes may start anywhere in the message
                body, number = received[peer][:-8].clone(), received[peer][-8:].clone()
                assert torch.equal(body.view(torch.float32), message(peer, rank, turn))
                assert number.view(torch.int64).item() == turn

    run_group(size, exchange)


def test_shared_memory_leaves_no_name_behind() -> None:
    before = set(os.listdir(DIRECTORY))
    transports = make_transports("shm", 3)
    assert {n for n in set(os.listdir(DIRECTORY)) - before if n.startswith("emoe-test")} == set()
    for transport in transports:
        transport.close()


def test_shared_memory_gives_up_a_peer_that_does_not_come() -> None:
    group = f"emoe-test-{uuid.uuid4().hex[:8]}"
    with pytest.raises(StepAborted, match="did not join"):
        SharedMemoryTransport(group=group, rank=0, size=2, max_bytes=64, timeout_s=0.2)
    assert not list(DIRECTORY.glob(f"{group}*"))


def test_abort_wakes_a_waiting_rank() -> None:
    first, _ = make_transports("shm", 2)
    threading.Timer(0.2, first.abort).start()
    begin = time.monotonic()
    with pytest.raises(StepAborted, match="aborted"):
        first.all_to_all([[], []], None)
    assert time.monotonic() - begin < 5


def test_a_silent_peer_is_given_up_after_the_timeout() -> None:
    first, _ = make_transports("shm", 2, timeout_s=0.3)
    with pytest.raises(StepAborted, match="not answered"):
        first.all_to_all([[], []], None)


def test_a_rendezvous_listens_at_its_address_only() -> None:
    before = set(_listening())
    store = open_store("127.0.0.1")
    assert set(_listening()) - before == {("127.0.0.1", store.port)}


def _listening() -> list[tuple[str, int]]:
    """Where this process does."""
    connections = psutil.Process().net_connections("tcp")
    return [(c.laddr.ip, c.laddr.port) for c in connections if c.status == psutil.CONN_LISTEN]


def test_the_interface_of_an_address() -> None:
    loopback = interface_of("127.0.0.1")
    assert loopback is not None
    assert any(a.address == "127.0.0.1" for a in psutil.net_if_addrs()[loopback])
    assert interface_of("203.0.113.1") is None
