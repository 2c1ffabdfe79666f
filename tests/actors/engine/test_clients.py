"""What the engine counts of requests on their way to the first token, and which messages it takes."""

from __future__ import annotations

import asyncio

import pytest

from elastic_moe.actors.engine.clients import Clients
from elastic_moe.actors.remote.codec import Message
from elastic_moe.actors.remote.links import Link, connect
from elastic_moe.cluster.messages.requests import (
    AbortRequests,
    FinishReason,
    GenerateRequest,
    Hello,
    Outputs,
    RequestId,
    SamplingParams,
    Submit,
    TokenOutput,
)
from elastic_moe.cluster.messages.steps import Done, ForgetSequences


class Accepting:
    def add(self, request: GenerateRequest) -> TokenOutput | None:
        return None

    def abort(self, request_id: RequestId) -> bool:
        return True


def request(name: str) -> GenerateRequest:
    return GenerateRequest(request_id=RequestId(name), prompt_token_ids=(1,), params=SamplingParams(max_tokens=2))


def output(name: str, offset: int, reason: FinishReason | None = None) -> TokenOutput:
    return TokenOutput(request_id=RequestId(name), offset=offset, token_ids=(7,), finish_reason=reason)


def test_first_tokens_are_counted_once_and_never_of_aborted_requests() -> None:
    async def work() -> None:
        clients = Clients(Accepting(), submitted=lambda: None)
        link = await connect(await clients.listen("127.0.0.1"), lambda *_: None, lambda _: None)
        await link.call(Hello(client_id="api"))
        await link.call(Submit(requests=(request("a"), request("b"), request("c"))))
        link.send(AbortRequests(request_ids=(RequestId("c"),)))
        await link.call(Submit(requests=()))
        await asyncio.sleep(0.02)
        clients.deliver([output("a", 0), output("c", 0)])
        assert clients.first_tokens == 1
        assert clients.first_tokens_s >= 0.02
        clients.deliver([output("a", 1, FinishReason.LENGTH), output("b", 0)])
        assert clients.first_tokens == 2
        link.close()
        clients.close()

    asyncio.run(work())


def test_the_first_token_tells_how_long_the_request_waited_for_its_first_step() -> None:
    async def work() -> list[TokenOutput]:
        told: list[TokenOutput] = []
        clients = Clients(Accepting(), submitted=lambda: None)

        def received(_: Link, message: Message) -> None:
            assert isinstance(message, Outputs)
            told.extend(message.outputs)

        link = await connect(await clients.listen("127.0.0.1"), received, lambda _: None)
        await link.call(Hello(client_id="api"))
        await link.call(Submit(requests=(request("a"), request("b"))))
        await asyncio.sleep(0.02)
        clients.began([RequestId("a"), RequestId("unknown")])
        await asyncio.sleep(0.02)
        # a request that has lost its worker is in a first step once more
        clients.began([RequestId("a")])
        clients.deliver([output("a", 0), output("b", 0)])
        clients.deliver([output("a", 1)])
        await link.call(Submit(requests=()))
        link.close()
        clients.close()
        return told

    first, other, second = asyncio.run(work())
    assert first.queued_s is not None
    assert first.queued_s >= 0.015
    assert (other.queued_s, second.queued_s) == (None, None)


@pytest.mark.parametrize(
    "messages",
    [
        (Submit(requests=()),),
        (Hello(client_id="api"), Hello(client_id="other")),
        (Hello(client_id="api"), ForgetSequences()),
    ],
    ids=["no hello", "two names", "a message for workers"],
)
def test_a_replica_that_sends_an_unexpected_message_is_disconnected(messages: tuple[Message, ...]) -> None:
    async def work() -> None:
        clients = Clients(Accepting(), submitted=lambda: None)
        ended = asyncio.Event()
        endpoint = await clients.listen("127.0.0.1")
        link = await connect(endpoint, lambda *_: None, lambda _: ended.set())
        for message in messages:
            link.send(message)
        await asyncio.wait_for(ended.wait(), 10)
        # and on nobody else
        other = await connect(endpoint, lambda *_: None, lambda _: None)
        assert await other.call(Hello(client_id="another")) == Done()
        assert list(clients._names.values()) == ["another"]
        other.close()
        clients.close()

    asyncio.run(work())
