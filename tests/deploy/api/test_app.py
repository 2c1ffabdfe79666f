"""Every route over a fake backend: answers, errors, keys, metrics."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import logging
from collections.abc import AsyncGenerator, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from elastic_moe.cluster.config import ServeConfig
from elastic_moe.cluster.errors import NotReadyError, RequestError
from elastic_moe.cluster.messages.requests import GenerateRequest, RequestId, TokenLogprobs, TokenOutput
from elastic_moe.cluster.messages.views import EngineStatus, Phase, Readiness, WorkerState, WorkerView
from elastic_moe.deploy.api import http_io
from elastic_moe.deploy.api.app import create_app
from elastic_moe.deploy.api.completions import CompletionShape
from elastic_moe.deploy.api.service import Service
from elastic_moe.deploy.generation.answer import Delta, ScoredToken
from elastic_moe.deploy.text.tokenizer import Tokenizer
from tests.deploy.conftest import client_of
from tests.deploy.fakes import FakeBackend, make_sentencepiece_tokenizer, make_tokenizer

Call = Callable[..., httpx.Response]
COMPLETION = {"prompt": "hello", "max_tokens": 3}
CHAT = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 3}


def events(response: httpx.Response) -> list[dict[str, Any]]:
    lines = [line for line in response.text.split("\n\n") if line]
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def error(response: httpx.Response, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert "Traceback" not in response.text
    return dict(body["error"])


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


# --- Errors -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "status", "param", "code"),
    [
        ({"prompt": "a", "max_tokens": -1}, 400, "max_tokens", "invalid_value"),
        ({"prompt": "a", "max_tokens": 2.5}, 400, "max_tokens", "invalid_value"),
        ({"prompt": "a", "model": "gpt-9"}, 404, "model", "model_not_found"),
        ({"prompt": "ab " * 200}, 400, "prompt", "context_length_exceeded"),
        ({"prompt": "a" * 1_000_000}, 400, "prompt", "context_length_exceeded"),
        ({"prompt": [5000]}, 400, "prompt", "invalid_value"),
        ({"prompt": [-1]}, 400, "prompt", "invalid_value"),
        ({"prompt": ""}, 400, "prompt", None),
        ({"prompt": []}, 400, "prompt", None),
        ({"prompt": "a", "stop_token_ids": [5000]}, 400, "stop_token_ids", "invalid_value"),
        ({"prompt": "a", "logit_bias": {"5000": 1}}, 400, "logit_bias", "invalid_value"),
        ({}, 400, "prompt", "missing_required_parameter"),
        ([], 400, None, None),
    ],
)
def test_bad_requests(call: Call, body: Any, status: int, param: str | None, code: str | None) -> None:
    found = error(call("POST", "/v1/completions", json=body), status)
    assert (found["param"], found["code"]) == (param, code)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b'{"prompt": "\xff"}',
        b'{"prompt": "a", "temperature": NaN}',
        b'{"prompt": "\\ud800"}',
        b"[" * 100_000,
        b'{"prompt": [' + b"9" * 10_000 + b"]}",
    ],
    ids=["empty", "broken", "not-utf8", "nan", "half-surrogate", "nested", "huge-number"],
)
def test_bodies_that_are_no_json(call: Call, content: bytes) -> None:
    response = call("POST", "/v1/completions", content=content, headers={"content-type": "application/json"})
    assert error(response, 400)["code"] == "invalid_json"


def test_bodies_that_are_too_large_or_of_another_type(call: Call) -> None:
    json_type = {"content-type": "application/json"}
    large = call("POST", "/v1/completions", content=b'"' + b"a" * 10_000_000 + b'"', headers=json_type)
    assert error(large, 413)["code"] == "request_too_large"
    error(call("POST", "/v1/completions", data={"prompt": "a"}), 415)


def test_unknown_routes_and_methods(call: Call) -> None:
    assert error(call("GET", "/v2/nothing"), 404)["code"] == "not_found"
    response = call("GET", "/v1/completions")
    assert error(response, 405)["code"] == "method_not_allowed"
    assert "POST" in response.headers["allow"]


def test_errors_of_the_engine(call: Call) -> None:
    backend = FakeBackend(refuse=RequestError("no room in the KV cache", param="prompt", status=400))
    for stream in (False, True):
        response = call("POST", "/v1/completions", json={**COMPLETION, "stream": stream}, backend=backend)
        assert error(response, 400)["message"] == "no room in the KV cache"
    response = call("POST", "/v1/completions", json=COMPLETION, backend=FakeBackend(fail_after=0))
    assert error(response, 500)["message"] == "worker w1 is lost"
    streamed = call("POST", "/v1/completions", json={**COMPLETION, "stream": True}, backend=FakeBackend(fail_after=1))
    assert events(streamed)[-1]["error"]["message"] == "worker w1 is lost"
    # what was held back comes before the error
    config = {"stream_interval": 9}
    streamed = call(
        "POST", "/v1/completions", json={**COMPLETION, "stream": True}, backend=FakeBackend(fail_after=2), config=config
    )
    *parts, last = events(streamed)
    assert [part["choices"][0]["text"] for part in parts] == ["`", "a"]
    assert last["error"]["message"] == "worker w1 is lost"


def test_a_bug_is_a_500_without_its_traceback(call: Call, caplog: pytest.LogCaptureFixture) -> None:
    backend = FakeBackend(script=lambda request: [1 // 0])
    with caplog.at_level(logging.ERROR):
        found = error(call("POST", "/v1/completions", json=COMPLETION, backend=backend), 500)
    assert found["code"] == "internal_error"
    assert "ZeroDivisionError" in caplog.text


# --- State, models, tokens --------------------------------------------------------------------------------------


def test_not_ready(call: Call) -> None:
    backend = FakeBackend(state=Readiness(ready=False, reason="loading: w0 40%"))
    assert call("GET", "/health", backend=backend).status_code == 200
    ready = call("GET", "/ready", backend=backend)
    assert (ready.status_code, ready.json()["reason"]) == (503, "loading: w0 40%")
    refused = call("POST", "/v1/completions", json=COMPLETION, backend=backend)
    assert "loading: w0 40%" in error(refused, 503)["message"]
    assert int(refused.headers["retry-after"]) > 0
    assert call("GET", "/ready").status_code == 200


def test_a_cluster_with_too_little_memory_is_ready_and_says_that_it_is_degraded(call: Call) -> None:
    told = call("GET", "/ready").json()
    assert (told["degraded"], told["resident"]) == (False, 1.0)
    backend = FakeBackend(state=Readiness(ready=True, reason="degraded: 40% of the experts", resident=0.4))
    ready = call("GET", "/ready", backend=backend)
    assert ready.status_code == 200
    assert (ready.json()["degraded"], ready.json()["resident"]) == (True, 0.4)
    assert call("POST", "/v1/completions", json=COMPLETION, backend=backend).status_code == 200


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_a_request_waits_while_workers_recover(call: Call, path: str) -> None:
    json = {**COMPLETION, **CHAT}
    backend = FakeBackend(state=Readiness(ready=False, reason="recovering, 1 of 3 workers ready"), can_wait=True)
    assert call("POST", path, json=json, backend=backend).status_code == 200
    assert call("GET", "/ready", backend=backend).status_code == 503
    # in vain: it never will
    backend.state = Readiness(ready=False, reason="failed", error="the checkpoint is gone")
    assert "checkpoint is gone" in error(call("POST", path, json=json, backend=backend), 503)["message"]


def test_waiting_in_vain_is_a_503_and_not_a_500(call: Call) -> None:
    class Gone(FakeBackend):
        async def generate(self, request: GenerateRequest) -> AsyncGenerator[TokenOutput, None]:
            raise NotReadyError("the cluster could not serve this request for 600 s")
            yield

    for stream in (False, True):
        response = call("POST", "/v1/completions", json={**COMPLETION, "stream": stream}, backend=Gone())
        assert error(response, 503)["code"] == "not_ready"
        assert int(response.headers["retry-after"]) > 0


def test_waiting_requests_are_bounded(model_dir: Path) -> None:
    """Those that have a token wait no more; those of a client that hung up do not either."""
    began, go_on = asyncio.Event(), asyncio.Event()

    class Held(FakeBackend):
        async def generate(self, request: GenerateRequest) -> AsyncGenerator[TokenOutput, None]:
            began.set()
            await go_on.wait()
            async for output in super().generate(request):
                yield output

    async def work() -> None:
        async with client_of(Held(), model_dir, max_waiting_requests=8) as http:
            answers = [asyncio.create_task(http.post("/v1/completions", json={**COMPLETION, "n": 3})) for _ in range(2)]
            await began.wait()
            refused = await http.post("/v1/chat/completions", json={**CHAT, "n": 3})
            assert error(refused, 503)["code"] == "too_many_requests"
            assert int(refused.headers["retry-after"]) > 0
            assert error(await http.post("/v1/completions", json={**COMPLETION, "n": 9}), 400)["param"] == "n"
            go_on.set()
            assert [(await answer).status_code for answer in answers] == [200, 200]
            assert (await http.post("/v1/chat/completions", json={**CHAT, "n": 3})).status_code == 200

    asyncio.run(work())


def test_requests_carry_whose_they_are(model_dir: Path) -> None:
    backend = FakeBackend()

    async def work() -> None:
        async with client_of(backend, model_dir, peer=("127.0.0.9", 1)) as http:
            await http.post("/v1/completions", json=COMPLETION)

    asyncio.run(work())
    assert [request.client for request in backend.requests] == ["127.0.0.9"]


def test_refusals_name_what_the_client_sent(call: Call) -> None:
    too_long = {**CHAT, "max_completion_tokens": 1000}
    found = error(call("POST", "/v1/chat/completions", json=too_long), 400)
    assert found["param"] == "max_completion_tokens"
    assert found["message"].startswith("max_completion_tokens: 1000 ")
    long = {"messages": [{"role": "user", "content": "日本 " * 100}]}
    assert error(call("POST", "/v1/chat/completions", json=long), 400)["param"] == "messages"
    for param, named in (("prompt", "messages"), ("max_tokens", "max_completion_tokens")):
        backend = FakeBackend(refuse=RequestError("the prompt has 9 tokens and max_tokens is 5", param=param))
        found = error(
            call("POST", "/v1/chat/completions", json={**CHAT, "max_completion_tokens": 5}, backend=backend), 400
        )
        assert found["param"] == named
        assert "max_completion_tokens is 5" in found["message"]


def test_a_client_that_reads_nothing_is_cut_off(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(http_io, "SLOW_READER_S", 0.02)
    sent, closed = [], []

    async def events() -> AsyncGenerator[bytes, None]:
        try:
            for n in range(1000):
                yield b"%d" % n
        finally:
            closed.append(True)

    async def send(message: Any) -> None:
        sent.append(message)
        if len(sent) > 5:
            await asyncio.Event().wait()

    async def receive() -> Any:
        await asyncio.Event().wait()

    with caplog.at_level(logging.WARNING):
        asyncio.run(http_io.EventStream(events())({"type": "http"}, receive, send))
    assert closed == [True]
    assert "a client is cut off" in caplog.text


def test_a_stream_with_long_pauses_is_not_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_io, "SLOW_READER_S", 0.01)
    sent = []

    async def events() -> AsyncGenerator[bytes, None]:
        for _ in range(2):
            yield b"a"
            await asyncio.sleep(0.06)

    async def send(message: Any) -> None:
        sent.append(message.get("body"))

    async def receive() -> Any:
        await asyncio.Event().wait()

    asyncio.run(http_io.EventStream(events())({"type": "http"}, receive, send))
    assert sent == [None, b"a", b"a", b""]


def test_draining_refuses_new_requests(model_dir: Path) -> None:
    async def work() -> int:
        service = Service(ServeConfig(), FakeBackend(), str(model_dir))
        await service.begin()
        service.draining = True
        transport = httpx.ASGITransport(create_app(service))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as http:
            return (await http.post("/v1/completions", json=COMPLETION)).status_code

    assert asyncio.run(work()) == 503


def test_readiness_names_a_missing_tokenizer(tmp_path: Path) -> None:
    async def work() -> httpx.Response:
        async with client_of(FakeBackend(), tmp_path) as client:
            return await client.get("/ready")

    response = asyncio.run(work())
    assert response.status_code == 503
    assert "tokenizer" in response.json()["error"]


def test_models(call: Call) -> None:
    card = call("GET", "/v1/models").json()["data"][0]
    assert (card["id"], card["object"], card["max_model_len"]) == ("tiny-moe", "model", 128)
    named = call("GET", "/v1/models/org/name", config={"served_model_name": "org/name"})
    assert named.json()["id"] == "org/name"
    assert error(call("GET", "/v1/models/x"), 404)["code"] == "model_not_found"


def test_tokenize_and_back(call: Call) -> None:
    body = call("POST", "/tokenize", json={"prompt": "hello 日本", "return_token_strs": True}).json()
    assert body["count"] == len(body["tokens"]) == len(body["token_strs"])
    assert body["max_model_len"] == 128
    assert call("POST", "/detokenize", json={"tokens": body["tokens"]}).json() == {"prompt": "hello 日本"}
    chat = call("POST", "/tokenize", json={"messages": CHAT["messages"]}).json()
    assert chat["count"] > 2
    error(call("POST", "/tokenize", json={}), 400)
    error(call("POST", "/detokenize", json={"tokens": [330]}), 400)


def test_version(call: Call) -> None:
    assert set(call("GET", "/version").json()) == {"version"}


# --- Keys -------------------------------------------------------------------------------------------------------


def test_the_api_key(call: Call) -> None:
    config = {"api_key": "secret"}
    for path, body in (("/v1/completions", COMPLETION), ("/tokenize", {"prompt": "a"})):
        assert error(call("POST", path, json=body, config=config), 401)["code"] == "invalid_api_key"
        error(call("POST", path, json=body, config=config, headers={"authorization": "Bearer no"}), 401)
    error(call("GET", "/v1/models", config=config), 401)
    assert call("GET", "/health", config=config).status_code == 200
    assert call("GET", "/v1/models", config=config, headers={"authorization": "bearer secret"}).status_code == 200


@pytest.mark.parametrize(
    ("config", "headers", "status"),
    [
        ({}, {}, 202),
        ({}, {"origin": "http://evil.example"}, 403),
        ({"host": "0.0.0.0"}, {}, 403),
        ({"host": "0.0.0.0", "admin_api_key": "k"}, {}, 401),
        ({"host": "0.0.0.0", "admin_api_key": "k"}, {"authorization": "Bearer k"}, 202),
        ({"admin_api_key": "k"}, {}, 401),
        ({"api_key": "a", "admin_api_key": "k"}, {"authorization": "Bearer a"}, 401),
    ],
)
def test_who_may_change_the_cluster(call: Call, config: dict[str, Any], headers: dict[str, str], status: int) -> None:
    assert call("POST", "/admin/rebalance", json={}, config=config, headers=headers).status_code == status
    assert call("GET", "/admin/workers", config=config).status_code == 200


def test_loopback_means_this_machine(model_dir: Path) -> None:
    async def status(host: str) -> int:
        async with client_of(FakeBackend(), model_dir, peer=("10.0.0.9", 5), host=host) as client:
            return (await client.get("/v1/models")).status_code

    assert asyncio.run(status("127.0.0.1")) == 403
    assert asyncio.run(status("0.0.0.0")) == 200


# --- Admin and metrics ------------------------------------------------------------------------------------------


def test_admin_views(call: Call) -> None:
    placement = call("GET", "/admin/placement").json()
    assert placement["epoch"] == 1
    assert placement["slot_to_worker"] == [0, 0, 1, 1]
    assert placement["physical_to_logical_map"] == [[0, 1, 2, 3]] * 2
    routing = call("GET", "/admin/routing").json()
    assert routing["load_imbalance"] == [1.0, 1.25]
    assert (routing["prefill"]["tokens"], routing["decode"]["tokens"], routing["decode"]["weight"]) == (5, 5, 3.0)
    worker = call("GET", "/admin/workers").json()[0]
    fields = {"id", "rank", "state", "pid", "node", "device", "running_requests", "kv_usage", "fit"}
    more = {"experts_served", "experts_resident", "address", "link_gbps", "waits_for"}
    assert set(worker) == fields | more
    assert worker["fit"] == [
        {"part": "experts", "modules": "MoE layers", "count": 2, "path": "native", "reason": None},
        {"part": "norms", "modules": "LayerNorm", "count": 3, "path": "transformers", "reason": "it has a bias"},
    ]


def test_what_is_in_force(call: Call) -> None:
    told = call("GET", "/admin/config").json()
    settings = told.pop("settings")
    assert told == {
        "generation": "g", "model_name": "tiny-moe", "model_dir": "/models/tiny-moe", "device": "cpu"
    }  # fmt: skip
    assert settings.keys() == {field.name for field in dataclasses.fields(ServeConfig)}
    assert (settings["workers"], settings["dtype"]) == (3, "auto")
    assert "the cluster's" not in str(settings)


def test_rebalancing(call: Call) -> None:
    started = call("POST", "/admin/rebalance")
    assert started.status_code == 202
    fields = {"operation_id", "kind", "phase", "epoch", "reason", "error", "asked", "retiring", "progress"}
    fields.add("safe_to_terminate")
    assert set(started.json()) == fields
    assert call("GET", "/admin/operations").json()[0]["phase"] == "preparing"
    assert set(call("GET", "/admin/operations/op-1").json()) == fields
    assert error(call("GET", "/admin/operations/op-9"), 404)["code"] == "operation_not_found"
    preview = call("POST", "/admin/rebalance", json={"planner": "greedy", "dry_run": True})
    assert (preview.status_code, preview.json()["moves"]) == (200, 3)
    assert "planner" in error(call("POST", "/admin/rebalance", json={"planner": "magic"}), 400)["message"]
    assert error(call("POST", "/admin/rebalance", json={"dryrun": True}), 400)["param"] == "dryrun"
    busy = call("POST", "/admin/rebalance", json={}, backend=FakeBackend(running_operation="op-7"))
    assert "op-7" in error(busy, 409)["message"]


def test_metrics(model_dir: Path) -> None:
    async def work() -> str:
        async with client_of(FakeBackend(), model_dir) as client:
            await client.post("/v1/completions", json=COMPLETION)
            return (await client.get("/metrics")).text

    text = asyncio.run(work())
    labels = '{engine="0",model_name="tiny-moe"}'
    for line in (
        f"vllm:num_requests_running{labels} 2.0",
        f"vllm:num_requests_waiting{labels} 1.0",
        f"vllm:kv_cache_usage_perc{labels} 0.25",
        f"vllm:num_preemptions_total{labels} 3.0",
        f"vllm:corrupted_requests_total{labels} 5.0",
        f"vllm:prefix_cache_queries_total{labels} 40.0",
        f"vllm:prefix_cache_hits_total{labels} 16.0",
        f"emoe:engine_time_to_first_token_seconds_count{labels} 4.0",
        f"emoe:engine_time_to_first_token_seconds_sum{labels} 0.5",
        f"vllm:prompt_tokens_total{labels} 1.0",
        f"vllm:generation_tokens_total{labels} 3.0",
        f"vllm:time_to_first_token_seconds_count{labels} 1.0",
        f"vllm:inter_token_latency_seconds_count{labels} 2.0",
        f"vllm:e2e_request_latency_seconds_count{labels} 1.0",
        f"vllm:request_prompt_tokens_sum{labels} 1.0",
        f"vllm:request_generation_tokens_sum{labels} 3.0",
        f"vllm:request_params_max_tokens_sum{labels} 3.0",
        f"vllm:request_queue_time_seconds_sum{labels} 0.125",
        f"vllm:request_prefill_time_seconds_count{labels} 1.0",
        f"vllm:request_decode_time_seconds_count{labels} 1.0",
        f"vllm:request_inference_time_seconds_count{labels} 1.0",
        f"vllm:request_time_per_output_token_seconds_count{labels} 1.0",
        'vllm:request_success_total{engine="0",finished_reason="length",model_name="tiny-moe"} 1.0',
        f"emoe:experts_moved_total{labels} 5.0",
        'emoe:workers{engine="0",model_name="tiny-moe",state="serving"} 1.0',
        'emoe:fit_info{engine="0",model_name="tiny-moe",part="experts",path="native"} 1.0',
        'emoe:fit_info{engine="0",model_name="tiny-moe",part="norms",path="transformers"} 1.0',
        'emoe:rebalance_events_total{engine="0",model_name="tiny-moe",result="completed"} 2.0',
    ):
        assert line in text.splitlines()
    for line in (
        'emoe:rebalance_duration_seconds_count{engine="0",model_name="tiny-moe",stage="planning"} 1.0',
        'emoe:rebalance_duration_seconds_sum{engine="0",model_name="tiny-moe",stage="planning"} 0.2',
        'emoe:rebalance_duration_seconds_bucket{engine="0",le="0.25",model_name="tiny-moe",stage="planning"} 1.0',
        'emoe:recoveries_total{cause="worker",engine="0",model_name="tiny-moe"} 1.0',
        f"emoe:recovery_duration_seconds_sum{labels} 0.5",
        f"emoe:requests_resumed_total{labels} 0.0",
        f"emoe:bytes_moved_total{labels} 1000.0",
        f"emoe:workers_target{labels} 2.0",
        f"emoe:experts_resident{labels} 4.0",
        'emoe:expert_accesses_total{engine="0",model_name="tiny-moe",tier="device"} 7.0',
        'emoe:expert_accesses_total{engine="0",model_name="tiny-moe",tier="disk"} 3.0',
        'emoe:expert_fetch_bytes_total{engine="0",from="disk",model_name="tiny-moe"} 300.0',
        'emoe:expert_stall_seconds_total{cause="miss",engine="0",model_name="tiny-moe"} 0.25',
        "emoe:balancedness" + labels + " 0.9",
    ):
        assert line in text.splitlines()


def test_metrics_show_dead_workers_while_there_is_no_engine(model_dir: Path) -> None:
    class Losing(FakeBackend):
        lost = False

        async def status(self) -> EngineStatus:
            if self.lost:
                raise NotReadyError("there is no engine at the moment")
            return await super().status()

        async def workers(self) -> list[WorkerView]:
            state = WorkerState.DEAD if self.lost else WorkerState.SERVING
            return [dataclasses.replace(worker, state=state) for worker in await super().workers()]

    async def work() -> tuple[str, str]:
        async with client_of(backend := Losing(), model_dir) as client:
            before = (await client.get("/metrics")).text
            backend.lost = True
            return before, (await client.get("/metrics")).text

    before, after = asyncio.run(work())
    labels = 'engine="0",model_name="tiny-moe"'
    assert f'emoe:workers{{{labels},state="serving"}} 1.0' in before
    assert f'emoe:workers{{{labels},state="serving"}} 0.0' in after
    assert f'emoe:workers{{{labels},state="dead"}} 1.0' in after
    assert "vllm:num_requests_running" in before
    assert "vllm:num_requests_running" not in after
    assert f"emoe:experts_moved_total{{{labels}}} 5.0" in after


# --- Scaling and given placements -------------------------------------------------------------------------------


class Pair(FakeBackend):
    """Two groups, of which the second one has all requests."""

    num_groups = 2

    def group(self, number: int) -> FakeBackend:
        return self

    def group_of(self, request_id: RequestId) -> int:
        return 1


def test_groups_are_listed_asked_and_counted_by_their_engines(call: Call) -> None:
    engines = call("GET", "/admin/engines", backend=Pair()).json()
    assert [engine["engine"] for engine in engines] == [0, 1]
    assert (engines[1]["ready"], engines[1]["workers"], engines[1]["running"], engines[1]["kv_usage"]) == (
        *(True, 2, 2, 0.25),
    )
    assert call("GET", "/admin/workers?engine=1", backend=Pair()).status_code == 200
    for number in ("1", "-1", "x", "", "9" * 30):
        assert error(call("GET", f"/admin/workers?engine={number}"), 400)["param"] == "engine"


def test_the_number_of_groups_is_changed_by_a_call(call: Call) -> None:
    backend = FakeBackend()
    answer = call("POST", "/admin/engines", json={"data_parallel_size": 3}, backend=backend)
    assert (answer.status_code, answer.json()) == (202, {"data_parallel_size": 3, "data_parallel_size_before": 1})
    assert backend.num_groups == 3
    for size in (0, "2", None, True, 2**31, 5):
        told = error(call("POST", "/admin/engines", json={"data_parallel_size": size}, backend=backend), 400)
        assert told["param"] == "data_parallel_size"
    error(call("POST", "/admin/engines", json={}), 400)
    error(call("POST", "/admin/engines", json={"data_parallel_size": 2}, config={"admin_api_key": "k"}), 401)
    assert backend.num_groups == 3

    class Leaving(Pair):
        wanted_groups = 1

    listed = call("GET", "/admin/engines", backend=Leaving()).json()
    assert [engine["retiring"] for engine in listed] == [False, True]


def test_metrics_of_a_group_that_came_later(model_dir: Path) -> None:
    async def work() -> str:
        backend = FakeBackend()
        async with client_of(backend, model_dir) as client:
            backend.num_groups = 2
            backend.group = lambda number: backend  # type: ignore[method-assign]
            backend.group_of = lambda request_id: 1  # type: ignore[method-assign]
            await client.post("/v1/completions", json=COMPLETION)
            await client.get("/metrics")
            backend.num_groups = 1
            return (await client.get("/metrics")).text

    families = list(text_string_to_metric_families(asyncio.run(work())))
    found = {(s.name, s.labels.get("engine")): s.value for family in families for s in family.samples}
    # what was counted stays, and the state of a group that is gone does not
    assert found["vllm:generation_tokens_total", "1"] == 3
    assert ("vllm:num_requests_waiting", "0") in found
    assert ("vllm:num_requests_waiting", "1") not in found


def test_metrics_of_several_groups(model_dir: Path) -> None:
    async def work() -> str:
        async with client_of(Pair(), model_dir) as client:
            await client.post("/v1/completions", json=COMPLETION)
            return (await client.get("/metrics")).text

    families = list(text_string_to_metric_families(asyncio.run(work())))
    assert len({family.name for family in families}) == len(families)
    samples = (sample for family in families for sample in family.samples if "le" not in sample.labels)
    found = {(sample.name, sample.labels["engine"]): sample.value for sample in samples}
    for name, expected in (
        ("vllm:generation_tokens_total", (0, 3)),
        ("vllm:prompt_tokens_total", (0, 1)),
        ("vllm:e2e_request_latency_seconds_count", (0, 1)),
        ("vllm:num_requests_waiting", (1, 1)),
    ):
        assert (found[name, "0"], found[name, "1"]) == expected, name


def test_scaling(call: Call) -> None:
    backend = FakeBackend()
    answer = call("POST", "/admin/scale", json={"workers": 4, "operation_id": "mine"}, backend=backend)
    assert (answer.status_code, answer.json()["operation_id"], answer.json()["kind"]) == (202, "mine", "scale")
    retired = call("POST", "/admin/scale", json={"retire": ["w2"]}, backend=backend).json()
    assert (retired["retiring"], retired["progress"], retired["safe_to_terminate"]) == (["w2"], 0.0, False)
    assert backend.scaled == [(4, ()), (None, ("w2",))]
    assert "1 to 4" in error(call("POST", "/admin/scale", json={"workers": 9}), 400)["message"]
    for body in ({}, {"workers": "4"}, {"workers": True}, {"retire": []}, {"retire": "w2"}, {"operation_id": "a b"}):
        error(call("POST", "/admin/scale", json=body), 400)
    twice = error(call("POST", "/admin/scale", json={"retire": ["w1", "w2", "w1"]}), 400)
    assert (twice["param"], twice["message"]) == ("retire", "retire: expected each worker once, got 'w1' several times")
    busy = FakeBackend(running_operation="op-7")
    assert "op-7" in error(call("POST", "/admin/scale", json={"workers": 3}, backend=busy), 409)["message"]
    assert call("POST", "/admin/scale", json={"workers": 3, "replace": True}, backend=busy).status_code == 202


def test_scaling_as_vllm_and_sglang_do(call: Call) -> None:
    path, size = "/scale_elastic_ep", {"new_data_parallel_size": 2, "drain_timeout": 1}
    done = call("POST", path, json=size)
    assert (done.status_code, done.json()) == (200, {"message": "Scaled to 2 data parallel engines"})
    assert call("POST", path, json={"new_ep_size": 3}).json()["new_ep_size"] == 3
    for body in ({}, {"new_data_parallel_size": 0}, {"new_data_parallel_size": 2, "drain_timeout": 0}):
        error(call("POST", path, json=body), 400)
    error(call("POST", path, json=size, backend=FakeBackend(scale_ends=Phase.PREPARING)), 408)
    error(call("POST", path, json=size, backend=FakeBackend(scale_ends=Phase.FAILED)), 500)
    error(call("POST", path, json=size, config={"admin_api_key": "k"}), 401)
    assert call("POST", "/is_scaling_elastic_ep").json() == {"is_scaling_elastic_ep": False}


def test_scaling_of_groups_of_which_one_cannot(call: Call) -> None:
    class Recovering(FakeBackend):
        async def scale(self, *_: object, **__: object) -> Any:
            raise NotReadyError("recovering")

    class Groups(FakeBackend):
        num_groups = 2

        def __init__(self, *members: FakeBackend) -> None:
            super().__init__()
            self.members = members

        def group(self, number: int) -> FakeBackend:
            return self.members[number]

    path, size = "/scale_elastic_ep", {"new_data_parallel_size": 2, "drain_timeout": 1}
    told = call("POST", path, json=size, backend=Groups(FakeBackend(), Recovering()))
    assert "engine 0 scales to 2 workers, and engine 1 does not: recovering" in error(told, 503)["message"]
    none = call("POST", path, json=size, backend=Groups(Recovering(), Recovering()))
    assert error(none, 503)["message"] == "recovering"
    both = call("POST", path, json=size, backend=Groups(FakeBackend(), FakeBackend()))
    assert both.json() == {"message": "Scaled to 2 data parallel engines in each of 2 groups"}


def test_the_state_of_scaling(call: Call) -> None:
    told = call("GET", "/admin/scale").json()
    assert (told["serving"], told["max_workers"], told["autoscaler"]) == (2, 8, "demand 60% of capacity")


def test_a_given_placement(call: Call) -> None:
    backend = FakeBackend()
    placement = call("GET", "/admin/placement", backend=backend).json()
    assert placement["pinned"] is False
    for path, pinned, expected in (
        ("/admin/placement", True, True),
        ("/admin/placement", None, None),
        ("/admin/placement?pinned=true", False, True),
    ):
        answer = call("PUT", path, json={**placement, "pinned": pinned}, backend=backend)
        assert answer.status_code == 202
        assert backend.placed is not None
        assert backend.placed[0].to_dict() == {k: v for k, v in placement.items() if k not in ("epoch", "pinned")}
        assert backend.placed[1] is expected
    error(call("PUT", "/admin/placement", json={**placement, "pinned": 1}), 400)
    error(call("PUT", "/admin/placement", json=[]), 400)
    broken = {**placement, "physical_to_logical_map": [[0, 1, 2, 2]] * 2}
    assert "no slot for expert 3" in error(call("PUT", "/admin/placement", json=broken), 400)["message"]
    error(call("PUT", "/admin/placement", json=placement, config={"admin_api_key": "k"}), 401)
    assert call("DELETE", "/admin/placement/pin", backend=backend).json() == {"pinned": False}
    assert backend.placed is None
