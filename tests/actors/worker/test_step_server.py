"""A worker's listener: strangers, silence and damage end the connection that they come by, and nothing else."""

from __future__ import annotations

import contextlib
import resource
import socket
import struct
import threading
import time
import tracemalloc
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic_moe.actors.remote import door, handshakes
from elastic_moe.actors.remote.codec import MAX_BYTES, Message, encode, receive
from elastic_moe.actors.worker import step_server
from elastic_moe.actors.worker.step_server import StepServer
from elastic_moe.cluster.messages.epochs import Epoch
from elastic_moe.cluster.messages.requests import Endpoint, Hello
from elastic_moe.cluster.messages.steps import CommitEpoch, Done, Failed, ForgetSequences, StepPlan, StepResult

PLAN = StepPlan(epoch=Epoch(1), step=7, tokens_per_rank=(0,), new=(), chunks=(), finished=())


class Worker:
    """Notes what it is told. A step waits for `go`."""

    def __init__(self) -> None:
        self.epochs: list[Epoch] = []
        self.forgot = 0
        self.rests = 0
        self.stepping, self.go = threading.Event(), threading.Event()
        self.go.set()

    def step(self, plan: StepPlan) -> StepResult:
        self.stepping.set()
        assert self.go.wait(10)
        return StepResult(step=plan.step, samples=(), compute_s=0.0)

    def commit(self, epoch: Epoch) -> None:
        self.epochs.append(epoch)

    def forget_sequences(self) -> None:
        self.forgot += 1

    def rest(self) -> None:
        self.rests += 1


@pytest.fixture(name="worker", scope="module")
def a_worker() -> Worker:
    return Worker()


@pytest.fixture(name="server", scope="module")
def a_server(worker: Worker) -> Iterator[StepServer]:
    server = StepServer(worker, "127.0.0.1")
    yield server
    server.close()


def stranger(endpoint: Endpoint) -> socket.socket:
    return socket.create_connection((endpoint.address, endpoint.port), timeout=10)


def engine(endpoint: Endpoint) -> socket.socket:
    connection = stranger(endpoint)
    connection.sendall(endpoint.token.encode())
    return connection


def ask(connection: socket.socket, message: Message) -> Message | None:
    connection.sendall(encode(message))
    return receive(connection)


def ends(connection: socket.socket) -> bool:
    """Whether the other side hangs up, having said nothing."""
    try:
        return connection.recv(1) == b""
    except ConnectionResetError:
        return True


def test_messages_of_the_engine_are_carried_out(server: StepServer, worker: Worker) -> None:
    with engine(server.endpoint) as connection:
        assert ask(connection, ForgetSequences()) == Done()
        assert ask(connection, CommitEpoch(epoch=Epoch(5))) == Done()
        assert ask(connection, PLAN) == StepResult(step=7, samples=(), compute_s=0.0)
    assert worker.epochs[-1] == 5


def test_a_worker_rests_once_after_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_server, "REST_S", 0.02)
    worker = Worker()
    server = StepServer(worker, "127.0.0.1")
    try:
        with engine(server.endpoint) as connection:
            assert ask(connection, CommitEpoch(epoch=Epoch(1))) == Done()
            time.sleep(0.1)
            assert worker.rests == 0
            for rests in (1, 2):
                assert isinstance(ask(connection, PLAN), StepResult)
                until = time.monotonic() + 10
                while worker.rests < rests and time.monotonic() < until:
                    time.sleep(0.01)
                time.sleep(0.1)
                assert worker.rests == rests
    finally:
        server.close()


def test_slow_strangers_keep_no_client_out(server: StepServer) -> None:
    with contextlib.ExitStack() as stack:
        strangers = [stack.enter_context(stranger(server.endpoint)) for _ in range(300)]
        for connection in strangers:
            with contextlib.suppress(OSError):  # it had to make room
                connection.sendall(b"x")
        with engine(server.endpoint) as connection:
            assert ask(connection, CommitEpoch(epoch=Epoch(6))) == Done()
            # they go on, and so do the steps
            for other in strangers:
                with contextlib.suppress(OSError):
                    other.sendall(b"x")
            assert isinstance(ask(connection, PLAN), StepResult)
        assert len(server._door._handshakes) <= handshakes.MOST


def test_slow_handshakes_have_a_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    server = StepServer(Worker(), "127.0.0.1")
    monkeypatch.setattr(server._door._handshakes, "_token_s", 0.2)
    try:
        with stranger(server.endpoint) as connection:
            connection.settimeout(0.05)
            for _ in range(100):
                try:
                    # a byte comes within any time limit of a single read
                    connection.sendall(b"x")
                    if connection.recv(1) == b"":
                        return
                except TimeoutError:
                    continue
                except OSError:
                    return
            pytest.fail("it was never ended")
    finally:
        server.close()


def test_a_new_engine_takes_the_place_of_one_that_hangs(server: StepServer, worker: Worker) -> None:
    with engine(server.endpoint) as old:
        assert ask(old, ForgetSequences()) == Done()
        with engine(server.endpoint) as new:
            assert ask(new, CommitEpoch(epoch=Epoch(8))) == Done()
            assert ends(old)


def test_a_step_that_runs_ends_before_a_new_engine_is_obeyed(server: StepServer, worker: Worker) -> None:
    worker.go.clear()
    worker.stepping.clear()
    forgot = worker.forgot
    try:
        with engine(server.endpoint) as old:
            old.sendall(encode(PLAN))
            assert worker.stepping.wait(10)
            with engine(server.endpoint) as new:
                new.sendall(encode(ForgetSequences()))
                assert ends(old)
                assert worker.forgot == forgot
                worker.go.set()
                assert receive(new) == Done()
    finally:
        worker.go.set()
    assert worker.forgot == forgot + 1


def test_no_file_descriptor_is_left(server: StepServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(door, "_PAUSE_S", 0.01)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with engine(server.endpoint) as served, stranger(server.endpoint) as waits:
        assert ask(served, ForgetSequences()) == Done()
        while not server._door._handshakes:
            time.sleep(0.001)
        with socket.socket() as late:
            try:
                resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
                late.connect((server.endpoint.address, server.endpoint.port))
                # it makes room, and what runs goes on
                assert ends(waits)
                assert ask(served, ForgetSequences()) == Done()
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            late.sendall(server.endpoint.token.encode())
            assert ask(late, CommitEpoch(epoch=Epoch(9))) == Done()


_HEADS = st.builds(struct.Struct("<IB").pack, st.integers(0, 2**32 - 1), st.integers(0, 255))
_NESTED = st.builds(
    lambda kind, depth: _frame(kind, b"\x81\xa1x" + b"\x91" * depth), st.integers(0, 12), st.just(100_000)
)
_FRAMES = st.builds(lambda kind, body: _frame(kind, body), st.integers(0, 12), st.binary(max_size=60))
_CUT = st.builds(
    lambda message, size: encode(message)[:size], st.sampled_from([PLAN, Hello(client_id="x")]), st.integers(1, 12)
)
GARBAGE = st.one_of(st.binary(min_size=1, max_size=60), _HEADS, _NESTED, _FRAMES, _CUT)


def _frame(kind: int, body: bytes) -> bytes:
    return struct.pack("<IB", len(body), kind) + body


@settings(max_examples=150, deadline=None)
@given(garbage=GARBAGE)
def test_garbage_ends_its_connection_and_no_other(server: StepServer, garbage: bytes) -> None:
    with engine(server.endpoint) as bad:
        bad.sendall(garbage)
        with contextlib.suppress(OSError):  # it may have been ended
            bad.shutdown(socket.SHUT_WR)
            # what happens to be a message is answered
            while isinstance(message := receive(bad), Message):
                assert isinstance(message, Done | Failed)
    with engine(server.endpoint) as good:
        assert ask(good, ForgetSequences()) == Done()


def test_an_announced_length_takes_no_memory(server: StepServer) -> None:
    tracemalloc.start()
    try:
        with engine(server.endpoint) as liar:
            liar.sendall(struct.pack("<IB", MAX_BYTES, 0) + b"x")
            # it has read all of that once it hangs up
            liar.shutdown(socket.SHUT_WR)
            assert ends(liar)
        assert tracemalloc.get_traced_memory()[1] < MAX_BYTES // 16
    finally:
        tracemalloc.stop()


def test_a_message_that_no_engine_sends(server: StepServer) -> None:
    with engine(server.endpoint) as connection:
        connection.sendall(encode(Hello(client_id="x")))
        assert ends(connection)


def test_it_listens_at_the_given_address(server: StepServer) -> None:
    assert server._door._listener.getsockname()[0] == "127.0.0.1"


def test_a_closed_server_accepts_no_connection() -> None:
    server = StepServer(Worker(), "127.0.0.1")
    with engine(server.endpoint) as connection:
        assert ask(connection, ForgetSequences()) == Done()
        server.close()
        assert ends(connection)
