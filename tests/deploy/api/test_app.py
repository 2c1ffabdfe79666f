"""Every route over a fake backend: errors, state, models, tokens, keys."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import httpx
import pytest

from elastic_moe.cluster.config import ServeConfig
from elastic_moe.cluster.errors import NotReadyError, RequestError
from elastic_moe.cluster.messages.requests import GenerateRequest, TokenOutput
from elastic_moe.cluster.messages.views import Readiness
from elastic_moe.deploy.api import http_io
from elastic_moe.deploy.api.app import create_app
from elastic_moe.deploy.api.http_io import WELL_KNOWN
from elastic_moe.deploy.api.service import Service
from tests.deploy.api.asking import CHAT, COMPLETION, Call, error, events
from tests.deploy.conftest import client_of
from tests.deploy.fakes import FakeBackend

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
    told = error(call("POST", "/v1/completions", data={"prompt": "a"}), 415)
    assert told["message"].endswith("; with curl, add -H 'Content-Type: application/json'")
    assert told["code"] == "unsupported_media_type"
    told = error(call("POST", "/v1/completions", content=b"a", headers={"content-type": "text/csv"}), 415)
    assert told["message"] == "Content-Type: expected application/json, got text/csv"
    long = b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}"
    told = error(call("POST", "/v1/completions", content=long, headers={"content-type": "application/json"}), 400)
    assert told["message"] == "the body is no JSON: a number has more than 4300 digits"


def test_unknown_routes_and_methods(call: Call) -> None:
    assert error(call("GET", "/v2/nothing"), 404)["code"] == "not_found"
    for path, says in (
        ("/chat/completions", "no such route: /chat/completions (did you mean /v1/chat/completions?); /docs lists all"),
        ("/v1/v1/completions", "(did you mean /v1/completions?)"),
        ("/v1/embeddings", "no such route: /v1/embeddings; this server only generates text; /docs"),
        ("/admin/worker", "(did you mean /admin/workers?)"),
        ("/zzz%0a%1b[2Jx", "no such route: /zzz x; /docs lists all"),
    ):
        assert says in error(call("POST", path, json={}), 404)["message"]
    assert set(WELL_KNOWN) <= call("GET", "/openapi.json").json()["paths"].keys()
    response = call("GET", "/v1/completions")
    told = error(response, 405)
    assert (told["code"], told["message"]) == ("method_not_allowed", "this route takes POST, not GET")
    assert "POST" in response.headers["allow"]
    for path, method, words in (
        (
            "/admin/config",
            "PUT",
            "takes GET, not PUT; POST /admin/scale changes the number of workers, POST /admin/eng",
        ),
        ("/admin/workers", "DELETE", "takes GET, not DELETE; POST /admin/scale changes their number"),
        ("/admin/placement", "POST", "this route takes GET and PUT, not POST"),
    ):
        assert words in error(call(method, path), 405)["message"]


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
