"""POST /v1/completions."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from cluster.errors import RequestError
from deploy.bounds import MAX_PROMPTS, TokenIds
from deploy.generation import Delta, ScoredToken
from deploy.http_io import client_name
from deploy.responses import Run, ending, new_id, printable
from deploy.sampling import sampling_params
from deploy.schema import CompletionRequest
from deploy.service import Prompt, Service
from deploy.tokenizer import Tokenizer

DEFAULT_MAX_TOKENS = 16
"""OpenAI's and vLLM's."""


def completions_router(service: Service) -> APIRouter:
    router = APIRouter()

    @router.post("/v1/completions")
    async def create(request: Request) -> Response:
        body = await service.bodies.read(request, CompletionRequest)
        service.check_model(body.model)
        await service.check_ready()
        client = client_name(request)
        service.check_room(client, body, len(body.prompts))
        prompts = await _prompts(service, body)
        response_id = new_id("cmpl")
        answers = await service.answers(body, prompts, response_id=response_id, client=client)
        echoes = [prompt.text for prompt in prompts for _ in range(body.num_choices)]
        shape = CompletionShape(service.tokenizer, echoes if body.echo else None, body.logprobs)
        return await Run(service, body, shape, answers, response_id).respond(request)

    return router


async def _prompts(service: Service, body: CompletionRequest) -> list[Prompt]:
    """Raises RequestError where a prompt is empty, too long, or has tokens that the model does not know."""
    if body.echo and body.logprobs is not None:
        raise RequestError("echo: not supported together with logprobs", param="echo", code="unsupported_value")
    given = body.prompts
    if not 1 <= len(given) <= MAX_PROMPTS:
        raise RequestError(f"prompt: expected 1 to {MAX_PROMPTS} prompts, got {len(given)}", param="prompt")
    limits = await service.limits()
    prompts: list[Prompt] = []
    for prompt in given:
        # other requests get their turn between two prompts
        await asyncio.sleep(0)
        token_ids: TokenIds
        if isinstance(prompt, str):
            special = body.add_special_tokens is not False
            token_ids = await service.encode(prompt, add_special_tokens=special, param="prompt")
        else:
            token_ids = prompt
        if body.truncate_prompt_tokens is not None:
            token_ids = token_ids[-body.truncate_prompt_tokens :]
        params = sampling_params(
            body,
            defaults=service.defaults,
            limits=limits,
            prompt_tokens=len(token_ids),
            logprobs=body.logprobs,
            fallback_max_tokens=DEFAULT_MAX_TOKENS,
        )
        text = await _echo(service, body, prompt)
        prompts.append(Prompt(token_ids=token_ids, params=params, param="prompt", text=text))
    return prompts


async def _echo(service: Service, body: CompletionRequest, prompt: str | TokenIds) -> str:
    if not body.echo:
        return ""
    return prompt if isinstance(prompt, str) else await service.decode([t for t in prompt if t >= 0])


class CompletionShape:
    kind = chunk_kind = "text_completion"

    def __init__(self, tokenizer: Tokenizer, echoes: Sequence[str] | None, logprobs: int | None) -> None:
        self._tokenizer = tokenizer
        self._echoes = echoes
        self._logprobs = logprobs

    def choice(self, answer: Delta) -> dict[str, Any]:
        echo = self._echoes[answer.index] if self._echoes else ""
        return self._choice(answer, echo + answer.text)

    def opening(self, index: int) -> dict[str, Any] | None:
        if not self._echoes:
            return None
        return self._choice(Delta(index=index, text=""), self._echoes[index])

    def chunk(self, delta: Delta) -> dict[str, Any]:
        return self._choice(delta, delta.text)

    def _choice(self, delta: Delta, text: str) -> dict[str, Any]:
        logprobs = None if self._logprobs is None else self._scored(delta.tokens)
        return {"index": delta.index, "text": text, "logprobs": logprobs, **ending(delta)}

    def _scored(self, tokens: Sequence[ScoredToken]) -> dict[str, Any]:
        name = self._name
        return {
            "tokens": [name(token.logprobs.token_id) for token in tokens],
            "token_logprobs": [token.logprobs.logprob for token in tokens],
            "top_logprobs": [{name(token_id): p for token_id, p in _alternatives(token)} for token in tokens],
            "text_offset": [token.text_offset for token in tokens],
        }

    def _name(self, token_id: int) -> str:
        return printable(self._tokenizer.token_bytes, token_id)


def _alternatives(token: ScoredToken) -> list[tuple[int, float]]:
    """The most likely tokens, and the chosen one though it may not be among them."""
    chosen = (token.logprobs.token_id, token.logprobs.logprob)
    return [*token.logprobs.top, *([] if chosen[0] in dict(token.logprobs.top) else [chosen])]
