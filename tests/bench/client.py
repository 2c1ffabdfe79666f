"""A client that measures any server with an OpenAI-like /v1/completions: tokens per second, TTFT, ITL."""

from __future__ import annotations

import asyncio
import json
import random
import statistics
import time
from dataclasses import dataclass

import httpx


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


async def _one(client: httpx.AsyncClient, model: str, prompt: list[int], output_tokens: int) -> _Answer:
    body = {
        "model": model,
        "prompt": prompt,
        "max_tokens": output_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    begin = last = time.perf_counter()
    answer = _Answer(tokens=0, ttft_s=0.0, gaps_s=[])
    async with client.stream("POST", "/v1/completions", json=body) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
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


async def _run(url: str, model: str, concurrency: int, prompt_tokens: int, output_tokens: int, vocab: int) -> Measured:
    rng = random.Random(concurrency)
    prompts = [[rng.randrange(10, vocab) for _ in range(prompt_tokens)] for _ in range(4 * concurrency)]
    slots = asyncio.Semaphore(concurrency)
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=httpx.Limits(max_connections=None)) as client:

        async def take(prompt: list[int]) -> _Answer:
            async with slots:
                return await _one(client, model, prompt, output_tokens)

        await _one(client, model, prompts[0][::-1], 4)
        begin = time.perf_counter()
        answers = await asyncio.gather(*(take(prompt) for prompt in prompts))
        elapsed = time.perf_counter() - begin
    gaps = sorted(gap for answer in answers for gap in answer.gaps_s)
    return Measured(
        concurrency=concurrency,
        output_tokens_per_s=sum(a.tokens for a in answers) / elapsed,
        ttft_ms=statistics.median(a.ttft_s for a in answers) * 1e3,
        itl_ms=statistics.median(gaps) * 1e3,
        itl_p99_ms=gaps[int(len(gaps) * 0.99)] * 1e3,
    )


def measure(
    url: str, model: str, *, concurrency: int, prompt_tokens: int = 128, output_tokens: int = 64, vocab: int = 8000
) -> Measured:
    """Four random prompts per slot, greedy, no end of sequence. Blocks until all are answered."""
    return asyncio.run(_run(url, model, concurrency, prompt_tokens, output_tokens, vocab))
