"""Processes that share a GPU: messages reach their inboxes in order, a lost peer ends all waits, memory is freed once.

The GPU is a fake one (tests/model/fake_device.py); tests/model/test_cuda.py runs the same on a real one.
"""

from __future__ import annotations

import itertools
import os
import random
import subprocess
import sys
import threading
import time

import pytest
import torch

from elastic_moe.cluster.errors import StepAborted
from elastic_moe.model.shared_gpu.memory import inbox
from elastic_moe.model.shared_gpu.signals import Silence, following, reached, segment_bytes
from elastic_moe.model.shared_gpu.transport import DeviceMemoryTransport
from tests.model.fake_device import FakeDevice, StreamedDevice
from tests.model.groups import join_by_gpu, run_group, try_by_gpu

# --- Pure parts ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "most"), [(2, 1), (3, 256), (5, 1000)])
def test_places_of_an_inbox_lie_apart(size: int, most: int) -> None:
    layout = inbox(size, most)
    assert layout.capacity >= most
    for owner in range(size):
        peers = [peer for peer in range(size) if peer != owner]
        places = {layout.offset(n, source=peer, owner=owner) for n, peer in itertools.product((6, 7), peers)}
        assert len(places) == 2 * len(peers)
        assert all(place % 256 == 0 and 0 <= place <= layout.num_bytes - layout.capacity for place in places)
        assert layout.offset(4, source=peers[0], owner=owner) == layout.offset(6, source=peers[0], owner=owner)


def test_numbers_wrap_around() -> None:
    last = following(0, -1)
    assert last == (1 << 32) - 1
    assert following(last) == 0
    assert reached(0, last)
    assert reached(last, last)
    assert not reached(last, 0)
    assert reached(following(last, 1 << 30), following(last, 5))


def test_segments_are_whole_pages() -> None:
    assert segment_bytes(2) == 4096
    assert segment_bytes(64) % 4096 == 0
    assert segment_bytes(64) >= 3 * 64 * 64


def test_silence_is_counted_while_somebody_is_waited_for() -> None:
    silence = Silence(100.0)
    assert silence.lasts_s(4, (4, 4), 130.0) == 0
    assert silence.lasts_s(6, (4, 5), 131.0) == 0, "this rank has moved"
    assert silence.lasts_s(6, (4, 5), 133.5) == 2.5
    assert silence.lasts_s(6, (4, 6), 134.0) == 0, "a peer has moved"
    assert silence.lasts_s(6, (4, 6), 135.0) == 1
    assert silence.lasts_s(6, (6, 6), 136.0) == 0
    assert silence.lasts_s(6, (6, 6), 999.0) == 0, "nobody is waited for"


# --- The protocol -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("host_waits", [False, True])
@pytest.mark.parametrize("wraps", [False, True])
def test_streams_that_lag_read_what_was_sent_to_them(size: int, host_waits: bool, wraps: bool) -> None:
    """The CPUs launch as far ahead as they can. Sizes that the receiver does not know make them meet now and then."""
    devices = [StreamedDevice(random.Random(rank)) for rank in range(size)]
    transports = join_by_gpu(devices)
    if wraps:
        for transport in transports:
            transport._watch.launched = following(0, -20)
            for peer in range(size):
                transport._signals._arrived[transport.rank][peer] = following(0, -20)

    def count(source: int, target: int, turn: int) -> int:
        return (7 * source + 3 * target + turn) % 50

    def serve(rank: int) -> list[tuple[int, int, torch.Tensor]]:
        transport, device, rng = transports[rank], devices[rank], random.Random(rank)
        transport.host_waits = host_waits
        read: list[tuple[int, int, torch.Tensor]] = []
        for turn in range(60):
            send = [[torch.full((count(rank, peer, turn),), 1000 * rank + turn)] for peer in range(size)]
            known = [8 * count(peer, rank, turn) for peer in range(size)] if turn % 10 else None
            received = transport.all_to_all(send, known)
            for peer, raw in enumerate(received):
                device.launch(lambda peer=peer, turn=turn, raw=raw: read.append((peer, turn, raw.clone())))
            if rng.random() < 0.2:
                time.sleep(rng.random() * 0.002)
        done = device.mark()
        while not done():
            time.sleep(0.001)
        transport.check()
        return read

    for rank, read in enumerate(run_group(size, serve)):
        assert len(read) == 60 * size
        for peer, turn, raw in read:
            want = [] if peer == rank else [1000 * peer + turn] * count(peer, rank, turn)
            assert raw.view(torch.int64).tolist() == want
    close(transports)
    for device in devices:
        assert device.holds_nothing
        device.end()


def close(transports: list[DeviceMemoryTransport]) -> None:
    for transport in transports:
        transport.close()
    assert all(transport.wait_freed(10) for transport in transports)


def test_an_abort_ends_the_waits_and_the_others_hear_of_it() -> None:
    devices = [FakeDevice() for _ in range(3)]
    transports = join_by_gpu(devices)
    first, second, third = transports
    threading.Timer(0.1, first.abort).start()
    # the waits end, as on a GPU, and what has come is not valid
    first.all_to_all([[]] * 3, [0] * 3)
    for transport in (first, second, third):
        with pytest.raises(StepAborted, match="aborted"):
            transport.check()
    with pytest.raises(StepAborted, match="w0 has aborted"):
        second.all_to_all([[]] * 3, [0] * 3)
    close(transports)
    assert all(device.holds_nothing for device in devices)


def test_the_others_hear_of_an_abort_before_what_it_releases_reaches_them() -> None:
    """The aborted rank's stream goes on with bytes that have no meaning. No peer may take them for a result."""
    for turn in range(8):
        first, second, _ = transports = join_by_gpu([FakeDevice() for _ in range(3)])

        def go_on(first: DeviceMemoryTransport = first) -> None:
            # what a GPU's stream had been given before the abort
            first.all_to_all([[]] * 3, [0] * 3)
            for peer in (1, 2):
                first._send(peer, [torch.full((8,), 9)], 2 + 3)

        lost = threading.Thread(target=go_on)
        lost.start()
        threading.Timer(0.002 * (turn % 3), first.abort).start()
        while not second._signals.has_arrived(0, 5) and second._watch.failure is None:
            time.sleep(0)
        with pytest.raises(StepAborted):
            second.check()
        lost.join()
        close(transports)


def impatient(timeout_s: float) -> list[DeviceMemoryTransport]:
    """Two ranks that wait so long for one another, once they have joined."""
    transports = join_by_gpu([FakeDevice() for _ in range(2)])
    for transport in transports:
        transport._watch._timeout_s = timeout_s
    return list(transports)


@pytest.mark.parametrize("host_waits", [False, True])
def test_a_silent_peer_is_given_up_after_the_timeout(host_waits: bool) -> None:
    transports = impatient(0.3)
    transports[0].host_waits = host_waits

    def exchange() -> None:
        transports[0].all_to_all([[], []], [0, 0])
        transports[0].check()

    with pytest.raises(StepAborted, match=r"w1 has not answered for 0\.3 s"):
        exchange()
    with pytest.raises(StepAborted, match="w0 has aborted"):
        transports[1].check()
    close(transports)


def test_a_group_that_is_idle_is_not_given_up() -> None:
    transports = impatient(0.1)
    time.sleep(0.3)
    run_group(2, lambda rank: transports[rank].all_to_all([[], []], [0, 0]))
    for transport in transports:
        transport.check()
    close(transports)


def test_a_late_write_of_a_slow_peer_does_not_stop_a_released_stream() -> None:
    first, second = transports = join_by_gpu([FakeDevice() for _ in range(2)])
    first._watch.launched = 9
    first.abort()
    second._device.write(second._mapped.words[0] + 64, 4)
    deadline = time.monotonic() + 5
    while not first._signals.has_arrived(1, 9):
        assert time.monotonic() < deadline
        time.sleep(0.005)
    close(transports)


# --- Memory -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", ["register", "allocate", "export", "open", "wait"])
def test_if_one_worker_cannot_share_memory_none_does(call: str) -> None:
    devices = [FakeDevice(), FakeDevice(refuses=call), FakeDevice()]
    assert try_by_gpu(devices, timeout_s=5) == [None] * 3
    deadline = time.monotonic() + 5
    while not all(device.holds_nothing for device in devices):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_memory_is_kept_until_no_peer_can_write_to_it() -> None:
    first, second = FakeDevice(), FakeDevice()
    transports = join_by_gpu([first, second])
    transports[0].close()
    assert not transports[0].wait_freed(0.2)
    assert not first.opened
    assert first.owned
    transports[1].close()
    assert all(transport.wait_freed(5) for transport in transports)
    assert first.holds_nothing
    assert second.holds_nothing


def test_a_dead_peer_keeps_no_memory() -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    device = FakeDevice()
    transports = join_by_gpu([device, FakeDevice()])
    transports[0]._watch._pids = [os.getpid(), dead.pid]
    transports[0].close()
    assert transports[0].wait_freed(5)
    assert device.holds_nothing
    transports[1].close()


def test_a_transport_that_is_dropped_is_closed() -> None:
    devices = [FakeDevice(), FakeDevice()]
    transports = join_by_gpu(devices)
    del transports
    deadline = time.monotonic() + 5
    while not all(device.holds_nothing for device in devices):
        assert time.monotonic() < deadline
        time.sleep(0.01)
