"""POST /v1/chat/completions: from the request to its prompt, and from deltas to choices."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from elastic_moe.deploy.api.completions import token_names
from elastic_moe.deploy.api.http_io import client_name
from elastic_moe.deploy.api.responses import Run, ending, new_id, shown_id
from elastic_moe.deploy.api.sampling import sampling_params, truncated
from elastic_moe.deploy.api.service import Prompt, Service
from elastic_moe.deploy.bodies.schema import ChatCompletionRequest
from elastic_moe.deploy.generation.answer import Delta, ScoredToken
from elastic_moe.deploy.text.conversation import text_of
from elastic_moe.deploy.text.tokenizer import Tokenizer

ROLE = "assistant"


def chat_router(service: Service) -> APIRouter:
    router = APIRouter()

    @router.post("/v1/chat/completions")
    async def create(request: Request) -> Response:
        body = await service.bodies.read(request, ChatCompletionRequest)
        service.check_model(body.model)
        await service.check_ready()
        client = client_name(request)
        service.check_room(client, body)
        prompt = await chat_prompt(service, body)
        response_id = new_id("chatcmpl")
        answers = await service.answers(body, [prompt], response_id=response_id, client=client)
        shape = ChatShape(
            service.tokenizer,
            token_names(service.tokenizer, body),
            prompt.text,
            body.top_logprobs or 0 if body.logprobs else None,
            prompt.token_ids if body.return_token_ids else None,
        )
        run = Run(service, body, shape, answers, shown_id("chatcmpl", response_id, body.request_id))
        return await run.respond(request)

    return router


async def chat_prompt(service: Service, body: ChatCompletionRequest) -> Prompt:
    """Render and encode the messages. Raises RequestError where the template refuses them, or they are too long."""
    text = await service.render_chat(body.messages, body)
    limits = await service.limits()
    # Without a wish of the client's, no special tokens are added: templates write them themselves.
    token_ids = await service.encode(
        text,
        add_special_tokens=bool(body.add_special_tokens),
        param="messages",
        to_be_cut=body.truncate_prompt_tokens is not None,
    )
    token_ids = truncated(token_ids, body, defaults=service.defaults, limits=limits)
    params = sampling_params(
        body,
        defaults=service.defaults,
        limits=limits,
        prompt_tokens=len(token_ids),
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        bad_words=await service.bad_words(body.bad_words),
        grammar=await service.grammar(body),
    )
    last = body.messages[-1]
    echo = text_of(last.to_template()["content"]) if body.echo and last.role == ROLE else ""
    return Prompt(token_ids=token_ids, params=params, param="messages", text=echo)


class ChatShape:
    kind = "chat.completion"
    chunk_kind = "chat.completion.chunk"

    def __init__(
        self,
        tokenizer: Tokenizer,
        name: Callable[[int], str],
        echo: str,
        top_logprobs: int | None,
        prompt: Sequence[int] | None = None,
    ) -> None:
        """`name` gives a token's name. `prompt` has the prompt's token ids where the client asks for ids."""
        self._tokenizer = tokenizer
        self._name = name
        self._prompt = prompt
        self._echo = echo
        self._top_logprobs = top_logprobs

    def whole(self) -> dict[str, Any]:
        return {} if self._prompt is None else {"prompt_token_ids": list(self._prompt)}

    def choice(self, answer: Delta) -> dict[str, Any]:
        message = {"role": ROLE, "content": self._echo + answer.text, "refusal": None}
        return self._choice(answer, "message", message)

    def opening(self, index: int) -> dict[str, Any] | None:
        return {
            "index": index,
            "delta": {"role": ROLE, "content": self._echo},
            "logprobs": None,
            "finish_reason": None,
        }

    def chunk(self, delta: Delta) -> dict[str, Any]:
        return self._choice(delta, "delta", {"content": delta.text} if delta.text else {})

    def _choice(self, delta: Delta, key: str, message: dict[str, Any]) -> dict[str, Any]:
        logprobs = None if self._top_logprobs is None else {"content": self._scored(delta.tokens), "refusal": None}
        choice = {"index": delta.index, key: message, "logprobs": logprobs, **ending(delta)}
        return choice if self._prompt is None else {**choice, "token_ids": list(delta.token_ids)}

    def _scored(self, tokens: Sequence[ScoredToken]) -> list[dict[str, Any]]:
        return [
            {
                **self._token(token.logprobs.token_id, token.logprobs.logprob),
                "top_logprobs": [self._token(*pair) for pair in token.logprobs.top[: self._top_logprobs]],
            }
            for token in tokens
        ]

    def _token(self, token_id: int, logprob: float) -> dict[str, Any]:
        raw = self._tokenizer.token_bytes(token_id)
        # JSON has no minus infinity; OpenAI's server writes -9999 for a token of probability 0
        return {
            "token": self._name(token_id),
            "logprob": max(logprob, -9999.0),
            "bytes": list(raw),
        }
