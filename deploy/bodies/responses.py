"""The body of POST /v1/responses, and the chat that it asks for.

A response is a chat whose fields have other names. So the body is checked here for what is its own; all the rest goes
into the body of a chat, and is checked and refused there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import ConfigDict, Field

from elastic_moe.cluster.errors import RequestError
from elastic_moe.deploy.bodies.base import Body
from elastic_moe.deploy.bodies.schema import MAX_LOGPROBS, ChatCompletionRequest, parse

LOGPROBS = "message.output_text.logprobs"
REASONING = "reasoning.encrypted_content"
"""Its text is in the reasoning's `content`, unencrypted, so there is nothing to add."""

MAX_METADATA = 16
OWN = (
    *("messages", "max_tokens", "max_completion_tokens", "response_format", "logprobs", "n", "best_of", "functions"),
    *("function_call", "echo", "add_generation_prompt", "continue_final_message", "reasoning_effort", "verbosity"),
    *("prompt_logprobs", "logprob_token_ids"),
)
"""Fields of a chat that a response does not have, or has under another name."""

FROM_CHAT = {
    "response_format.json_schema": "text.format",
    "response_format": "text.format",
    "max_completion_tokens": "max_output_tokens",
    "reasoning_effort": "reasoning.effort",
    "verbosity": "text.verbosity",
    "messages": "input",
    # the engine's names
    "max_tokens": "max_output_tokens",
    "prompt": "input",
    "tool_choice.function": "tool_choice",
}
"""What a response calls the fields of a chat, longer names first."""

MetadataText = Annotated[str, Field(max_length=512)]


class TextFormat(Body):
    type: Literal["text", "json_object", "json_schema"] = "text"
    name: str | None = None
    description: str | None = None
    json_schema: Any = Field(None, alias="schema")
    strict: bool | None = None


class TextFields(Body):
    format: TextFormat | None = None
    verbosity: str | None = None


class ReasoningFields(Body):
    effort: Annotated[str, Field(min_length=1, max_length=32)] | None = None
    summary: Literal["auto", "concise", "detailed"] | None = None
    generate_summary: Literal["auto", "concise", "detailed"] | None = None


class Tool(Body):
    type: str
    name: Annotated[str, Field(min_length=1, max_length=256)] | None = None
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class NamedTool(Body):
    type: str
    name: str | None = None


class ResponseStreamOptions(Body):
    include_obfuscation: bool | None = None


class ResponsesRequest(Body):
    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)

    UNSUPPORTED: ClassVar[dict[str, tuple[Any, ...]]] = {
        "conversation": (),
        "prompt": (),
        "max_tool_calls": (),
        "context_management": ([],),
        "moderation": (),
        "truncation": ("disabled",),
        "service_tier": ("auto", "default"),
        "messages": (),
        "max_tokens": (),
        "max_completion_tokens": (),
        "response_format": (),
        "reasoning_effort": (),
        "functions": ([],),
        "function_call": ("none", "auto"),
        "logprobs": (False,),
        "echo": (False,),
        "n": (1,),
        "best_of": (1,),
        # they are of the prompt, and of chosen tokens: a response has no place for them
        "prompt_logprobs": (),
        "logprob_token_ids": ([],),
        "background_options": (),
    }

    model: str | None = None
    input: str | list[dict[str, Any]]
    instructions: str | None = None
    previous_response_id: str | None = None
    tools: list[Tool] | None = None
    tool_choice: str | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    text: TextFields | None = None
    reasoning: ReasoningFields | None = None
    max_output_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0)
    top_p: float | None = Field(None, gt=0, le=1)
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    include: list[str] | None = Field(None, max_length=16)
    metadata: dict[Annotated[str, Field(max_length=64)], MetadataText] | None = Field(None, max_length=MAX_METADATA)
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    store: bool | None = None
    background: bool | None = None
    stream: bool | None = None
    stream_options: ResponseStreamOptions | None = None

    @property
    def stored(self) -> bool:
        """As OpenAI's, a response is stored unless the client says otherwise."""
        return self.store is not False

    @property
    def wants_logprobs(self) -> bool:
        return LOGPROBS in (self.include or ())

    def chat(self, messages: Sequence[Mapping[str, Any]]) -> ChatCompletionRequest:
        """The chat that this response is. Raises RequestError, which names the fields as the client has sent them."""
        self._check_own()
        # what is left out must stay out: null is not the same everywhere
        fields = {name: value for name, value in self._chat_fields().items() if value is not None}
        try:
            return parse(ChatCompletionRequest, {**self._extras(), **fields, "messages": list(messages)})
        except RequestError as error:
            raise renamed(error) from None

    def _check_own(self) -> None:
        for number, name in enumerate(self.include or ()):
            if name not in (LOGPROBS, REASONING):
                raise _unsupported(f"include.{number}", f"{name[:80]!r} is not supported")
        for number, tool in enumerate(self.tools or ()):
            if tool.type != "function":
                raise _unsupported(f"tools.{number}.type", f"only 'function' is supported, got {tool.type[:80]!r}")
            if tool.name is None:
                raise RequestError(
                    f"tools.{number}.name: this field is required",
                    param=f"tools.{number}.name",
                    code="missing_required_parameter",
                )
        if isinstance(self.tool_choice, NamedTool) and self.tool_choice.type != "function":
            kind = self.tool_choice.type[:80]
            raise _unsupported("tool_choice.type", f"only 'function' is supported, got {kind!r}")
        if self.reasoning is not None and (self.reasoning.summary or self.reasoning.generate_summary):
            name = "summary" if self.reasoning.summary else "generate_summary"
            # "auto" leaves it to the server, and this one shows the reasoning itself
            if getattr(self.reasoning, name) != "auto":
                raise _unsupported(f"reasoning.{name}", "the reasoning is shown as it is; only 'auto' is supported")
        if self.top_logprobs and not self.wants_logprobs:
            raise RequestError(f"top_logprobs: include must have {LOGPROBS!r} to use it", param="top_logprobs")
        if self.stream_options is not None and not self.stream:
            raise RequestError("stream_options: allowed only when stream is true", param="stream_options")
        if self.background:
            self._check_background()

    def _check_background(self) -> None:
        if not self.stored:
            raise RequestError("background: needs store, which is false", param="background", code="invalid_value")
        if self.wants_logprobs:
            raise _unsupported("include", f"{LOGPROBS!r} is not supported with background")

    def _chat_fields(self) -> dict[str, Any]:
        choice = self.tool_choice
        named = {"type": "function", "function": {"name": choice.name}} if isinstance(choice, NamedTool) else None
        return {
            "model": self.model,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "max_completion_tokens": self.max_output_tokens,
            "logprobs": self.wants_logprobs or None,
            "top_logprobs": self.top_logprobs if self.wants_logprobs else None,
            "tools": [_chat_tool(tool) for tool in self.tools] if self.tools else None,
            "tool_choice": named if isinstance(choice, NamedTool) else choice,
            "parallel_tool_calls": self.parallel_tool_calls,
            "response_format": _chat_format(self.text.format) if self.text and self.text.format else None,
            "verbosity": self.text.verbosity if self.text else None,
            "reasoning_effort": self.reasoning.effort if self.reasoning else None,
        }

    @classmethod
    def known(cls) -> frozenset[str]:
        """vLLM's further sampling fields count too: they are those of a chat."""
        return super().known() | ChatCompletionRequest.known()

    def _extras(self) -> dict[str, Any]:
        """vLLM's further sampling fields."""
        known = {*ChatCompletionRequest.model_fields, *ChatCompletionRequest.UNSUPPORTED} - {*OWN}
        return {name: value for name, value in (self.model_extra or {}).items() if name in known}


def renamed(error: RequestError) -> RequestError:
    """`error` with the names of a response's fields in place of a chat's."""
    param, message = error.param or "", str(error)
    for chat, own in FROM_CHAT.items():
        if param == chat or param.startswith(f"{chat}."):
            name = own + param[len(chat) :]
            return RequestError(message.replace(param, name), param=name, code=error.code, status=error.status)
        message = message.replace(f"{chat}:", f"{own}:") if message.startswith(f"{chat}:") else message
    if param.startswith("tools."):
        name = param.replace(".function.", ".", 1)
        return RequestError(message.replace(param, name), param=name, code=error.code, status=error.status)
    return RequestError(message, param=error.param, code=error.code, status=error.status)


def _chat_tool(tool: Tool) -> dict[str, Any]:
    function = {
        "name": tool.name,
        "description": tool.description,
        "parameters": tool.parameters,
        "strict": tool.strict,
    }
    return {"type": "function", "function": {name: value for name, value in function.items() if value is not None}}


def _chat_format(wanted: TextFormat) -> dict[str, Any]:
    if wanted.type != "json_schema":
        return {"type": wanted.type}
    named = {
        "name": wanted.name,
        "description": wanted.description,
        "schema": wanted.json_schema,
        "strict": wanted.strict,
    }
    return {"type": "json_schema", "json_schema": {name: value for name, value in named.items() if value is not None}}


def _unsupported(path: str, message: str) -> RequestError:
    return RequestError(f"{path}: {message}", param=path, code="unsupported_value")
