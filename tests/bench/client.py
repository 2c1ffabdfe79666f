"""A client that measures any server with an OpenAI-like /v1/completions: tokens per second, TTFT, ITL, prefill.

It shares the cores with the server that it measures, so it takes as little of them as it can: events get their time
when their bytes come, and are read when all answers are there.
"""

from __future__ import annotations

import asyncio
import json
import random
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import httptools

PROMPT_TOKENS = 128
OUTPUT_TOKENS = 64
LONG_PROMPT_TOKENS = 1024
PER_SLOT = 4
"""Requests that one slot of the client sends, one after the other."""
LIKELIEST = 5
"""Tokens whose log probabilities are asked for: as many as every server tells."""
TIMEOUT_S = 600.0
_FIRST_TOKEN = 10
"""Smaller ids are special in some tokenizers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """One server at one concurrency."""

    concurrency: int
    output_tokens_per_s: float
    ttft_ms: float
    """Median time to the first token."""
    itl_ms: float
    """Median time between tokens."""
    itl_p99_ms: float


@dataclass(slots=True)
class _Answer:
    tokens: int
    ttft_s: float
    gaps_s: list[float]
    text: str = ""
    logprobs: dict[str, float] = field(default_factory=dict)
    """Of the first token."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FirstToken:
    """The first token of an answer."""

    text: str
    logprobs: Mapping[str, float]
    """Of the likeliest tokens, by their texts; empty where the server tells none."""


class Client:
    """Requests of random tokens, greedy, never ended by a token. Every method blocks until all are answered."""

    def __init__(
        self, url: str, model: str, *, vocab: int, seed: int, extra: Mapping[str, object] | None = None
    ) -> None:
        """Equal seeds and calls send equal prompts; no prompt is sent twice, so that no prefix cache helps. `extra` are
        further fields of every request."""
        self._extra = dict(extra or {})
        parts = urlsplit(url)
        self._host, self._port = parts.hostname or "127.0.0.1", parts.port or 80
        self._model = model
        self._vocab = vocab
        self._rng = random.Random(seed)

    def measure(self, concurrency: int, *, per_slot: int = PER_SLOT) -> Measured:
        """`per_slot` requests of PROMPT_TOKENS for each of `concurrency` slots, OUTPUT_TOKENS each."""
        prompts = self._prompts(per_slot * concurrency, PROMPT_TOKENS)
        answers, elapsed = asyncio.run(self._run(prompts, OUTPUT_TOKENS, concurrency))
        gaps = sorted(gap for answer in answers for gap in answer.gaps_s)
        return Measured(
            concurrency=concurrency,
            output_tokens_per_s=sum(a.tokens for a in answers) / elapsed,
            ttft_ms=statistics.median(a.ttft_s for a in answers) * 1e3,
            itl_ms=statistics.median(gaps) * 1e3,
            itl_p99_ms=gaps[int(len(gaps) * 0.99)] * 1e3,
        )

    def prefill_tokens_per_s(self, *, requests: int = 12, concurrency: int = 4) -> float:
        """Prompt tokens per second over requests of LONG_PROMPT_TOKENS that want one token each."""
        prompts = self._prompts(requests, LONG_PROMPT_TOKENS)
        _, elapsed = asyncio.run(self._run(prompts, 1, concurrency))
        return requests * LONG_PROMPT_TOKENS / elapsed

    def lone_ttft_ms(self, requests: int = 10) -> float:
        """Mean time to the first token of requests that are alone with the server."""
        answers, _ = asyncio.run(self._run(self._prompts(requests, PROMPT_TOKENS), 1, 1))
        return statistics.mean(a.ttft_s for a in answers) * 1e3

    def warm_up(self) -> None:
        asyncio.run(self._run(self._prompts(4, PROMPT_TOKENS), 4, 2))

    def first_tokens(self, prompts: Sequence[list[int]]) -> list[FirstToken]:
        """What comes first after each prompt."""
        answers, _ = asyncio.run(self._run(prompts, 1, 4, logprobs=LIKELIEST))
        return [FirstToken(text=answer.text, logprobs=answer.logprobs) for answer in answers]

    def _prompts(self, count: int, length: int) -> list[list[int]]:
        return [[self._rng.randrange(_FIRST_TOKEN, self._vocab) for _ in range(length)] for _ in range(count)]

    async def _run(
        self, prompts: Sequence[list[int]], output_tokens: int, concurrency: int, **more: object
    ) -> tuple[list[_Answer], float]:
        """Answers, and the seconds from the first request to the last answer's end."""
        slots = asyncio.Semaphore(concurrency)

        async def take(prompt: list[int]) -> _Exchange:
            async with slots:
                return await self._ask(prompt, output_tokens, more)

        begin = time.perf_counter()
        exchanges = await asyncio.gather(*(take(prompt) for prompt in prompts))
        elapsed = time.perf_counter() - begin
        return [_answer(exchange, output_tokens) for exchange in exchanges], elapsed

    async def _ask(self, prompt: list[int], output_tokens: int, more: Mapping[str, object]) -> _Exchange:
        body = {
            "model": self._model,
            "prompt": prompt,
            "max_tokens": output_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
            **self._extra,
            **more,
        }
        exchange = _Exchange(f"{self._host}:{self._port}", json.dumps(body).encode())
        # a connection for each request: llama.cpp's server closes those that it has answered on, now and then
        loop = asyncio.get_running_loop()
        transport, _ = await loop.create_connection(lambda: exchange, self._host, self._port)
        try:
            async with asyncio.timeout(TIMEOUT_S):
                await exchange.ended
        finally:
            transport.close()
        return exchange


class _Exchange(asyncio.Protocol):
    """One request on a connection of its own, and the lines of its response with the times at which they came."""

    def __init__(self, host: str, body: bytes) -> None:
        head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
        self._request = f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body
        self._parser = httptools.HttpResponseParser(self)
        self._rest = b""
        self._now = 0.0
        self.begun = time.perf_counter()
        self.lines: list[tuple[float, bytes]] = []
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        self._now = time.perf_counter()
        self._parser.feed_data(data)

    def on_body(self, body: bytes) -> None:
        *lines, self._rest = (self._rest + body).split(b"\n")
        self.lines += [(self._now, line) for line in lines if line]

    def on_message_complete(self) -> None:
        status = self._parser.get_status_code()
        if status == 200:
            self._end(None)
        else:
            text = b"".join([*(line for _, line in self.lines), self._rest])
            self._end(RuntimeError(f"status {status}: {text.decode(errors='replace')[:500]}"))

    def connection_lost(self, error: Exception | None) -> None:
        self._end(error or ConnectionError("the server hung up before the end of its response"))

    def _end(self, error: Exception | None) -> None:
        if self.ended.done():
            return
        if error is None:
            self.ended.set_result(None)
        else:
            self.ended.set_exception(error)


def _answer(exchange: _Exchange, output_tokens: int) -> _Answer:
    last = exchange.begun
    answer = _Answer(tokens=0, ttft_s=0.0, gaps_s=[])
    for came, line in exchange.lines:
        if not line.startswith(b"data: {"):
            continue
        event = json.loads(line[6:])
        if event.get("usage"):
            answer.tokens = event["usage"]["completion_tokens"]
        if event.get("choices"):
            if answer.ttft_s == 0.0:
                answer.ttft_s = came - last
            else:
                answer.gaps_s.append(came - last)
            last = came
            answer.text += event["choices"][0].get("text") or ""
            answer.logprobs = answer.logprobs or _likeliest(event["choices"][0].get("logprobs"))
    if answer.tokens != output_tokens:
        raise RuntimeError(f"{answer.tokens} tokens came, {output_tokens} were asked for")
    return answer


def _likeliest(logprobs: Any) -> dict[str, float]:
    """The log probabilities of a choice's first token by text, in the form of completions or in that of chats."""
    if not logprobs:
        return {}
    if first := next(iter(logprobs.get("top_logprobs") or ()), None):
        return dict(first)
    content = next(iter(logprobs.get("content") or ()), {})
    return {one["token"]: one["logprob"] for one in content.get("top_logprobs") or ()}
