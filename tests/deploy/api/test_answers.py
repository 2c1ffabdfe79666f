"""Completions and chats over a fake backend, plain and streamed, with vLLM's further fields."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import httpx
import pytest

from elastic_moe.cluster.messages.requests import TokenLogprobs
from elastic_moe.deploy.api.completions import CompletionShape
from elastic_moe.deploy.generation.answer import Delta, ScoredToken
from elastic_moe.deploy.text.tokenizer import Tokenizer
from tests.deploy.api.asking import CHAT, COMPLETION, Call, error, events
from tests.deploy.conftest import client_of
from tests.deploy.fakes import FakeBackend, make_sentencepiece_tokenizer, make_tokenizer

# --- Completions ------------------------------------------------------------------------------------------------


def test_a_completion(call: Call) -> None:
    body = call("POST", "/v1/completions", json={**COMPLETION, "model": "tiny-moe"}).json()
    assert body["object"] == "text_completion"
    assert body["id"].startswith("cmpl-")
    assert body["choices"] == [
        {"index": 0, "text": "`ab", "logprobs": None, "finish_reason": "length", "stop_reason": None}
    ]
    assert body["usage"] == {
        "prompt_tokens": 1,
        "completion_tokens": 3,
        "total_tokens": 4,
        "prompt_tokens_details": {"cached_tokens": 0},
    }


def test_several_prompts_and_choices(call: Call) -> None:
    backend = FakeBackend(script=lambda request: [request.prompt_token_ids[0], 66 + request.params.seed % 7])
    json = {"prompt": [[70], [71, 72]], "n": 2, "seed": 5, "echo": True}
    body = call("POST", "/v1/completions", json=json, backend=backend).json()
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2, 3]
    assert [choice["text"][0] for choice in body["choices"]] == ["e", "e", "f", "f"]
    assert body["usage"]["prompt_tokens"] == 3
    assert {choice["finish_reason"] for choice in body["choices"]} == {"stop"}
    seeds = [request.params.seed for request in backend.requests]
    assert seeds[0] == seeds[2] == 5
    assert seeds[1] == seeds[3] != 5


def test_logprobs_of_completions(call: Call) -> None:
    choice = call("POST", "/v1/completions", json={**COMPLETION, "logprobs": 2}).json()["choices"][0]
    assert choice["logprobs"] == {
        "tokens": ["`", "a", "b"],
        "token_logprobs": [-0.5] * 3,
        "top_logprobs": [{"`": -0.5, "a": -1.5}, {"a": -0.5, "b": -1.5}, {"b": -0.5, "c": -1.5}],
        "text_offset": [0, 1, 2],
    }


def test_streams_equal_plain_answers(call: Call) -> None:
    json = {"prompt": ["hello", "x"], "max_tokens": 20, "stop": ["ij"], "echo": True}
    plain = call("POST", "/v1/completions", json=json).json()
    for chunk in (1, 4):
        json |= {"stream": True, "stream_options": {"include_usage": True}}
        streamed = events(call("POST", "/v1/completions", json=json, backend=FakeBackend(chunk=chunk)))
        assert all(event["usage"] is None for event in streamed[:-1])
        assert streamed[-1]["choices"] == []
        assert streamed[-1]["usage"] == plain["usage"]
        for index in (0, 1):
            parts = [c for event in streamed for c in event["choices"] if c["index"] == index]
            assert "".join(part["text"] for part in parts) == plain["choices"][index]["text"]
            assert parts[-1]["finish_reason"] == "stop"
            assert parts[-1]["stop_reason"] == "ij"


def test_usage_has_the_cached_tokens(call: Call) -> None:
    """Of a prompt with several answers, as of its tokens: once."""
    json = {"prompt": ["hello", "hello x"], "n": 2, "max_tokens": 3, "stream": True, "cache_salt": "mine"}
    json["stream_options"] = {"include_usage": True}
    backend = FakeBackend(cached_tokens=2)
    usage = events(call("POST", "/v1/completions", json=json, backend=backend))[-1]["usage"]
    assert usage["prompt_tokens_details"] == {"cached_tokens": 4}
    assert [request.cache_salt for request in backend.requests] == ["mine"] * 4
    assert error(call("POST", "/v1/completions", json={**COMPLETION, "cache_salt": ""}), 400)["param"] == "cache_salt"
    usage = call("POST", "/v1/chat/completions", json=CHAT, backend=FakeBackend(cached_tokens=5)).json()["usage"]
    assert usage["prompt_tokens_details"] == {"cached_tokens": 5}


def test_a_stop_string_ends_the_engines_work(call: Call) -> None:
    backend = FakeBackend()
    choice = call("POST", "/v1/completions", json={"prompt": "a", "max_tokens": 20, "stop": "c"}, backend=backend)
    assert choice.json()["choices"][0]["text"] == "`ab"
    assert len(backend.aborted) == 1


# --- Chat -------------------------------------------------------------------------------------------------------


def test_a_chat_completion(call: Call) -> None:
    backend = FakeBackend()
    body = call("POST", "/v1/chat/completions", json=CHAT, backend=backend).json()
    assert body["object"] == "chat.completion"
    assert body["choices"][0]["message"] == {"role": "assistant", "content": "`ab", "refusal": None}
    assert body["usage"]["prompt_tokens"] == len(backend.requests[0].prompt_token_ids)


def test_text_parts_and_the_template(call: Call) -> None:
    prompts = []
    for content in ("hi", [{"type": "text", "text": "hi"}]):
        backend = FakeBackend()
        call("POST", "/v1/chat/completions", json={"messages": [{"role": "user", "content": content}]}, backend=backend)
        prompts.append(backend.requests[0].prompt_token_ids)
    assert prompts[0] == prompts[1]
    text = call("POST", "/detokenize", json={"tokens": list(prompts[0])}).json()["prompt"]
    assert text == "<|im|>user\nhi\n<|im|>assistant\n"


def test_a_chat_stream(call: Call) -> None:
    streamed = events(call("POST", "/v1/chat/completions", json={**CHAT, "stream": True}))
    deltas = [event["choices"][0]["delta"] for event in streamed]
    assert deltas == [{"role": "assistant", "content": ""}, {"content": "`"}, {"content": "a"}, {"content": "b"}]
    assert streamed[-1]["choices"][0]["finish_reason"] == "length"
    assert "usage" not in streamed[0]


def test_logprobs_of_chat(call: Call) -> None:
    json = {**CHAT, "logprobs": True, "top_logprobs": 2, "max_tokens": 1}
    content = call("POST", "/v1/chat/completions", json=json).json()["choices"][0]["logprobs"]["content"]
    first = {"token": "`", "logprob": -0.5, "bytes": [96]}
    assert content == [{**first, "top_logprobs": [first, {"token": "a", "logprob": -1.5, "bytes": [97]}]}]


def test_the_template_may_refuse(call: Call) -> None:
    json = {"messages": [{"role": "bad", "content": "x"}]}
    assert "no bad roles" in error(call("POST", "/v1/chat/completions", json=json), 400)["message"]


@pytest.mark.parametrize(
    ("messages", "where", "says"),
    [
        ([{"role": "user"}], "messages.0.content", "this field is required"),
        ([{"role": "system", "content": "s"}, {"role": "user"}], "messages.1.content", "this field is required"),
        (
            [{"role": "user", "content": None}],
            "messages.0.content",
            "expected a string or a list of text parts, got null",
        ),
        ([{"role": "user", "content": "a"}, {"role": "assistant"}], "messages.1.content", "this field is required"),
        (
            [{"role": "wizard", "content": "a"}],
            "messages.0.role",
            "expected one of system, developer, user, assistant, tool, function, got 'wizard'",
        ),
        (
            [{"role": "user", "content": "a"}, {"role": "asistant", "content": "b"}],
            "messages.1.role",
            "got 'asistant' (did you mean assistant?)",
        ),
    ],
)
def test_messages_that_say_nothing_and_unknown_roles(call: Call, messages: Any, where: str, says: str) -> None:
    for path in ("/v1/chat/completions", "/tokenize"):
        told = error(call("POST", path, json={"messages": messages}), 400)
        assert told["param"] == where
        assert told["message"].startswith(f"{where}: ")
        assert says in told["message"]


def test_messages_without_content_that_say_something(call: Call) -> None:
    asked = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    for messages in (
        [{"role": "developer", "content": "a"}],
        [{"role": "function", "name": "f", "content": "a"}],
        [
            {"role": "user", "content": "a"},
            {"role": "assistant", "tool_calls": [asked]},
            {"role": "tool", "tool_call_id": "c1", "content": "b"},
        ],
        [{"role": "user", "content": "a"}, {"role": "assistant", "content": None, "reasoning": "r"}],
    ):
        assert call("POST", "/v1/chat/completions", json={"messages": messages, "max_tokens": 1}).status_code == 200


def test_a_model_without_a_template(tmp_path: Path) -> None:
    make_tokenizer(tmp_path / "base", chat_template=None)

    async def work() -> httpx.Response:
        async with client_of(FakeBackend(), tmp_path / "base") as client:
            return await client.post("/v1/chat/completions", json=CHAT)

    assert error(asyncio.run(work()), 400)["code"] == "no_chat_template"


# --- vLLM's further fields --------------------------------------------------------------------------------------


def test_every_alternative_has_its_entry(call: Call, tmp_path: Path) -> None:
    """Though tokens share a text, as a byte and a letter do in SentencePiece's vocabularies."""
    make_sentencepiece_tokenizer(tmp_path)

    async def work(json: dict[str, Any]) -> dict[str, Any]:
        backend = FakeBackend(script=lambda request: [3, 300, 320], vocab_size=600)
        async with client_of(backend, tmp_path) as client:
            return dict((await client.post("/v1/completions", json=json)).json()["choices"][0]["logprobs"])

    body = {"prompt": "the", "logprobs": 20, "max_tokens": 3}
    for extra in ({}, {"return_tokens_as_token_ids": True}):
        found = asyncio.run(work({**body, **extra}))
        assert [len(entries) for entries in found["top_logprobs"]] == [20] * 3
        assert all(name in entries for name, entries in zip(found["tokens"], found["top_logprobs"], strict=True))
    assert found["tokens"] == ["token_id:3", "token_id:300", "token_id:320"]


def test_names_and_offsets_make_up_the_text(tmp_path: Path) -> None:
    """Spaces included, which SentencePiece's decoder takes from the beginning of a text."""
    make_sentencepiece_tokenizer(tmp_path)
    tokenizer = Tokenizer.load(str(tmp_path))
    made = [*tokenizer.encode("self the quick", add_special_tokens=False), tokenizer.id_of_piece("self") or 0]

    async def work(path: str, **json: Any) -> dict[str, Any]:
        backend = FakeBackend(script=lambda request: made, vocab_size=600)
        async with client_of(backend, tmp_path) as client:
            return dict((await client.post(path, json={"max_tokens": len(made), **json})).json()["choices"][0])

    text = " self the quickself"
    plain = asyncio.run(work("/v1/completions", prompt="the", logprobs=1))
    assert (plain["text"], "".join(plain["logprobs"]["tokens"])) == (text, text)
    assert plain["logprobs"]["text_offset"] == [0, 5, 9, 15]
    chat = asyncio.run(work("/v1/chat/completions", messages=CHAT["messages"], logprobs=True))
    said = b"".join(bytes(token["bytes"]) for token in chat["logprobs"]["content"])
    assert said.decode() == chat["message"]["content"] == text


def test_tokens_of_the_same_text_are_named_by_ids() -> None:
    """The chosen token and the more likely keep theirs."""
    shape = CompletionShape(lambda token_id: "same" if token_id < 3 else str(token_id), None, 3)
    logprobs = TokenLogprobs(token_id=2, logprob=-2.0, top=((1, -1.0), (2, -2.0), (7, -3.0)))
    delta = Delta(index=0, text="x", tokens=(ScoredToken(logprobs=logprobs, text_offset=0),))
    (entries,) = shape.choice(delta)["logprobs"]["top_logprobs"]
    assert entries == {"token_id:1": -1.0, "same": -2.0, "7": -3.0}


def test_token_ids_of_completions(call: Call) -> None:
    json = {"prompt": [[70], [71, 72]], "max_tokens": 3, "return_token_ids": True}
    choices = call("POST", "/v1/completions", json=json).json()["choices"]
    assert [choice["prompt_token_ids"] for choice in choices] == [[70], [71, 72]]
    assert [choice["token_ids"] for choice in choices] == [[65, 66, 67]] * 2
    streamed = events(call("POST", "/v1/completions", json={**json, "prompt": [70], "stream": True}))
    parts = [event["choices"][0] for event in streamed]
    assert parts[0]["prompt_token_ids"] == [70]
    assert [token for part in parts for token in part["token_ids"]] == [65, 66, 67]
    assert "token_ids" not in call("POST", "/v1/completions", json=COMPLETION).json()["choices"][0]


def test_token_ids_of_chat(call: Call) -> None:
    backend = FakeBackend()
    whole = call("POST", "/v1/chat/completions", json={**CHAT, "return_token_ids": True}, backend=backend).json()
    prompt = list(backend.requests[0].prompt_token_ids)
    assert (whole["prompt_token_ids"], whole["choices"][0]["token_ids"]) == (prompt, [65, 66, 67])
    streamed = events(call("POST", "/v1/chat/completions", json={**CHAT, "return_token_ids": True, "stream": True}))
    assert streamed[0]["prompt_token_ids"] == prompt
    assert [token for event in streamed[1:] for token in event["choices"][0]["token_ids"]] == [65, 66, 67]


def test_a_request_id_is_shown_and_never_the_engines(call: Call) -> None:
    backend = FakeBackend()
    for _ in range(2):
        body = call("POST", "/v1/completions", json={**COMPLETION, "request_id": "mine"}, backend=backend).json()
        assert body["id"] == "cmpl-mine"
    assert call("POST", "/v1/chat/completions", json={**CHAT, "request_id": "x"}).json()["id"] == "chatcmpl-x"
    assert len({request.request_id for request in backend.requests}) == 2
    assert not any("mine" in request.request_id for request in backend.requests)


def test_tokens_that_may_not_come_reach_the_engine(call: Call) -> None:
    backend = FakeBackend()
    fields = {"allowed_token_ids": [9, 5], "bad_words": ["hello", "again and"]}
    assert call("POST", "/v1/completions", json={**COMPLETION, **fields}, backend=backend).status_code == 200
    request = backend.requests[0]
    assert request.params.allowed_token_ids == (5, 9)
    assert request.eos_token_ids == (0,)
    words = request.params.bad_words
    texts = {call("POST", "/detokenize", json={"tokens": list(word)}).json()["prompt"] for word in words}
    assert {"hello", "again and"} <= texts <= {"hello", " hello", "again and", " again and"}


def test_prompts_that_are_far_too_long_can_be_cut(call: Call) -> None:
    long, backend = "hello world " * 2000, FakeBackend()
    error(call("POST", "/v1/completions", json={"prompt": long}), 400)
    for keep, left in ((5, 5), (-1, 128 - 3)):
        json = {**COMPLETION, "prompt": long, "truncate_prompt_tokens": keep}
        assert call("POST", "/v1/completions", json=json, backend=backend).status_code == 200
        assert len(backend.requests[-1].prompt_token_ids) == left
    json = {**CHAT, "messages": [{"role": "user", "content": long}], "truncate_prompt_tokens": -1}
    assert call("POST", "/v1/chat/completions", json=json, backend=backend).json()["usage"]["prompt_tokens"] == 125
