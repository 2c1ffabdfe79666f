"""POST /v1/chat/completions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from deploy.generation import Delta, ScoredToken
from deploy.http_io import client_name
from deploy.responses import Run, ending, new_id
from deploy.sampling import sampling_params
from deploy.schema import ChatCompletionRequest
from deploy.service import Prompt, Service
from deploy.tokenizer import Tokenizer

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
        prompt = await _prompt(service, body)
        response_id = new_id("chatcmpl")
        answers = await service.answers(body, [prompt], response_id=response_id, client=client)
        shape = ChatShape(service.tokenizer, prompt.text, body.top_logprobs or 0 if body.logprobs else None)
        return await Run(service, body, shape, answers, response_id).respond(request)

    return router


async def _prompt(service: Service, body: ChatCompletionRequest) -> Prompt:
    """Raises RequestError where the template refuses the messages, or they are too long."""
    messages = [message.to_template() for message in body.messages]
    text = await service.render_chat(
        messages,
        # With a message to continue there is no turn to begin, as vLLM's clients would have to say themselves.
        add_generation_prompt=body.add_generation_prompt is not False and not body.continue_final_message,
        continue_final_message=bool(body.continue_final_message),
        template_kwargs=body.chat_template_kwargs,
    )
    # Templates write the special tokens themselves.
    special = bool(body.add_special_tokens)
    token_ids = await service.encode(text, add_special_tokens=special, param="messages")
    if body.truncate_prompt_tokens is not None:
        token_ids = token_ids[-body.truncate_prompt_tokens :]
    params = sampling_params(
        body,
        defaults=service.defaults,
        limits=await service.limits(),
        prompt_tokens=len(token_ids),
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
    )
    last = messages[-1]
    echo = last["content"] if body.echo and last["role"] == ROLE else ""
    return Prompt(token_ids=token_ids, params=params, param="messages", text=echo)


class ChatShape:
    kind = "chat.completion"
    chunk_kind = "chat.completion.chunk"

    def __init__(self, tokenizer: Tokenizer, echo: str, top_logprobs: int | None) -> None:
        self._tokenizer = tokenizer
        self._echo = echo
        self._top_logprobs = top_logprobs

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
        return {"index": delta.index, key: message, "logprobs": logprobs, **ending(delta)}

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
        # JSON has no minus infinity; OpenAI's server says -9999 for a token that cannot come
        return {
            "token": raw.decode("utf-8", errors="replace"),
            "logprob": max(logprob, -9999.0),
            "bytes": list(raw),
        }
