"""The exchange between nodes: what wakes a worker that waits, and what strangers cannot do."""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import signal
import socket
import threading
import time
from typing import Any

import psutil
import pytest
import torch

from elastic_moe.cluster.errors import StepAborted
from elastic_moe.model.exchange.meeting import Meeting
from elastic_moe.model.exchange.rates import measure
from elastic_moe.model.exchange.tcp import TcpTransport
from tests.model.groups import join_by_tcp, run_group
from tests.model.processes import processes


def test_abort_wakes_a_rank_that_waits_for_a_silent_peer() -> None:
    first, second = join_by_tcp(2, timeout_s=600)
    threading.Timer(0.1, first.abort).start()
    with pytest.raises(StepAborted, match="aborted"):
        first.all_to_all([[], [torch.ones(3)]], None)
    with pytest.raises(StepAborted, match="aborted"):
        first.check()
    # what was sent before has come; then the abort has closed the connection, which tells the peer
    second.all_to_all([[], []], None)
    with pytest.raises(StepAborted, match="the connection to w0 has ended"):
        second.all_to_all([[], []], None)


def test_abort_wakes_a_rank_whose_peer_reads_nothing() -> None:
    first, second = join_by_tcp(2, timeout_s=600)
    threading.Timer(0.1, first.abort).start()
    with pytest.raises(StepAborted, match="aborted"):
        first.all_to_all([[], [torch.ones(16 << 20)]], None)
    second.close()


def test_a_silent_peer_is_given_up_after_the_timeout() -> None:
    first, second = join_by_tcp(2, timeout_s=0.3)
    with pytest.raises(StepAborted, match=r"w1 has not answered for 0\.3 s"):
        first.all_to_all([[], []], None)
    second.close()


def test_large_messages_pass_one_another() -> None:
    """Each is larger than what the kernel keeps, so a rank that sent before it read would wait for ever."""
    transports = join_by_tcp(3)
    sizes = [[(rank + 1) * (peer + 2) * 400_000 for peer in range(3)] for rank in range(3)]

    def exchange(rank: int) -> list[int]:
        send = [[torch.full((sizes[rank][peer],), rank, dtype=torch.uint8)] for peer in range(3)]
        received = transports[rank].all_to_all(send, None)
        assert all((raw == peer).all() for peer, raw in enumerate(received) if peer != rank)
        return [len(raw) for raw in received]

    lengths = run_group(3, exchange)
    assert lengths == [[0 if peer == rank else sizes[peer][rank] for peer in range(3)] for rank in range(3)]


def test_a_message_of_another_length_than_expected_is_refused() -> None:
    first, second = join_by_tcp(2)

    def exchange(rank: int) -> None:
        [first, second][rank].all_to_all([[torch.ones(2)], [torch.ones(2)]], [4, 4])

    with pytest.raises(StepAborted, match="expected exchange 2 of 4 bytes, exchange 2 of 8 bytes came"):
        run_group(2, exchange)


def _peer(inbox: Any, outbox: Any) -> None:
    meeting = Meeting("127.0.0.1")
    outbox.put(meeting.endpoint)
    doors = inbox.get()
    connections = meeting.join(1, doors, ["w0", "w1"], 30)
    transport = TcpTransport(rank=1, connections=connections, names=["w0", "w1"], timeout_s=600)
    transport.all_to_all([[], []], None)
    time.sleep(60)


def test_a_killed_peer_wakes_the_others_at_once() -> None:
    context = processes()
    inbox, outbox = context.Queue(), context.Queue()
    peer = context.Process(target=_peer, args=(inbox, outbox))
    peer.start()
    try:
        meeting = Meeting("127.0.0.1")
        doors = [meeting.endpoint, outbox.get(timeout=60)]
        inbox.put(doors)
        connections = meeting.join(0, doors, ["w0", "w1"], 30)
        transport = TcpTransport(rank=0, connections=connections, names=["w0", "w1"], timeout_s=600)
        transport.all_to_all([[], []], None)
        assert peer.pid is not None
        threading.Timer(0.1, os.kill, (peer.pid, signal.SIGKILL)).start()
        with pytest.raises(StepAborted, match="the connection to w1 has ended"):
            transport.all_to_all([[], [torch.ones(4)]], None)
    finally:
        peer.kill()
        peer.join()
        for queue in (inbox, outbox):
            queue.close()
            queue.join_thread()


# --- Joining ----------------------------------------------------------------------------------------------------------


def test_a_door_listens_at_its_address_only_and_closes_when_all_are_there() -> None:
    before = _listening()
    meetings = [Meeting("127.0.0.1") for _ in range(2)]
    doors = [meeting.endpoint for meeting in meetings]
    assert _listening() - before == {("127.0.0.1", door.port) for door in doors}
    connections = run_group(2, lambda rank: meetings[rank].join(rank, doors, ["w0", "w1"], 30))
    assert _listening() == before
    for ends in connections:
        for connection in ends.values():
            assert connection.getsockname()[0] == connection.getpeername()[0] == "127.0.0.1"
            connection.close()


def test_strangers_at_a_door_keep_no_group_from_forming() -> None:
    meetings = [Meeting("127.0.0.1") for _ in range(3)]
    doors = [meeting.endpoint for meeting in meetings]
    rng = random.Random(0)
    with contextlib.ExitStack() as stack:

        def disturb() -> None:
            for door in doors:
                for _ in range(30):
                    with contextlib.suppress(OSError):  # it is hung up on, or all have come
                        connection = socket.create_connection((door.address, door.port), timeout=1)
                        stack.callback(connection.close)
                        connection.sendall(rng.randbytes(rng.randrange(200)))

        disturb()
        intruders = threading.Thread(target=disturb)
        intruders.start()
        connections = run_group(3, lambda rank: meetings[rank].join(rank, doors, ["w0", "w1", "w2"], 30))
        intruders.join()
    assert [sorted(ends) for ends in connections] == [[1, 2], [0, 2], [0, 1]]
    for ends in connections:
        for connection in ends.values():
            connection.close()


def test_a_token_opens_no_place_of_another_rank() -> None:
    meeting = Meeting("127.0.0.1")
    door = meeting.endpoint
    for rank in (0, 1, 7):  # its own place, one of lower rank, and one that there is not
        with socket.create_connection((door.address, door.port)) as stranger:
            stranger.sendall(door.token.encode() + rank.to_bytes(4, "little"))
    other = Meeting("127.0.0.1")
    with pytest.raises(StepAborted, match=r"w2 did not join within 0\.3 s"):
        # the door of rank 0 is this process's own listener, which nobody serves: the connection is made all the same
        meeting.join(1, [other.endpoint, door, door], ["w0", "w1", "w2"], 0.3)


def test_who_does_not_come_is_named() -> None:
    first, second, third = (Meeting("127.0.0.1") for _ in range(3))
    doors = [meeting.endpoint for meeting in (first, second, third)]
    with pytest.raises(StepAborted, match=r"w1, w2 did not join within 0\.3 s"):
        first.join(0, doors, ["w0", "w1", "w2"], 0.3)
    # the door of the first is closed now
    with pytest.raises(StepAborted, match=r"w0 cannot be reached at 127\.0\.0\.1:\d+ from 127\.0\.0\.1: Connection"):
        second.join(1, doors, ["w0", "w1", "w2"], 30)


def test_a_join_is_given_up_by_another_thread() -> None:
    meeting, other = Meeting("127.0.0.1"), Meeting("127.0.0.1")
    threading.Timer(0.1, meeting.give_up).start()
    with pytest.raises(StepAborted, match="given up"):
        meeting.join(0, [meeting.endpoint, other.endpoint], ["w0", "w1"], 600)


def test_a_first_exchange_is_given_up_too() -> None:
    """Rank 1 is connected, but does not take part."""
    meeting, other = Meeting("127.0.0.1"), Meeting("127.0.0.1")
    doors, names = [meeting.endpoint, other.endpoint], ["w0", "w1"]
    connections = run_group(2, lambda rank: [meeting, other][rank].join(rank, doors, names, 30))
    threading.Timer(0.1, meeting.give_up).start()
    with pytest.raises(StepAborted):
        TcpTransport(rank=0, connections=connections[0], names=names, timeout_s=600)
    connections[1][0].close()


def _listening() -> set[tuple[str, int]]:
    """Where this process does."""
    connections = psutil.Process().net_connections("tcp")
    return {(c.laddr.ip, c.laddr.port) for c in connections if c.status == psutil.CONN_LISTEN}


# --- Rates ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [2, 3, 5])
def test_every_pair_is_measured_and_the_exchange_goes_on(size: int) -> None:
    transports = join_by_tcp(size)
    run_group(size, lambda rank: measure(transports[rank]))
    found = [transport.gbps for transport in transports]
    assert [sorted(rates) for rates in found] == [[p for p in range(size) if p != rank] for rank in range(size)]
    assert {transport.slowest_gbps for transport in transports} == {min(min(rates.values()) for rates in found)}
    for rank, peer in itertools.permutations(range(size), 2):
        assert found[rank][peer] == found[peer][rank] > 0, "both agree on the time"
    received = run_group(size, lambda rank: transports[rank].all_to_all([[torch.tensor([rank])]] * size, None))
    for rank, messages in enumerate(received):
        assert [m.clone().view(torch.int64).tolist() for m in messages] == [[p] * (p != rank) for p in range(size)]
