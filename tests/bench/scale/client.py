"""A process that submits requests to the engine as an API replica does, and reads what comes."""

from __future__ import annotations

import asyncio
import multiprocessing
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess

from elastic_moe.actors.remote.codec import Message
from elastic_moe.actors.remote.links import Link, connect
from elastic_moe.cluster.messages.requests import (
    Endpoint,
    GenerateRequest,
    Hello,
    Outputs,
    RequestId,
    SamplingParams,
    Submit,
)

AT_ONCE = 256
PROMPT = 64
MAX_TOKENS = 100_000
"""So many that no sequence ends while it is measured."""


class Reader:
    """Counts the tokens that come."""

    def __init__(self) -> None:
        self.tokens = 0

    def received(self, link: Link, message: Message) -> None:
        assert isinstance(message, Outputs), message
        self.tokens += len(message.tokens) + sum(len(output.token_ids) for output in message.outputs)
        assert all(output.error is None for output in message.outputs)


def request(number: int) -> GenerateRequest:
    """Prompts differ from their first token on."""
    return GenerateRequest(
        request_id=RequestId(f"cmpl-{number:032x}-0"),
        prompt_token_ids=tuple((number * 7919 + place) % 30_000 for place in range(PROMPT)),
        params=SamplingParams(max_tokens=MAX_TOKENS, temperature=0, ignore_eos=True),
        client=f"client {number % 100}",
    )


async def _submit(endpoint: Endpoint, sequences: int, pipe: Connection) -> None:
    reader = Reader()
    link = await connect(endpoint, reader.received, lambda link: None)
    await link.call(Hello(client_id="bench"))
    for begin in range(0, sequences, AT_ONCE):
        numbers = range(begin, min(sequences, begin + AT_ONCE))
        await link.call(
            Submit(requests=tuple(request(number) for number in numbers), numbers=tuple(n + 1 for n in numbers))
        )
    await asyncio.to_thread(pipe.recv)
    pipe.send(reader.tokens)
    link.close()


def _run(endpoint: Endpoint, sequences: int, pipe: Connection) -> None:
    asyncio.run(_submit(endpoint, sequences, pipe))


def start_client(endpoint: Endpoint, sequences: int) -> tuple[BaseProcess, Connection]:
    """Submit in a process of its own. What is sent into the pipe ends it; it answers the number of tokens."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_run, args=(endpoint, sequences, theirs), daemon=True)
    process.start()
    return process, ours
