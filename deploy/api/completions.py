"""POST /v1/completions: from the request to its prompts, and from deltas to choices."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from elastic_moe.cluster.errors import RequestError
from elastic_moe.cluster.messages.requests import TokenLogprobs
from elastic_moe.deploy.api.http_io import client_name
from elastic_moe.deploy.api.responses import Run, ending, new_id, shown_id
from elastic_moe.deploy.api.sampling import sampling_params, truncated
from elastic_moe.deploy.api.service import Prompt, Service
from elastic_moe.deploy.bodies.bounds import MAX_PROMPTS, TokenIds
from elastic_moe.deploy.bodies.schema import CompletionRequest, SamplingFields
from elastic_moe.deploy.generation.answer import Delta, ScoredToken
from elastic_moe.deploy.generation.prompt_logprobs import Scored, check_scores
from elastic_moe.deploy.text.tokenizer import Tokenizer, id_name
from elastic_moe.deploy.web.openapi import described, streamable_answer

ANSWER = streamable_answer("The answers.", "id", "object", "created", "model", "choices", "usage")
DEFAULT_MAX_TOKENS = 16
"""Tokens of an answer where the request sets no limit; OpenAI and vLLM have the same."""


def completions_router(service: Service) -> APIRouter:
    router = APIRouter()

    @router.post("/v1/completions", **described(body=CompletionRequest, answers={200: ANSWER}, errors=(404,)))
    async def create(request: Request) -> Response:
        body = await service.bodies.read(request, CompletionRequest)
        service.check_model(body.model)
        await service.accept(request)
        client = client_name(request)
        service.check_room(client, body, len(body.prompts))
        prompts = await _prompts(service, body)
        response_id = new_id("cmpl")
        answers = await service.answers(body, prompts, response_id=response_id, client=client)
        check_scores(body, [len(answer.request.prompt_token_ids) for answer in answers])
        echoes = [prompt.text for prompt in prompts for _ in range(body.num_choices)]
        shape = CompletionShape(
            token_names(service.texts.tokenizer, body),
            echoes if body.echo else None,
            body.logprobs,
            [answer.request.prompt_token_ids for answer in answers] if body.return_token_ids else None,
            scored=Scored(service.texts.tokenizer, answers, body) if body.scored_alternatives is not None else None,
        )
        run = Run(service, body, shape, answers, shown_id("cmpl", response_id, body.request_id))
        return await run.respond(request)

    return router


async def _prompts(service: Service, body: CompletionRequest) -> list[Prompt]:
    """Encode the prompts. Raises RequestError where one is empty, too long, or has tokens that the model lacks."""
    given = body.prompts
    if not 1 <= len(given) <= MAX_PROMPTS:
        raise RequestError(f"prompt: expected 1 to {MAX_PROMPTS} prompts, got {len(given)}", param="prompt")
    limits = await service.limits()
    bad_words = await service.texts.bad_words(body.bad_words)
    grammar = await service.grammar(body)
    prompts: list[Prompt] = []
    for prompt in given:
        # let other requests run between two prompts
        await asyncio.sleep(0)
        token_ids: TokenIds
        if isinstance(prompt, str):
            special = body.add_special_tokens is not False
            cut = body.truncate_prompt_tokens is not None
            token_ids = await service.encode(prompt, add_special_tokens=special, param="prompt", to_be_cut=cut)
        else:
            token_ids = prompt
        whole = len(token_ids)
        token_ids = truncated(
            token_ids, body, defaults=service.defaults, limits=limits, fallback_max_tokens=DEFAULT_MAX_TOKENS
        )
        params = sampling_params(
            body,
            defaults=service.defaults,
            limits=limits,
            prompt_tokens=len(token_ids),
            logprobs=body.logprobs,
            fallback_max_tokens=DEFAULT_MAX_TOKENS,
            bad_words=bad_words,
            grammar=grammar,
        )
        text = await _echo(service, body, prompt if len(token_ids) == whole else token_ids)
        prompts.append(Prompt(token_ids=token_ids, params=params, param="prompt", text=text))
    return prompts


async def _echo(service: Service, body: CompletionRequest, prompt: str | TokenIds) -> str:
    if not body.echo:
        return ""
    return prompt if isinstance(prompt, str) else await service.texts.decode([t for t in prompt if t >= 0])


class CompletionShape:
    kind = chunk_kind = "text_completion"

    def __init__(
        self,
        name: Callable[[int], str],
        echoes: Sequence[str] | None,
        logprobs: int | None,
        prompts: Sequence[Sequence[int]] | None = None,
        *,
        scored: Scored | None = None,
    ) -> None:
        """`name` gives a token's name. `echoes` and `prompts` have an entry for each answer where the client asks for
        them, and so has `scored`, for the prompts' log probabilities."""
        self._name = name
        self._echoes = echoes
        self._logprobs = logprobs
        self._prompts = prompts
        self._scored_prompts = scored

    def whole(self) -> dict[str, Any]:
        return {}

    def scored_tokens(self, index: int) -> int:
        return 0 if self._scored_prompts is None else self._scored_prompts.size(index)

    def choice(self, answer: Delta) -> dict[str, Any]:
        choice = self._choice(answer, self._echo(answer.index) + answer.text) | self._prompt(answer.index)
        return self._with_echo(choice, answer.index)

    def opening(self, index: int) -> dict[str, Any] | None:
        if not self._echoes and self._prompts is None:
            return None
        choice = self._choice(Delta(index=index, text=""), self._echo(index)) | self._prompt(index)
        return self._with_echo(choice, index)

    def chunk(self, delta: Delta) -> dict[str, Any]:
        return self._choice(delta, delta.text)

    def _choice(self, delta: Delta, text: str) -> dict[str, Any]:
        logprobs = None if self._logprobs is None else self._table(delta.tokens, len(self._echo(delta.index)))
        choice = {"index": delta.index, "text": text, "logprobs": logprobs, **ending(delta)}
        return choice if self._prompts is None else {**choice, "token_ids": list(delta.token_ids)}

    def _echo(self, index: int) -> str:
        return self._echoes[index] if self._echoes else ""

    def _prompt(self, index: int) -> dict[str, Any]:
        return {} if self._prompts is None else {"prompt_token_ids": list(self._prompts[index])}

    def _with_echo(self, choice: dict[str, Any], index: int) -> dict[str, Any]:
        """`choice` with the log probabilities of the prompt, as far as the client asks for them."""
        scored = self._scored_prompts
        if scored is None:
            return choice
        if scored.alternatives is not None:
            choice["prompt_logprobs"] = scored.prompt_logprobs(index, self._name)
        if self._echoes and self._logprobs is not None:
            first, tokens = scored.echo(index, self._echoes[index], self._logprobs)
            # OpenAI has null for the first token, which comes after nothing
            none: dict[str, list[Any]] = {
                "tokens": [self._name(first)],
                "token_logprobs": [None],
                "top_logprobs": [None],
                "text_offset": [0],
            }
            echo, answer = self._table(tokens), choice["logprobs"]
            choice["logprobs"] = {key: [*none[key], *echo[key], *answer[key]] for key in none}
        return choice

    def _table(self, tokens: Sequence[ScoredToken], shift: int = 0) -> dict[str, Any]:
        """`shift`: characters before the text of the answer."""
        return {
            "tokens": [self._name(token.logprobs.token_id) for token in tokens],
            "token_logprobs": [token.logprobs.logprob for token in tokens],
            "top_logprobs": [self._alternatives(token.logprobs) for token in tokens],
            "text_offset": [shift + token.text_offset for token in tokens],
        }

    def _alternatives(self, token: TokenLogprobs) -> dict[str, float]:
        """The log probabilities of the most likely tokens, and of the chosen one even if it is not among them.

        Where two tokens have the same name, the chosen one keeps it, or else the more likely one.
        """
        names = {self._name(token.token_id): token.token_id}
        for token_id, _ in token.top:
            if names.setdefault(self._name(token_id), token_id) != token_id:
                names[id_name(token_id)] = token_id
        name_of = {token_id: name for name, token_id in names.items()}
        entries = {name_of[token_id]: logprob for token_id, logprob in token.top}
        entries.setdefault(self._name(token.token_id), token.logprob)
        return entries


def token_names(tokenizer: Tokenizer, body: SamplingFields) -> Callable[[int], str]:
    return id_name if body.return_tokens_as_token_ids else tokenizer.token_name
