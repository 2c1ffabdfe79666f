"""Every transport delivers what was sent to whom it was sent; a peer that is gone or told to stop wakes the others."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
import uuid

import pytest
import torch

from cluster.errors import StepAborted
from model.native.segments import DIRECTORY
from model.shared_memory import SharedMemoryTransport
from tests.model.groups import make_transports, run_group


@pytest.mark.parametrize(("kind", "size"), [("local", 1), ("shm", 2), ("shm", 4), ("gloo", 2), ("gloo", 3)])
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
    with pytest.raises(StepAborted, match="did not come"):
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
    with pytest.raises(StepAborted, match="no word"):
        first.all_to_all([[], []], None)


def _gloo_peer(port: int, group: str) -> None:
    from model.transport import CollectiveTransport

    transport = CollectiveTransport("gloo", rendezvous=f"127.0.0.1:{port}", group=group, rank=1, size=2, timeout_s=30)
    transport.all_to_all([[], []], None)
    time.sleep(60)


def test_a_killed_gloo_peer_wakes_the_others_at_once() -> None:
    from torch.distributed import TCPStore

    from model.transport import CollectiveTransport

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    group = uuid.uuid4().hex
    peer = multiprocessing.get_context("spawn").Process(target=_gloo_peer, args=(store.port, group))
    peer.start()
    try:
        transport = CollectiveTransport(
            "gloo", rendezvous=f"127.0.0.1:{store.port}", group=group, rank=0, size=2, timeout_s=30
        )
        transport.all_to_all([[], []], None)
        assert peer.pid is not None
        threading.Timer(0.3, os.kill, (peer.pid, signal.SIGKILL)).start()
        begin = time.monotonic()
        with pytest.raises(StepAborted):
            transport.all_to_all([[], [torch.ones(4)]], None)
        assert time.monotonic() - begin < 10
    finally:
        peer.kill()
        peer.join()


def test_what_an_aborted_group_brought_is_void() -> None:
    first, second = make_transports("gloo", 2)
    first.abort()
    with pytest.raises(StepAborted, match="aborted"):
        first.check()
    second.check()
