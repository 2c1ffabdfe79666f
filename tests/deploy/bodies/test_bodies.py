"""Large requests go to another process, are bounded together, and hurt nobody when that process dies."""

from __future__ import annotations

import asyncio
import io
import json
import os
import pickle
import signal
from array import array
from collections.abc import AsyncGenerator, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from elastic_moe.actors import stillness
from elastic_moe.cluster.errors import RequestError
from elastic_moe.deploy.bodies import aside, bodies
from elastic_moe.deploy.bodies.aside import Aside
from elastic_moe.deploy.bodies.schema import CompletionRequest
from elastic_moe.deploy.text import texts
from tests.deploy.conftest import client_of
from tests.deploy.fakes import FakeBackend, make_tokenizer

Call = Callable[..., httpx.Response]
LARGE = [66] * bodies.LARGE_BYTES


@pytest.fixture
def other() -> Iterator[Aside]:
    process = Aside()
    yield process
    process.close()


def test_large_bodies_are_not_decoded_here(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    def decode(body: bytes) -> Any:
        assert len(body) < bodies.LARGE_BYTES
        return json.loads(body)

    monkeypatch.setattr(bodies.json_text, "decode", decode)
    backend = FakeBackend(max_model_len=200_000)
    answer = call("POST", "/v1/completions", json={"prompt": LARGE, "max_tokens": 2}, backend=backend)
    assert answer.json()["usage"]["prompt_tokens"] == len(LARGE)
    assert backend.requests[0].prompt_token_ids == tuple(LARGE)
    chat = {"messages": [{"role": "user", "content": "a b " * 30_000}], "max_tokens": 2}
    assert call("POST", "/v1/chat/completions", json=chat, backend=backend).status_code == 200
    wrong = call("POST", "/v1/completions", json={"prompt": [*LARGE, "a"]}).json()["error"]
    assert (wrong["param"], wrong["code"]) == (f"prompt.{len(LARGE)}", "invalid_value")
    wrong = call("POST", "/v1/completions", content=b" " * 100_000 + b"{").json()["error"]
    assert wrong["code"] == "invalid_json"
    placement = call("PUT", "/admin/placement", content=b"[" + b" " * 100_000 + b"]")
    assert "JSON object" in placement.json()["error"]["message"]


@pytest.mark.parametrize(
    ("method", "path", "body", "key"),
    [
        ("POST", "/v1/completions", '{"prompt": "a", "max_tokens": 1, "max_tokens": 2}', "max_tokens"),
        ("POST", "/admin/scale", '{"workers": 1, "retire": [], "workers": 2}', "workers"),
        ("PUT", "/admin/placement", '{"workers": [{"id": "w0", "id": "w1"}]}', "id"),
        ("POST", "/v1/completions", '{"prompt": "' + "a" * bodies.LARGE_BYTES + '", "n": 1, "n": 1}', "n"),
    ],
)
def test_equal_keys_are_refused(call: Call, method: str, path: str, body: str, key: str) -> None:
    answer = call(method, path, content=body.encode(), headers={"content-type": "application/json"})
    error = answer.json()["error"]
    assert (answer.status_code, error["param"], error["code"]) == (400, key, "invalid_json")
    assert error["message"] == f"the key '{key}' is there 2 times in one object"
    assert error["type"] == "invalid_request_error"


def test_long_texts_are_not_tokenised_here(
    call: Call, model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "hello 日本 " * 20_000
    tokens = make_tokenizer(tmp_path).encode(text).ids
    for name in ("encode", "decode"):
        monkeypatch.setattr(texts.Tokenizer, name, None)
    body = call("POST", "/tokenize", json={"prompt": text, "return_token_strs": True}).json()
    assert body["tokens"] == tokens
    assert (body["count"], len(body["token_strs"])) == (len(tokens), len(tokens))
    assert call("POST", "/detokenize", json={"tokens": tokens}).json() == {"prompt": text}
    too_many = call("POST", "/detokenize", json={"tokens": [1] * 300_000}).json()["error"]
    assert too_many["param"] == "tokens"


def test_a_process_that_dies_is_replaced_and_the_call_repeated_once(other: Aside) -> None:
    async def work() -> None:
        body = bytearray(b'{"prompt": "a"}')
        assert (await other.parse(CompletionRequest, body)).prompts == ["a"]
        killed = set()

        async def kill(times: int) -> None:
            while len(killed) < times:
                process = other._large.process
                if process is not None and process.pid not in killed:
                    killed.add(process.pid)
                    os.kill(process.pid, signal.SIGKILL)
                await asyncio.sleep(0.001)

        for times, refused in ((1, False), (3, True)):
            killing = asyncio.create_task(kill(times))
            await asyncio.sleep(0.01)
            if refused:
                with pytest.raises(RequestError, match="too much memory or time"):
                    await other.parse(CompletionRequest, body)
            else:
                assert (await other.parse(CompletionRequest, body)).prompts == ["a"]
            await killing
        assert (await other.parse(CompletionRequest, body)).prompts == ["a"]

    asyncio.run(work())


def test_a_process_that_is_stopped_is_replaced_and_the_call_repeated(
    other: Aside, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stillness, "STOPPED_S", 0.5)

    async def work() -> None:
        body = bytearray(b'{"prompt": "a"}')
        await other.parse(None, body)
        stopped = other._large.process
        assert stopped is not None
        os.kill(stopped.pid, signal.SIGSTOP)
        async with asyncio.timeout(60):
            assert (await other.parse(CompletionRequest, body)).prompts == ["a"]
        assert stopped.returncode == -signal.SIGKILL

    asyncio.run(work())


def test_a_call_has_a_limit_of_time(other: Aside, monkeypatch: pytest.MonkeyPatch) -> None:
    async def work() -> None:
        await other.parse(None, bytearray(b"{}"))
        monkeypatch.setattr(aside, "CALL_S", 0.05)
        with pytest.raises(RequestError, match="too much memory or time"):
            await other.parse(None, bytearray(b"[" + b"[1.5, 2.5]," * 3_000_000 + b"0]"))

    asyncio.run(work())


def test_a_process_that_has_grown_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    """It answers first; what else was to be asked is left for the next one."""
    used = iter([0, aside.GROWTH_BYTES, 2 * aside.GROWTH_BYTES])
    monkeypatch.setattr(aside, "_used_bytes", lambda: next(used))
    calls, answers = io.BytesIO(), io.BytesIO()
    for body in (b"[]", b"nonsense", b"[]"):
        aside._write(calls, ("parse", None, bytearray(body)))
    calls.seek(0)
    aside.serve(calls, answers)
    answers.seek(0)
    assert aside._read(answers) == ([], None, False)
    value, error, last = aside._read(answers)
    assert (value, type(error), last) == (None, RequestError, True)
    assert aside._read(answers) is None


class _Pipe(io.BytesIO):
    """Notes how much is read at once."""

    most = 0

    def read(self, size: int | None = -1) -> bytes:
        assert size is not None
        assert size >= 0
        self.most = max(self.most, size)
        return super().read(size)


def test_token_ids_are_read_piece_by_piece() -> None:
    """A copy of millions at once holds Python's lock, and so every stream, for tens of milliseconds."""
    pipe = _Pipe()
    ids = array("i", range(500_000))
    aside._write(pipe, (pickle.PickleBuffer(ids), None, False))
    aside._write(pipe, ("next", None, True))
    pipe.seek(0)
    assert aside._read(pipe) == (ids, None, False)
    assert pipe.most <= aside.PIECE_BYTES
    assert aside._read(pipe) == ("next", None, True)


def test_a_process_that_dies_in_the_middle_of_token_ids() -> None:
    pipe = _Pipe()
    aside._write(pipe, pickle.PickleBuffer(array("i", range(100))))
    pipe.truncate(len(pipe.getvalue()) - 4)
    pipe.seek(0)
    with pytest.raises(EOFError):
        aside._read(pipe)


def test_bodies_under_way_are_bounded_together(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that stops half-way keeps what it has sent; small ones are never refused for it."""
    monkeypatch.setattr(bodies, "UNDER_WAY_BYTES", 300_000)
    half, end = b'{"prompt": "a"' + b" " * 200_000, b', "max_tokens": 1}'
    goes_on = asyncio.Event()

    async def slow() -> AsyncGenerator[bytes, None]:
        yield half
        await goes_on.wait()
        yield end

    async def work() -> None:
        json_type = {"content-type": "application/json"}
        async with client_of(FakeBackend(), model_dir) as http:
            first = asyncio.create_task(http.post("/v1/completions", content=slow(), headers=json_type))
            await asyncio.sleep(0.05)
            second = await http.post("/v1/completions", content=half + end, headers=json_type)
            assert second.status_code == 503
            assert second.headers["retry-after"]
            assert (await http.post("/v1/completions", json={"prompt": "a", "max_tokens": 1})).status_code == 200
            goes_on.set()
            assert (await first).status_code == 200
            assert (await http.post("/v1/completions", content=half + end, headers=json_type)).status_code == 200

    asyncio.run(work())
