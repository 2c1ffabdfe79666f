"""POST /v1/chat/completions: from the request to its prompt, and from deltas to choices."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from elastic_moe.cluster.messages.requests import FinishReason
from elastic_moe.deploy.api.completions import ANSWER, token_names
from elastic_moe.deploy.api.http_io import client_name
from elastic_moe.deploy.api.responses import Run, ending, new_id, shown_id
from elastic_moe.deploy.api.sampling import sampling_params, truncated
from elastic_moe.deploy.api.service import Prompt, Service
from elastic_moe.deploy.bodies.schema import ChatCompletionRequest
from elastic_moe.deploy.generation.answer import Delta, ScoredToken
from elastic_moe.deploy.generation.prompt_logprobs import Scored, check_scores
from elastic_moe.deploy.parsing.events import CallArguments, CallBegin, Event, TextKind, TextPiece
from elastic_moe.deploy.text.conversation import text_of
from elastic_moe.deploy.text.tokenizer import Tokenizer
from elastic_moe.deploy.tools.plan import thinking_budget, tool_plan
from elastic_moe.deploy.web.openapi import described

ROLE = "assistant"
CALLED = "tool_calls"
"""The finish reason of an answer that calls tools. It is "stop" where the request has named the tool, as in OpenAI's
API."""


def chat_router(service: Service) -> APIRouter:
    router = APIRouter()

    @router.post("/v1/chat/completions", **described(body=ChatCompletionRequest, answers={200: ANSWER}, errors=(404,)))
    async def create(request: Request) -> Response:
        body = await service.bodies.read(request, ChatCompletionRequest)
        service.check_model(body.model)
        await service.accept(request)
        client = client_name(request)
        service.check_room(client, body)
        prompt = await chat_prompt(service, body)
        response_id = new_id("chatcmpl")
        answers = await service.answers(body, [prompt], response_id=response_id, client=client)
        check_scores(body, [len(prompt.token_ids)])
        shape = ChatShape(
            service.texts.tokenizer,
            token_names(service.texts.tokenizer, body),
            prompt.text,
            (len(body.logprob_token_ids or ()) or body.top_logprobs or 0) if body.logprobs else None,
            prompt.token_ids if body.return_token_ids else None,
            scored=Scored(service.texts.tokenizer, answers, body) if body.prompt_logprobs is not None else None,
            hides_reasoning=body.hides_reasoning and prompt.new_parser is not None,
            named_tool=body.named_tool is not None,
            shown_prompt=prompt.rendered if body.return_prompt_text else None,
        )
        run = Run(service, body, shape, answers, shown_id("chatcmpl", response_id, body.request_id))
        return await run.respond(request)

    return router


async def chat_prompt(service: Service, body: ChatCompletionRequest) -> Prompt:
    """Render and encode the messages. Raises RequestError where the template refuses them, or they are too long."""
    tools = body.callable_tools
    text = await service.render_chat(body.messages, body, tools)
    asked = None if body.must_call else await service.grammar(body)
    plan = await tool_plan(
        service.form, service.texts.tokenizer, text, body, asked=asked, checked=service.checked_grammar
    )
    limits = await service.limits()
    # Without a wish of the client's, no special tokens are added: templates write them themselves.
    token_ids = await service.encode(
        text,
        add_special_tokens=bool(body.add_special_tokens),
        param="messages",
        to_be_cut=body.truncate_prompt_tokens is not None,
    )
    token_ids = truncated(token_ids, body, defaults=service.defaults, limits=limits)
    thinking = thinking_budget(service.form, service.texts.tokenizer, text, body.thinking_token_budget)
    params = sampling_params(
        body,
        defaults=service.defaults,
        limits=limits,
        prompt_tokens=len(token_ids),
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        bad_words=await service.texts.bad_words(body.bad_words),
        grammar=plan.grammar,
        grammar_after=plan.grammar_after,
        thinking=thinking,
    )
    last = body.messages[-1]
    echo = text_of(last.to_template()["content"]) if body.echo and last.role == ROLE else ""
    return Prompt(
        token_ids=token_ids,
        params=params,
        param="messages",
        text=echo,
        rendered=text,
        new_parser=plan.new_parser,
        markers=plan.markers,
    )


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
        *,
        hides_reasoning: bool = False,
        named_tool: bool = False,
        scored: Scored | None = None,
        shown_prompt: str | None = None,
    ) -> None:
        """`name` gives a token's name. `prompt` has the prompt's token ids where the client asks for ids, `scored` its
        log probabilities, and `shown_prompt` its text.

        `named_tool`: the request has named the tool to be called, and knows that it is called.
        """
        self._hides_reasoning = hides_reasoning
        self._named_tool = named_tool
        self._scored_prompt = scored
        self._shown_prompt = shown_prompt
        self._tokenizer = tokenizer
        self._name = name
        self._prompt = prompt
        self._echo = echo
        self._top_logprobs = top_logprobs

    def whole(self) -> dict[str, Any]:
        fields: dict[str, Any] = {}
        if self._prompt is not None:
            fields["prompt_token_ids"] = list(self._prompt)
        if self._shown_prompt is not None:
            fields["prompt_text"] = self._shown_prompt
        if self._scored_prompt is not None:
            fields["prompt_logprobs"] = self._scored_prompt.prompt_logprobs(0, self._name)
        return fields

    def scored_tokens(self, index: int) -> int:
        return 0 if self._scored_prompt is None else self._scored_prompt.size(index)

    def choice(self, answer: Delta) -> dict[str, Any]:
        message = {"role": ROLE, "content": self._echo + answer.text, "refusal": None}
        made = self._delta(answer)
        if "tool_calls" in made:
            calls = [{key: value for key, value in call.items() if key != "index"} for call in made["tool_calls"]]
            made["tool_calls"] = calls
            message["content"] = message["content"] or None
        return self._choice(answer, "message", {**message, **made, "content": message["content"]})

    def opening(self, index: int) -> dict[str, Any] | None:
        return {
            "index": index,
            "delta": {"role": ROLE, "content": self._echo},
            "logprobs": None,
            "finish_reason": None,
        }

    def chunk(self, delta: Delta) -> dict[str, Any]:
        return self._choice(delta, "delta", self._delta(delta))

    def _delta(self, delta: Delta) -> dict[str, Any]:
        """The new parts of a message."""
        made: dict[str, Any] = {"content": delta.text} if delta.text else {}
        reasoning = "".join(
            event.text for event in delta.events if isinstance(event, TextPiece) and event.kind is TextKind.REASONING
        )
        if reasoning and not self._hides_reasoning:
            # vLLM's present name, and the older one that most clients read
            made |= {"reasoning": reasoning, "reasoning_content": reasoning}
        if calls := call_deltas(delta.events):
            made["tool_calls"] = calls
        return made

    def _choice(self, delta: Delta, key: str, message: dict[str, Any]) -> dict[str, Any]:
        logprobs = None if self._top_logprobs is None else {"content": self._scored(delta.tokens), "refusal": None}
        if self._hides_reasoning:
            # names and ids of tokens would show the reasoning
            logprobs = None
        choice = {"index": delta.index, key: message, "logprobs": logprobs, **ending(delta)}
        if delta.called and not self._named_tool and delta.finish_reason is FinishReason.STOP:
            choice["finish_reason"] = CALLED
        if self._hides_reasoning:
            return choice
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


def call_deltas(events: Sequence[Event]) -> list[dict[str, Any]]:
    """The parts of tool calls in OpenAI's form: first id, type and name, then pieces of the arguments."""
    heads: dict[int, dict[str, Any]] = {}
    arguments: dict[int, list[str]] = {}
    for event in events:
        if isinstance(event, CallBegin):
            heads[event.index] = {"id": event.call_id, "type": "function", "function": {"name": event.name}}
            arguments[event.index] = []
        elif isinstance(event, CallArguments):
            arguments.setdefault(event.index, []).append(event.text)
    return [_call_delta(index, heads.get(index, {}), "".join(texts)) for index, texts in arguments.items()]


def _call_delta(index: int, head: dict[str, Any], arguments: str) -> dict[str, Any]:
    return {"index": index, **head, "function": {**head.get("function", {}), "arguments": arguments}}
