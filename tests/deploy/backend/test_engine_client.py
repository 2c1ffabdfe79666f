"""What the engine's messages do to the requests of an API replica. No connection: the link is a stand-in."""

from __future__ import annotations

import asyncio

import pytest

from elastic_moe.actors.remote.background import Background
from elastic_moe.actors.remote.codec import Message
from elastic_moe.cluster.messages.columns import column_of
from elastic_moe.cluster.messages.requests import (
    GenerateRequest,
    Outputs,
    RequestId,
    SamplingParams,
    TokenOutput,
    Tokens,
)
from elastic_moe.deploy.backend import engine_client
from elastic_moe.deploy.backend.engine_client import EngineClient
from elastic_moe.deploy.backend.request_stream import RequestStream


class Link:
    def __init__(self) -> None:
        self.sent: list[Message] = []
        self.closed = False

    def send(self, message: Message) -> None:
        self.sent.append(message)

    def close(self) -> None:
        self.closed = True


async def no_engine() -> None:
    return None


def client_of(link: Link, count: int) -> tuple[EngineClient, list[RequestStream]]:
    client = EngineClient(no_engine, Background(lambda error: None))
    params = SamplingParams(max_tokens=9)
    streams = [
        RequestStream(GenerateRequest(request_id=RequestId(f"r{n}"), prompt_token_ids=(1,), params=params))
        for n in range(count)
    ]
    for stream in streams:
        client.take(stream)
        stream.link = link  # type: ignore[assignment]
    return client, streams


def message(streams: list[RequestStream], offset: int, *, ended: RequestStream | None = None) -> Outputs:
    """A token for each of these, and an output of another."""
    numbers = column_of([stream.number for stream in streams])
    columns = column_of([offset] * len(streams)), column_of([10 + offset] * len(streams))
    tokens = Tokens(numbers=numbers, offsets=columns[0], token_ids=columns[1])
    if ended is None:
        return Outputs(outputs=(), tokens=tokens)
    last = TokenOutput(request_id=ended.request.request_id, offset=len(ended.received), token_ids=(99,))
    return Outputs(outputs=(last,), tokens=tokens)


def test_tokens_of_many_requests_take_turns_and_stay_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_client, "AT_ONCE", 4)

    async def scenario() -> None:
        link = Link()
        client, (*streams, other) = client_of(link, 11)
        client._received(link, message(streams, 0, ended=other))  # type: ignore[arg-type]
        assert [len(stream.received) for stream in streams] == [1] * 4 + [0] * 6
        # the next step's come before this one's are all taken
        client._received(link, message(streams, 1))  # type: ignore[arg-type]
        assert [len(stream.received) for stream in streams] == [1] * 4 + [0] * 6
        turns = 0
        while any(len(stream.received) < 2 for stream in streams):
            before = sum(len(stream.received) for stream in streams)
            await asyncio.sleep(0)
            assert sum(len(stream.received) for stream in streams) - before <= 4
            turns += 1
        assert turns >= 5
        assert [stream.received for stream in streams] == [[10, 11]] * 10
        assert other.received == [99]
        assert not link.sent
        assert not link.closed

    asyncio.run(scenario())


def test_a_damaged_message_ends_its_connection_and_holds_up_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_client, "AT_ONCE", 2)

    async def scenario() -> None:
        link, next_link = Link(), Link()
        client, streams = client_of(link, 5)
        whole = message(streams, 0).tokens
        cut = Tokens(numbers=whole.numbers, offsets=whole.offsets[:-4], token_ids=whole.token_ids)
        client._received(link, Outputs(outputs=(), tokens=cut))  # type: ignore[arg-type]
        for stream in streams:
            stream.link = next_link  # type: ignore[assignment]
        client._received(next_link, message(streams, 0))  # type: ignore[arg-type]
        async with asyncio.timeout(10):
            while any(not stream.received for stream in streams):
                await asyncio.sleep(0)
        assert link.closed
        assert not next_link.closed
        assert [stream.received for stream in streams] == [[10]] * 5

    asyncio.run(scenario())


def test_what_fails_with_one_message_holds_up_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        link = Link()
        client, (stream, other) = client_of(link, 2)

        def fail(offset: int, token_id: int) -> bool:
            raise RuntimeError("a defect")

        monkeypatch.setattr(stream, "take_token", fail)
        with pytest.raises(RuntimeError, match="a defect"):
            client._received(link, message([stream], 0))  # type: ignore[arg-type]
        client._received(link, message([other], 0))  # type: ignore[arg-type]
        assert other.received == [10]

    asyncio.run(scenario())
