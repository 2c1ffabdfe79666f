"""The shortcut of streamed tokens: the same bytes as the long way, whatever a client asks for, and however it reads."""

from __future__ import annotations

import asyncio
import json
import random
import re
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from elastic_moe.actors.remote.ask import Remote
from elastic_moe.cluster.config import ServeConfig
from elastic_moe.cluster.messages.columns import column_of
from elastic_moe.cluster.messages.requests import FinishReason, RequestId, TokenOutput, Tokens
from elastic_moe.deploy.api.app import create_app
from elastic_moe.deploy.api.service import Service
from elastic_moe.deploy.backend.groups import Groups
from elastic_moe.deploy.backend.ray_backend import RayBackend
from elastic_moe.deploy.web.direct import CONNECTION
from tests.deploy.backend.standins import ENGINES, Coordinator, Engine, until
from tests.deploy.fakes import make_tokenizer

TURNS = 40
TEXT = "<think>hm, so</think>the quick naïve façade 😀 日本語 stop here, hello again"


class Writer(Engine):
    """Writes one text. Tokens between the first and the last of an answer travel in columns, as a real engine's do."""

    tokens: tuple[int, ...] = ()

    async def _work(self) -> None:
        while True:
            # until what was made before has been written, so that every token is an event of its own
            for _ in range(TURNS):
                await asyncio.sleep(0)
            outputs: list[TokenOutput] = []
            columns: list[tuple[RequestId, int]] = []
            for request, made in list(self.running.values()):
                name, whole = request.request_id, min(len(self.tokens), request.params.max_tokens)
                self.running[name] = (request, made + 1)
                if 0 < made < whole - 1:
                    columns.append((name, made))
                    continue
                end = FinishReason.LENGTH if made == whole - 1 else None
                outputs.append(
                    TokenOutput(request_id=name, offset=made, token_ids=(self.tokens[made],), finish_reason=end)
                )
                if end:
                    del self.running[name]
            names, places = tuple(name for name, _ in columns), [made for _, made in columns]
            ids = column_of([self.tokens[made] for made in places])
            self.clients.deliver(outputs, Tokens(request_ids=names, offsets=column_of(places), token_ids=ids))


@dataclass(slots=True, weakref_slot=True)
class Client:
    """Reads a response, and has a connection that takes parts of it directly, as `free` says."""

    free: Callable[[], bool]
    loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.get_running_loop)
    body: list[bytes] = field(default_factory=list)
    direct: int = 0
    gone: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def takes_more(self) -> bool:
        return self.free()

    def write(self, body: bytes) -> None:
        self.direct += 1
        self.body.append(body)

    async def post(self, app: Any, path: str, data: dict[str, Any]) -> bytes:
        asked = iter([{"type": "http.request", "body": json.dumps(data).encode(), "more_body": False}])

        async def receive() -> dict[str, Any]:
            message = next(asked, None)
            if message is None:
                await self.gone.wait()
            return message or {"type": "http.disconnect"}

        async def send(message: dict[str, Any]) -> None:
            await asyncio.sleep(0)
            self.body.append(message.get("body", b""))

        headers = [(b"host", b"localhost"), (b"content-type", b"application/json")]
        scope = {"type": "http", "method": "POST", "path": path, "headers": headers, "query_string": b""}
        scope |= {"client": ("127.0.0.1", 1), "scheme": "http", "http_version": "1.1", CONNECTION: weakref.ref(self)}
        await app(scope, receive, send)
        # what differs between two requests of the same kind
        return re.sub(rb'"(id|created)":("[^"]*"|\d+)', rb'"\1":0', b"".join(self.body))


CHAT = {"messages": [{"role": "user", "content": "hi"}]}
ASKED: dict[str, tuple[str, dict[str, Any]]] = {
    "text": ("/v1/completions", {"prompt": "the"}),
    "echo and usage": ("/v1/completions", {"prompt": "the", "echo": True, "stream_options": {"include_usage": True}}),
    "usage in every event": (
        "/v1/completions",
        {"prompt": "the", "stream_options": {"include_usage": True, "continuous_usage_stats": True}},
    ),
    "stop": ("/v1/completions", {"prompt": "the", "stop": ["stop", "zzz"]}),
    "token ids": ("/v1/completions", {"prompt": "the", "return_token_ids": True}),
    "chat": ("/v1/chat/completions", CHAT),
    "reasoning": ("/v1/chat/completions", {**CHAT, "stop": "again"}),
    "two answers": ("/v1/completions", {"prompt": ["the", "quick"]}),
}


async def answers(
    model_dir: Path, name: str, frees: list[Callable[[], bool]], interval: int = 1
) -> tuple[list[bytes], list[int], str]:
    """What clients read, one after the other, with the number of direct parts, and the metrics afterwards."""
    path, body = ASKED[name]
    engine = Writer()
    coordinator = Coordinator(engine)

    def group(number: int, lost: Callable[[], None]) -> RayBackend:
        return RayBackend(Remote(coordinator), recovery_timeout_s=600, number=number, lost=lost)

    backend = Groups(1, group)
    parser = "qwen3" if name == "reasoning" else None
    service = Service(ServeConfig(reasoning_parser=parser, stream_interval=interval), backend, str(model_dir))
    await service.begin()
    engine.tokens = tuple(service.texts.tokenizer.encode(TEXT))
    backend.begin()
    app = create_app(service)
    try:
        await until(lambda: backend.group(0).engine.current is not None and backend.can_wait)
        clients = [Client(free) for free in frees]
        read = [await client.post(app, path, {**body, "max_tokens": 100, "stream": True}) for client in clients]
        return read, [client.direct for client in clients], (await service.metrics.scrape(backend)).decode()
    finally:
        await backend.end()
        service.close()
        while ENGINES:
            ENGINES.pop().end()


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models") / "tiny-moe"
    make_tokenizer(directory)
    return directory


@pytest.mark.parametrize("name", ASKED)
def test_the_bytes_are_those_of_the_long_way(model_dir: Path, name: str) -> None:
    draw = random.Random(name)
    frees = [lambda: False, lambda: True, lambda: draw.random() < 0.5]
    read, direct, metrics = asyncio.run(answers(model_dir, name, frees))
    assert b"quick" in read[0].replace(b'"', b"") or len(read[0]) > 1000
    assert read[0].endswith(b"data: [DONE]\n\n")
    assert read[1] == read[0]
    # tokens that wait for a slow reader leave together, so that there are fewer events
    assert text_of(read[2]) == text_of(read[0])
    assert direct[0] == 0
    # two answers at a time take turns in a queue
    assert direct[1] == 0 if name == "two answers" else direct[1] > 15
    tokens = re.findall(r"vllm:generation_tokens_total{[^}]*} ([\d.]+)", metrics)
    intervals = re.findall(r"vllm:inter_token_latency_seconds_count{[^}]*} ([\d.]+)", metrics)
    answers_made = 2 * len(frees) if name == "two answers" else len(frees)
    assert float(tokens[0]) - float(intervals[0]) == answers_made
    assert float(tokens[0]) % len(frees) == 0
    reasons = re.findall(r'vllm:request_success_total{[^}]*finished_reason="(\w+)"[^}]*} ([1-9])', metrics)
    assert reasons == [("stop" if "stop" in ASKED[name][1] else "length", str(answers_made))]


@pytest.mark.parametrize("name", ["text", "stop", "token ids", "reasoning"])
def test_a_part_of_a_stream_has_as_many_tokens_as_asked_for(model_dir: Path, name: str) -> None:
    frees = [lambda: False, lambda: True]
    singly, _, _ = asyncio.run(answers(model_dir, name, frees[:1]))
    read, direct, metrics = asyncio.run(answers(model_dir, name, frees, interval=4))
    assert read[1] == read[0]
    assert direct[1] > 4
    assert text_of(read[0]) == text_of(singly[0])
    tokens = re.findall(r"vllm:generation_tokens_total{[^}]*} ([\d.]+)", metrics)
    made = float(tokens[0]) / len(frees)
    # an opening, the first token alone, then four each, and the end at once
    assert read[0].count(b"data: {") <= 3 + made / 4
    if name == "token ids":
        parts = [json.loads(line[6:])["choices"][0]["token_ids"] for line in read[0].decode().split("\n\n")[:-2]]
        assert [len(part) for part in parts if part][:3] == [1, 4, 4]
        assert sum(map(len, filter(None, parts))) == made


def text_of(body: bytes) -> dict[tuple[int, str], str]:
    """The whole of each field of text, by the index of its choice."""
    whole: dict[tuple[int, str], str] = {}
    for line in body.decode().split("\n\n"):
        if not line.startswith("data: {"):
            continue
        for choice in json.loads(line[6:]).get("choices", ()):
            for name, value in {**choice, **choice.get("delta", {})}.items():
                if isinstance(value, str):
                    key = (choice["index"], name)
                    whole[key] = whole.get(key, "") + value
    return whole
