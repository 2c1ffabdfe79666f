"""`echo` with `logprobs`, `prompt_logprobs` and `max_tokens: 0` over the fake backend, whose token at place n has the
log probability -n."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from elastic_moe.deploy.generation import prompt_logprobs
from tests.deploy.conftest import client_of
from tests.deploy.fakes import FakeBackend, make_sentencepiece_tokenizer

Call = Callable[..., httpx.Response]
URL = "/v1/completions"
IDS = [70, 71, 72, 73]


def choice(call: Call, **body: Any) -> dict[str, Any]:
    response = call("POST", URL, json={"prompt": IDS, **body}, backend=FakeBackend(chunk=2))
    assert response.status_code == 200, response.text
    return dict(response.json()["choices"][0])


def test_echo_with_logprobs(call: Call) -> None:
    found = choice(call, echo=True, logprobs=1, max_tokens=2)
    assert found["text"] == "efgh" + "`a"
    assert found["logprobs"] == {
        "tokens": ["e", "f", "g", "h", "`", "a"],
        "token_logprobs": [None, -1.0, -2.0, -3.0, -0.5, -0.5],
        "top_logprobs": [None, {"f": -1.0}, {"g": -2.0}, {"h": -3.0}, {"`": -0.5}, {"a": -0.5}],
        "text_offset": [0, 1, 2, 3, 4, 5],
    }
    assert "prompt_logprobs" not in found


def test_a_prompt_alone(call: Call) -> None:
    """As evaluations ask for it: nothing is made, and nothing but the prompt is charged."""
    response = call("POST", URL, json={"prompt": IDS, "echo": True, "logprobs": 0, "max_tokens": 0}).json()
    (found,) = response["choices"]
    assert (found["text"], found["finish_reason"]) == ("efgh", "length")
    assert found["logprobs"]["token_logprobs"] == [None, -1.0, -2.0, -3.0]
    assert response["usage"]["completion_tokens"] == 0
    assert choice(call, max_tokens=0)["text"] == ""


def test_prompt_logprobs_of_completions(call: Call) -> None:
    found = choice(call, prompt_logprobs=2, max_tokens=0)
    assert found["logprobs"] is None
    first, second, *_ = found["prompt_logprobs"]
    assert first is None
    assert second == {
        "71": {"logprob": -1.0, "rank": 2, "decoded_token": "f"},
        "72": {"logprob": -1.5, "rank": 2, "decoded_token": "g"},
    }
    assert choice(call, prompt=[70], prompt_logprobs=0, max_tokens=0)["prompt_logprobs"] == [None]


def test_each_asks_for_its_own_number(call: Call) -> None:
    found = choice(call, echo=True, logprobs=1, prompt_logprobs=3, max_tokens=1)
    assert [len(entries) for entries in found["logprobs"]["top_logprobs"][1:4]] == [1, 1, 1]
    assert [len(entries) for entries in found["prompt_logprobs"][1:]] == [3, 3, 3]


def test_prompt_logprobs_of_chat(call: Call) -> None:
    body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 1, "prompt_logprobs": 0}
    found = call("POST", "/v1/chat/completions", json=body).json()
    assert len(found["prompt_logprobs"]) == found["usage"]["prompt_tokens"]
    assert found["prompt_logprobs"][0] is None


def test_a_stream_begins_with_the_scored_echo(call: Call) -> None:
    body = {"prompt": [IDS, [80, 81]], "echo": True, "logprobs": 1, "max_tokens": 2, "n": 2}
    plain = call("POST", URL, json=body, backend=FakeBackend(chunk=2)).json()["choices"]
    streamed = call("POST", URL, json={**body, "stream": True}, backend=FakeBackend(chunk=1)).text
    events = [json.loads(line[6:]) for line in streamed.split("\n\n") if line and not line.endswith("[DONE]")]
    for index, whole in enumerate(plain):
        parts = [c for event in events for c in event["choices"] if c["index"] == index]
        assert "".join(part["text"] for part in parts) == whole["text"]
        for key, values in whole["logprobs"].items():
            assert [value for part in parts for value in part["logprobs"][key]] == values


@pytest.mark.parametrize("prompt", ["the quick self", [1, 300, 320]])
def test_offsets_are_places_in_the_echo(tmp_path: Path, prompt: str | list[int]) -> None:
    """Also where the tokenizer puts a token in front of a text, as SentencePiece's do."""
    make_sentencepiece_tokenizer(tmp_path)

    async def work() -> dict[str, Any]:
        async with client_of(FakeBackend(vocab_size=600), tmp_path) as client:
            body = {"prompt": prompt, "echo": True, "logprobs": 0, "max_tokens": 0}
            return dict((await client.post(URL, json=body)).json()["choices"][0])

    found = asyncio.run(work())
    text, offsets = found["text"], found["logprobs"]["text_offset"]
    assert offsets == sorted(offsets)
    assert offsets[0] == 0
    for name, begin, end in zip(found["logprobs"]["tokens"], offsets, [*offsets[1:], len(text)], strict=True):
        assert name.strip() == text[begin:end].strip() or begin == end


def test_a_truncated_prompt_echoes_what_was_scored(call: Call) -> None:
    found = choice(call, prompt="the quick brown fox", truncate_prompt_tokens=2, echo=True, logprobs=0, max_tokens=0)
    assert len(found["logprobs"]["tokens"]) == 2
    assert "".join(found["logprobs"]["tokens"]) == found["text"]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"prompt_logprobs": 21}, "prompt_logprobs"),
        ({"prompt_logprobs": -1}, "prompt_logprobs"),
        ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
        ({"logprob_token_ids": [1]}, "logprob_token_ids"),
        ({"logprob_token_ids": [999], "logprobs": 1}, "logprob_token_ids"),
        ({"max_tokens": -1}, "max_tokens"),
    ],
)
def test_faults_are_told_by_field(call: Call, body: dict[str, Any], param: str) -> None:
    response = call("POST", URL, json={"prompt": IDS, **body})
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)


def test_a_response_has_a_bound(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompt_logprobs, "MAX_SCORES", 11)
    assert choice(call, prompt_logprobs=1, max_tokens=0)["prompt_logprobs"]
    response = call("POST", URL, json={"prompt": IDS, "echo": True, "logprobs": 2, "max_tokens": 0})
    assert (response.status_code, response.json()["error"]["param"]) == (400, "logprobs")
    assert call("POST", URL, json={"prompt": IDS, "n": 2, "prompt_logprobs": 1}).status_code == 400


def test_named_tokens_take_the_place_of_the_likely_ones(call: Call) -> None:
    backend = FakeBackend()
    body = {"prompt": IDS, "logprobs": 1, "logprob_token_ids": [5, 9, 5], "max_tokens": 1}
    assert call("POST", URL, json=body, backend=backend).status_code == 200
    assert backend.requests[0].params.logprob_token_ids == (5, 9)


def test_the_text_of_a_chats_prompt(call: Call) -> None:
    body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 1, "return_prompt_text": True}
    assert call("POST", "/v1/chat/completions", json=body).json()["prompt_text"] == (
        "<|im|>user\nhi\n<|im|>assistant\n"
    )
