"""The `openai` client, unchanged, against a real HTTP server in this process; and clients that hang up."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import httpx
import openai
import pytest

from tests.deploy.fakes import FakeBackend
from tests.deploy.listening import Server

LETTERS = "`abcdefghijklmnopqrstuvwxy"


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny-moe"]
    assert client.models.retrieve("tiny-moe").object == "model"


def test_completions(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="tiny-moe", prompt="hello", max_tokens=26, logprobs=1)
    assert answer.choices[0].text == LETTERS
    assert answer.choices[0].logprobs is not None
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 26


def test_streamed_completions(client: openai.OpenAI) -> None:
    options = {"include_usage": True}
    with client.completions.create(
        model="tiny-moe", prompt="hello", max_tokens=40, stream=True, stream_options=options
    ) as stream:
        chunks = list(stream)
    assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == LETTERS
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 27


def test_chat(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="tiny-moe",
        messages=[{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}],
        max_completion_tokens=3,
        n=2,
        logprobs=True,
        top_logprobs=2,
        extra_body={"top_k": 5, "ignore_eos": False},
    )
    assert [choice.message.content for choice in answer.choices] == ["`ab"] * 2
    assert answer.choices[0].finish_reason == "length"


def test_streamed_chat(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(
        model="tiny-moe", messages=[{"role": "user", "content": "hi"}], max_tokens=40
    ) as stream:
        text = "".join(event.delta for event in stream if event.type == "content.delta")
    assert text == LETTERS


def test_errors_are_the_clients_own(server: Server, client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.completions.create(model="gpt-9", prompt="a")
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as bad:
        client.completions.create(model="tiny-moe", prompt="a", max_tokens=-1)
    assert bad.value.param == "max_tokens"
    with (
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong", max_retries=0) as stranger,
        pytest.raises(openai.AuthenticationError),
    ):
        stranger.models.list()


def test_tokens_arrive_as_they_come(model_dir: Path) -> None:
    with Server(FakeBackend(delay_s=0.05), model_dir) as slow:
        body = {"prompt": "hello", "max_tokens": 8, "stream": True}
        arrivals = []
        with httpx.stream("POST", f"{slow.url}/v1/completions", json=body, headers=KEY) as response:
            arrivals = [time.monotonic() for line in response.iter_lines() if line.startswith("data: {")]
    gaps = [later - earlier for earlier, later in pairwise(arrivals)]
    assert len(gaps) == 7
    # on a busy machine some come together; what is held back comes all at once
    assert sum(gap > 0.02 for gap in gaps) >= 3


KEY = {"authorization": "Bearer key"}


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_hangs_up_ends_the_work(model_dir: Path, stream: bool) -> None:
    # the second token would come in ten minutes: the hang-up itself must be noticed
    delays = iter([0.0])
    backend = FakeBackend(script=lambda request: list(range(65, 91)))

    async def generate(request: object) -> object:
        async for output in FakeBackend.generate(backend, request):  # type: ignore[arg-type]
            await asyncio.sleep(next(delays, 600))
            yield output

    backend.generate = generate  # type: ignore[assignment, method-assign]
    with Server(backend, model_dir) as server:
        body = {"prompt": "hello", "max_tokens": 20, "stream": stream, "n": 2}
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{server.url}/v1/completions", json=body, headers=KEY, timeout=0.5)
        wait_for(lambda: len(backend.aborted) == 2)
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="key") as client:
            assert client.models.list().data


def test_a_large_body_is_refused_and_the_server_goes_on(server: Server, client: openai.OpenAI) -> None:
    with pytest.raises(openai.APIStatusError) as refused:
        client.completions.create(model="tiny-moe", prompt="a" * 10_000_000)
    assert refused.value.status_code == 413
    assert client.completions.create(model="tiny-moe", prompt="a", max_tokens=1).choices[0].text == "`"
