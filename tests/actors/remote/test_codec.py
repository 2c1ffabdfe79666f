"""Messages on sockets: they arrive whole, strangers are not let in, and damage ends the connection."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections.abc import Awaitable, Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic_moe.actors.remote import codec
from elastic_moe.actors.remote.codec import Frames, Message, WireError, encode, new_token, receive
from elastic_moe.actors.remote.handshakes import MOST
from elastic_moe.actors.remote.links import Link, connect, listen
from elastic_moe.cluster.errors import RequestError, StepAborted, WorkerError
from elastic_moe.cluster.messages.epochs import Epoch
from elastic_moe.cluster.messages.requests import (
    AbortRequests,
    Endpoint,
    FinishReason,
    GenerateRequest,
    Hello,
    Outputs,
    Refused,
    RequestId,
    SamplingParams,
    Submit,
    TokenLogprobs,
    TokenOutput,
)
from elastic_moe.cluster.messages.steps import (
    Chunk,
    CommitEpoch,
    Done,
    Failed,
    ForgetSequences,
    NewSequence,
    Sample,
    SavedState,
    StateUse,
    StepPlan,
    StepResult,
)

R = RequestId("r")
PARAMS = SamplingParams(max_tokens=3, temperature=0.5, logit_bias=((4, -1.5),), stop_token_ids=(7,), logprobs=2)
SCORES = TokenLogprobs(token_id=4, logprob=-9999.0, top=((1, -0.25), (2, -3.0)))
STATE = StateUse(keep_from=1, restore=3, save=(SavedState(position=2, place=0),))
MESSAGES: list[Message] = [
    StepPlan(
        epoch=Epoch(3),
        step=9,
        tokens_per_rank=(1, 0),
        new=(NewSequence(request_id=R, token_ids=(1, 2), num_prompt_tokens=1, params=PARAMS, eos_token_ids=(0,)),),
        chunks=(Chunk(request_id=R, start=1, length=1, known=2, block_offset=0, block_ids=(5, 6), state=STATE),),
        finished=(RequestId("ä"),),
    ),
    StepResult(step=9, samples=(Sample(request_id=R, token_id=4, logprobs=SCORES),), compute_s=0.1),
    StepResult(step=9, samples=(), compute_s=0.1, corrupted=(R, RequestId("ä"))),
    CommitEpoch(epoch=Epoch(4)),
    ForgetSequences(),
    Done(),
    Failed(reason="no", aborted=True),
    Hello(client_id="c"),
    Submit(requests=(GenerateRequest(request_id=R, prompt_token_ids=(1,) * 70_000, params=PARAMS),)),
    AbortRequests(request_ids=(R, R)),
    Refused(message="too long", param="prompt", code=None, status=400),
    Outputs(
        outputs=(
            TokenOutput(request_id=R, offset=1, token_ids=(4,), logprobs=(SCORES,)),
            TokenOutput(request_id=R, offset=2, token_ids=(), finish_reason=FinishReason.STOP, stop_token_id=7),
        )
    ),
]


@pytest.mark.parametrize("piece", [1, 7, 1 << 20])
def test_messages_survive_encoding(piece: int) -> None:
    data = b"".join(encode(message) for message in MESSAGES)
    frames = Frames()
    came = [message for at in range(0, len(data), piece) for message in frames.feed(data[at : at + piece])]
    assert came == MESSAGES
    assert [type(output.finish_reason) for output in came[-1].outputs] == [type(None), FinishReason]  # type: ignore[union-attr]


def test_a_view_that_lives_on_ends_no_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a frame of this thread that the loop watch has in hand."""
    held: list[object] = []
    decode = codec._decode

    def decode_and_hold(kind: int, body: bytearray | memoryview) -> Message:
        held.append(body)
        return decode(kind, body)

    monkeypatch.setattr(codec, "_decode", decode_and_hold)
    message = CommitEpoch(epoch=Epoch(3))
    data, frames = encode(message) * 3, Frames()
    found = [one for place in range(0, len(data), 7) for one in frames.feed(data[place : place + 7])]
    assert found == [message] * 3
    assert len(held) == 3


def test_blocking_end() -> None:
    ours, theirs = socket.socketpair()
    with theirs:
        with ours:
            for message in MESSAGES[:-4]:
                ours.sendall(encode(message))
                assert receive(theirs) == message
            ours.sendall(encode(Done())[:-1])
        assert receive(theirs) is None


@pytest.mark.parametrize(
    "data",
    [
        struct.pack("<IB", 1, 200) + b"\x80",
        struct.pack("<IB", 0xFFFFFFFF, 0),
        struct.pack("<IB", 2, 0) + b"\xc1\xc1",
        struct.pack("<IB", 1, 2) + b"\x80",
        struct.pack("<IB", 100_003, 3) + b"\x81\xa1x" + b"\x91" * 100_000,
        struct.pack("<IB", 15, 6) + b"\x81\xa9client_id\xa3\xff\xfe\xfd",
        struct.pack("<IB", 18, 8) + b"\x81\xabrequest_ids\xdd\xff\xff\xff\xff",
    ],
    ids=["kind", "length", "msgpack", "missing field", "nesting", "UTF-8", "number of items"],
)
def test_damage(data: bytes) -> None:
    with pytest.raises(WireError):
        Frames().feed(data)


@settings(deadline=None)
@given(
    message=st.sampled_from(MESSAGES),
    changes=st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), max_size=4),
    cut=st.integers(0, 400),
    more=st.binary(max_size=20),
)
def test_any_bytes_are_a_message_or_damage(
    message: Message, changes: list[tuple[int, int]], cut: int, more: bytes
) -> None:
    data = bytearray(encode(message)[: 400 - cut] + more)
    for at, byte in changes:
        if at < len(data):
            data[at] = byte
    with contextlib.suppress(WireError):
        assert all(isinstance(came, Message) for came in Frames().feed(bytes(data)))


class Side:
    """What one end of a connection has seen."""

    def __init__(self, answer: Callable[[Message], Message] | None = None) -> None:
        self.messages: list[Message] = []
        self.links: list[Link] = []
        self.lost = asyncio.Event()
        self.opened = self.ends = 0
        self._answer = answer

    async def connect(self, endpoint: Endpoint) -> Link:
        self.opened += 1
        link = await connect(endpoint, self.received, self.ended)
        self.links.append(link)
        return link

    def received(self, link: Link, message: Message) -> None:
        self.messages.append(message)
        self.links.append(link)
        if self._answer is not None:
            link.send(self._answer(message))

    def ended(self, link: Link) -> None:
        self.ends += 1
        self.lost.set()


def run(
    scenario: Callable[[Side, Side, Endpoint], Awaitable[None]], answer: Callable[[Message], Message] | None
) -> None:
    async def work() -> None:
        server_side, client_side = Side(answer), Side()
        server, endpoint = await listen("127.0.0.1", new_token(), server_side.received, server_side.ended)
        async with asyncio.timeout(10):
            await scenario(server_side, client_side, endpoint)
            for link in client_side.links:
                link.close()
            while min(server_side.ends, client_side.ends) < client_side.opened:
                await asyncio.sleep(0.001)
        server.close()

    asyncio.run(work())


def test_answers_come_in_order() -> None:
    async def scenario(server: Side, client: Side, endpoint: Endpoint) -> None:
        link = await client.connect(endpoint)
        asked = [link.call(CommitEpoch(epoch=Epoch(n))) for n in range(5)]
        given_up = asked.pop(1)
        given_up.cancel()
        assert [answer.step for answer in await asyncio.gather(*asked)] == [0, 2, 3, 4]
        server.links[0].send(Outputs(outputs=()))
        while not client.messages:
            await asyncio.sleep(0.001)
        link.close()
        await server.lost.wait()
        with pytest.raises(ConnectionError):
            await link.call(ForgetSequences())

    def answer(message: Message) -> Message:
        assert isinstance(message, CommitEpoch)
        return StepResult(step=message.epoch, samples=(), compute_s=0.0)

    run(scenario, answer)


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (Failed(reason="gone", aborted=True), StepAborted),
        (Failed(reason="broken", aborted=False), WorkerError),
        (Refused(message="long", param="prompt", code="c", status=409), RequestError),
    ],
)
def test_failures_are_raised_at_the_caller(answer: Message, error: type[Exception]) -> None:
    async def scenario(server: Side, client: Side, endpoint: Endpoint) -> None:
        link = await client.connect(endpoint)
        with pytest.raises(error) as raised:
            await link.call(ForgetSequences())
        if isinstance(raised.value, RequestError):
            assert (raised.value.param, raised.value.code, raised.value.status) == ("prompt", "c", 409)

    run(scenario, lambda _: answer)


def test_pending_calls_fail_when_the_connection_ends() -> None:
    async def scenario(server: Side, client: Side, endpoint: Endpoint) -> None:
        link = await client.connect(endpoint)
        pending = link.call(ForgetSequences())
        while not server.messages:
            await asyncio.sleep(0.001)
        server.links[0].close()
        with pytest.raises(ConnectionError):
            await pending
        assert client.lost.is_set()

    run(scenario, None)


@pytest.mark.parametrize("token", ["", "0" * 32])
def test_connections_without_the_token_are_refused(token: str) -> None:
    async def scenario(server: Side, client: Side, endpoint: Endpoint) -> None:
        stranger = Endpoint(address=endpoint.address, port=endpoint.port, token=token)
        link = await client.connect(stranger)
        with pytest.raises(ConnectionError):
            await link.call(Hello(client_id="x" * 40))
        assert not server.messages

    run(scenario, lambda _: Done())


def test_slow_strangers_keep_no_client_out() -> None:
    async def scenario(server: Side, client: Side, endpoint: Endpoint) -> None:
        strangers = []
        try:
            for _ in range(MOST + 50):
                strangers.append(await asyncio.open_connection(endpoint.address, endpoint.port))
                strangers[-1][1].write(b"x")
            link = await client.connect(endpoint)
            assert await link.call(Hello(client_id="c")) == Done()
            while server.ends < 50:
                await asyncio.sleep(0.001)
            # the oldest had to go, and no more than that
            assert await strangers[0][0].read() == b""
            assert server.ends <= 51
        finally:
            for _, writer in strangers:
                writer.close()
        client.opened += len(strangers)
        client.ends += len(strangers)

    run(scenario, lambda _: Done())


def test_damage_ends_the_connection() -> None:
    async def scenario(server: Side, client: Side, endpoint: Endpoint) -> None:
        link = await client.connect(endpoint)
        assert link._transport is not None
        link._transport.write(b"\xff" * 9)
        await client.lost.wait()
        assert not server.messages

    run(scenario, lambda _: Done())
