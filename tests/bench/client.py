"""A client that measures any server with an OpenAI-like /v1/completions: tokens per second, TTFT, ITL, prefill."""

from __future__ import annotations

import asyncio
import json
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import aiohttp

PROMPT_TOKENS = 128
OUTPUT_TOKENS = 64
LONG_PROMPT_TOKENS = 1024
PER_SLOT = 4
"""Requests that one slot of the client sends, one after the other."""
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


class Client:
    """Requests of random tokens, greedy, never ended by a token. Every method blocks until all are answered."""

    def __init__(self, url: str, model: str, *, vocab: int, seed: int) -> None:
        """Equal seeds and calls send equal prompts; no prompt is sent twice, so that no prefix cache helps."""
        self._url = url
        self._model = model
        self._vocab = vocab
        self._rng = random.Random(seed)

    def measure(self, concurrency: int) -> Measured:
        """PER_SLOT requests of PROMPT_TOKENS for each of `concurrency` slots, OUTPUT_TOKENS each."""
        prompts = self._prompts(PER_SLOT * concurrency, PROMPT_TOKENS)
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

    def _prompts(self, count: int, length: int) -> list[list[int]]:
        return [[self._rng.randrange(_FIRST_TOKEN, self._vocab) for _ in range(length)] for _ in range(count)]

    async def _run(
        self, prompts: Sequence[list[int]], output_tokens: int, concurrency: int
    ) -> tuple[list[_Answer], float]:
        """Answers, and the seconds from the first request to the last answer's end."""
        slots = asyncio.Semaphore(concurrency)
        # a connection for each request: llama.cpp's server closes those that it has answered on, now and then
        connector = aiohttp.TCPConnector(limit=0, force_close=True)
        timeout = aiohttp.ClientTimeout(total=600)
        # aiohttp, as in vLLM's client: httpx takes 100 us of a core for an event, and this 28
        async with aiohttp.ClientSession(self._url, connector=connector, timeout=timeout) as client:

            async def take(prompt: list[int]) -> _Answer:
                async with slots:
                    return await self._one(client, prompt, output_tokens)

            begin = time.perf_counter()
            answers = await asyncio.gather(*(take(prompt) for prompt in prompts))
            return list(answers), time.perf_counter() - begin

    async def _one(self, client: aiohttp.ClientSession, prompt: list[int], output_tokens: int) -> _Answer:
        body = {
            "model": self._model,
            "prompt": prompt,
            "max_tokens": output_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        begin = last = time.perf_counter()
        answer = _Answer(tokens=0, ttft_s=0.0, gaps_s=[])
        async with client.post("/v1/completions", json=body) as response:
            response.raise_for_status()
            async for line in response.content:
                if not line.startswith(b"data: {"):
                    continue
                event = json.loads(line[6:])
                if event.get("usage"):
                    answer.tokens = event["usage"]["completion_tokens"]
                if event.get("choices"):
                    now = time.perf_counter()
                    if answer.ttft_s == 0.0:
                        answer.ttft_s = now - begin
                    else:
                        answer.gaps_s.append(now - last)
                    last = now
        if answer.tokens != output_tokens:
            raise RuntimeError(f"{answer.tokens} tokens came, {output_tokens} were asked for")
        return answer
