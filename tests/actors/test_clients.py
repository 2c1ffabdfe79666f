"""What the engine counts of requests on their way to the first token."""

from __future__ import annotations

import asyncio

from actors.clients import Clients
from actors.links import connect
from cluster.protocol import (
    AbortRequests,
    FinishReason,
    GenerateRequest,
    Hello,
    RequestId,
    SamplingParams,
    Submit,
    TokenOutput,
)


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
