"""The fields of request bodies: OpenAI's, the ones that vLLM adds, and those that are refused.

Types are strict: "1" is not a number, and 1 is not a boolean. Unknown fields are ignored, as in vLLM, because clients
send them in good faith; the log names them (unknown.py). A known field that would change the answer and is not
supported is refused by its name.
"""

from __future__ import annotations

from collections import Counter
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import BeforeValidator, ConfigDict, FailFast, Field, SkipValidation, ValidationError, field_validator

from elastic_moe.cluster.errors import RequestError
from elastic_moe.deploy.bodies.base import Body
from elastic_moe.deploy.bodies.bounds import MAX_STOPS, TokenIds, check_sizes, pack_ids, pack_prompt
from elastic_moe.deploy.bodies.faults import request_error
from elastic_moe.deploy.bodies.json_text import type_name
from elastic_moe.deploy.bodies.messages import Message, check_contents, check_history
from elastic_moe.deploy.bodies.structured import StructuredFields
from elastic_moe.deploy.bodies.tools import ToolFields, check_choice
from elastic_moe.deploy.bodies.unknown import HARMLESS


def _whole(value: object) -> object:
    """JavaScript and JSON libraries write 2 as 2.0, and other servers take it as an integer."""
    return int(value) if type(value) is float and value.is_integer() else value


Int = Annotated[int, BeforeValidator(_whole)]
Int64 = Annotated[Int, Field(ge=-(2**63), lt=2**63)]
Int32 = Annotated[int, Field(ge=-(2**31), lt=2**31)]
TokenIdList = list[Int32]

BadWord = Annotated[str, Field(min_length=1, max_length=128)]

MAX_CHOICES = 128
MAX_LOGPROBS = 20
"""The same as in OpenAI's API and in vLLM."""
MAX_LOGPROB_TOKEN_IDS = 128
"""The same as in vLLM."""
MAX_BAD_WORDS = 128
MAX_ALLOWED_TOKEN_IDS = 1 << 14


BodyT = TypeVar("BodyT", bound="Body")


class StreamOptions(Body):
    include_usage: bool | None = False
    continuous_usage_stats: bool | None = False


class SamplingFields(StructuredFields):
    """The fields that completions and chat completions have in common."""

    # fields that would change the answer, with the values that leave it as it is
    UNSUPPORTED: ClassVar[dict[str, tuple[Any, ...]]] = {
        "use_beam_search": (False,),
        "length_penalty": (1, 1.0),
        "early_stopping": (False,),
        "logits_processors": ([],),
        "repetition_detection": (),
        "max_repetition_pattern_size": (0,),
        "min_repetition_pattern_size": (0,),
        "repetition_min_count": (0,),
        "watermarking": (False,),
        "vllm_xargs": ({},),
        "kv_transfer_params": (),
        "ec_transfer_params": (),
        "prompt_embeds": (),
    }

    HARMLESS: ClassVar[frozenset[str]] = HARMLESS
    PROMPT: ClassVar[str] = "prompt"
    """The field that holds the prompt."""

    model: str | None = None
    temperature: float | None = Field(None, ge=0)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: Int | None = Field(None, ge=-1, le=2**31)
    min_p: float | None = Field(None, ge=0, le=1)
    seed: Int64 | None = None
    n: Int | None = Field(None, ge=1, le=MAX_CHOICES)
    best_of: Int | None = None
    max_tokens: Int | None = Field(None, ge=1)
    min_tokens: Int | None = Field(None, ge=0)
    stop: str | list[str] | None = None
    stop_token_ids: TokenIdList | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    repetition_penalty: float | None = Field(None, gt=0)
    logit_bias: dict[str, float] | None = None
    prompt_logprobs: Int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    """Alternatives to each token of the prompt that are reported with their log probabilities."""
    logprob_token_ids: TokenIdList | None = Field(None, max_length=MAX_LOGPROB_TOKEN_IDS)
    """Tokens whose log probabilities are reported in place of those of the most likely ones."""
    skip_special_tokens: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    truncate_prompt_tokens: Int | None = Field(None, ge=-1)
    """Most tokens of the prompt that are kept; -1 keeps as many as leave room for the answer."""
    truncation_side: Literal["left", "right"] | None = None
    """The end of the prompt at which tokens are cut off; left by default."""
    allowed_token_ids: TokenIdList | None = Field(None, min_length=1, max_length=MAX_ALLOWED_TOKEN_IDS)
    bad_words: list[BadWord] | None = Field(None, max_length=MAX_BAD_WORDS)
    spaces_between_special_tokens: bool | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    request_id: Annotated[str, Field(pattern=r"^[!-~]{1,128}$")] | None = None
    cache_salt: str | None = Field(None, min_length=1, max_length=1024)
    priority: Int64 | None = None
    """Among the waiting requests of one client, a lower number is served earlier."""

    @field_validator("stop")
    @classmethod
    def _check_stop(cls, stop: str | list[str] | None) -> str | list[str] | None:
        if isinstance(stop, list) and (len(stop) > MAX_STOPS or "" in stop):
            raise ValueError(f"expected at most {MAX_STOPS} strings, none of them empty")
        return stop

    @field_validator("truncate_prompt_tokens")
    @classmethod
    def _check_truncation(cls, limit: int | None) -> int | None:
        if limit == 0:
            raise ValueError("expected at least 1, or -1 for as many tokens as there is room for")
        return limit

    @property
    def stops(self) -> tuple[str, ...]:
        if isinstance(self.stop, str):
            return (self.stop,) if self.stop else ()
        return tuple(self.stop or ())

    @property
    def num_choices(self) -> int:
        return self.n or 1

    @property
    def scored_alternatives(self) -> int | None:
        """Alternatives to report with each token of the prompt; None where its log probabilities are not needed."""
        return self.prompt_logprobs

    @property
    def token_limit(self) -> int | None:
        return self.max_tokens

    @property
    def token_limit_field(self) -> str:
        """The name of the field that sets `token_limit`."""
        return "max_tokens"

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @property
    def continuous_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.continuous_usage_stats)


class CompletionRequest(SamplingFields):
    UNSUPPORTED: ClassVar[dict[str, tuple[Any, ...]]] = {
        **SamplingFields.UNSUPPORTED,
        "suffix": ("",),
        "thinking_token_budget": (),
    }

    prompt: SkipValidation[str | list[str] | TokenIds | list[TokenIds]]
    """`packed` has checked it."""
    max_tokens: Int | None = Field(None, ge=0)
    """0 makes no token, for the log probabilities of a prompt alone."""
    echo: bool | None = None
    logprobs: Int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    add_special_tokens: bool | None = None

    @property
    def scored_alternatives(self) -> int | None:
        """With an echo, `logprobs` asks for those of the prompt too."""
        wanted = [self.prompt_logprobs, self.logprobs if self.echo else None]
        return max((number for number in wanted if number is not None), default=None)

    @classmethod
    def packed(cls, data: dict[str, Any]) -> dict[str, Any]:
        return {**data, "prompt": pack_prompt(data["prompt"])} if "prompt" in data else data

    @property
    def prompts(self) -> list[str] | list[TokenIds]:
        """One element for each prompt of the request."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        return self.prompt if isinstance(self.prompt, list) else [self.prompt]


class TemplateFields(Body):
    """The fields that the chat template gets besides the messages."""

    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    add_special_tokens: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    reasoning_effort: Annotated[str, Field(min_length=1, max_length=32)] | None = None
    enable_thinking: bool | None = None

    @property
    def template_kwargs(self) -> dict[str, Any]:
        """The template's variables. A field of the body overrides the same name in `chat_template_kwargs`."""
        own = {"reasoning_effort": self.reasoning_effort, "enable_thinking": self.enable_thinking}
        return {**(self.chat_template_kwargs or {}), **{name: v for name, v in own.items() if v is not None}}

    @property
    def begins_turn(self) -> bool:
        """Whether the prompt ends with the beginning of an answer. It does not where the last message is continued,
        also where the client has not set `add_generation_prompt` to false, which vLLM would require."""
        return self.add_generation_prompt is not False and not self.continue_final_message


class ChatCompletionRequest(SamplingFields, TemplateFields, ToolFields):
    UNSUPPORTED: ClassVar[dict[str, tuple[Any, ...]]] = {
        **SamplingFields.UNSUPPORTED,
        "functions": ([],),
        "function_call": ("none", "auto"),
        "audio": (),
        "modalities": (["text"],),
        "web_search_options": (),
        "chat_template": (),
        "documents": ([],),
        "verbosity": ("medium",),
    }

    PROMPT: ClassVar[str] = "messages"

    messages: Annotated[list[Message], FailFast()] = Field(min_length=1)
    max_completion_tokens: Int | None = Field(None, ge=1)
    thinking_token_budget: Int | None = Field(None, ge=0, lt=2**31)
    """Most tokens of the reasoning, which is then ended."""
    logprobs: bool | None = None
    top_logprobs: Int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    return_prompt_text: bool | None = None
    """Whether to return the prompt that the chat template has made."""
    echo: bool | None = None
    include_reasoning: bool | None = None

    @property
    def hides_reasoning(self) -> bool:
        return self.include_reasoning is False

    @property
    def token_limit(self) -> int | None:
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens

    @property
    def token_limit_field(self) -> str:
        return "max_tokens" if self.max_completion_tokens is None else "max_completion_tokens"


class TokenizeRequest(TemplateFields):
    """Either `prompt` or `messages`."""

    UNSUPPORTED: ClassVar[dict[str, tuple[Any, ...]]] = {"tools": ([],), "chat_template": (), "documents": ([],)}

    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(Body):
    model: str | None = None
    tokens: SkipValidation[TokenIds]
    """`packed` has checked them."""

    @classmethod
    def packed(cls, data: dict[str, Any]) -> dict[str, Any]:
        return {**data, "tokens": pack_ids("tokens", data["tokens"])} if "tokens" in data else data


class RebalanceRequest(Body):
    model_config = ConfigDict(strict=True, extra="forbid")

    planner: str = "auto"
    dry_run: bool = False


OperationId = Annotated[str, Field(pattern=r"^[A-Za-z0-9._:-]{1,100}$")]


class ScaleRequest(Body):
    """`workers` is the number of workers afterwards, `retire` names workers to remove; one or both must be given."""

    model_config = ConfigDict(strict=True, extra="forbid")

    workers: Int32 | None = None
    retire: list[str] | None = Field(None, min_length=1)
    operation_id: OperationId | None = None
    replace: bool = False

    @field_validator("retire")
    @classmethod
    def _each_once(cls, retire: list[str] | None) -> list[str] | None:
        for name, times in Counter(retire or ()).most_common(1):
            if times > 1:
                raise ValueError(f"expected each worker once, got {name[:100]!r} several times")
        return retire


class EnginesRequest(Body):
    """`data_parallel_size` is the number of groups afterwards, as the setting of this name says it for the start."""

    model_config = ConfigDict(strict=True, extra="forbid")

    data_parallel_size: Annotated[int, Field(ge=1, lt=2**31)]


class ElasticEpRequest(Body):
    """vLLM's body, or SGLang's with `new_ep_size`."""

    new_data_parallel_size: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    new_ep_size: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    drain_timeout: Annotated[int, Field(ge=1, le=86400)] = 120
    """Seconds to wait for the end of the operation."""


SWITCHES = {"functions": "function_call"}
"""Fields that have no effect where another field is "none": functions that may not be called."""


def parse(kind: type[BodyT], data: object) -> BodyT:
    """Validate `data`, a decoded JSON body. Raises RequestError, which names the first wrong field."""
    if not isinstance(data, dict):
        raise RequestError(f"the body must be a JSON object, got {type_name(data)}")
    data = kind.packed(data)
    check_sizes(data, tuple(kind.model_fields))
    try:
        body = kind.model_validate(data)
    except ValidationError as error:
        raise request_error(error, kind.known()) from None
    for name, harmless in getattr(kind, "UNSUPPORTED", {}).items():
        value = data.get(name)
        if name in SWITCHES and data.get(SWITCHES[name]) == "none":
            continue
        # types are compared as well, because True == 1 in Python
        if value is not None and not any(value == v and type(value) is type(v) for v in harmless):
            raise RequestError(f"{name}: not supported by this server", param=name, code="unsupported_parameter")
    if isinstance(body, SamplingFields):
        _check_together(body)
    if isinstance(body, TokenizeRequest):
        check_contents(body.messages or ())
    return body.compared_with(data)


def _check_together(body: SamplingFields) -> None:
    """Check the rules about several fields, and about values that are valid and not supported. Raises RequestError."""
    if body.spaces_between_special_tokens is False and body.skip_special_tokens is False:
        raise RequestError(
            "spaces_between_special_tokens: false is not supported where special tokens are shown",
            param="spaces_between_special_tokens",
            code="unsupported_value",
        )
    if body.best_of is not None and body.best_of != body.num_choices:
        raise RequestError("best_of: supported only where it equals n", param="best_of", code="unsupported_value")
    if body.stream_options is not None and not body.stream:
        raise RequestError("stream_options: allowed only when stream is true", param="stream_options")
    if body.prompt_logprobs is not None and body.stream:
        raise RequestError(
            "prompt_logprobs: not available in a stream; echo with logprobs is, for completions",
            param="prompt_logprobs",
            code="unsupported_value",
        )
    if body.logprob_token_ids and not _wants_logprobs(body):
        raise RequestError("logprob_token_ids: logprobs must be set to use it", param="logprob_token_ids")
    if isinstance(body, ChatCompletionRequest):
        check_choice(body)
        check_contents(body.messages)
        check_history(body.messages)
        if body.top_logprobs and not body.logprobs:
            raise RequestError("top_logprobs: logprobs must be true to use it", param="top_logprobs")
        if body.continue_final_message and body.add_generation_prompt:
            raise RequestError(
                "continue_final_message: cannot be true together with add_generation_prompt",
                param="continue_final_message",
            )


def _wants_logprobs(body: SamplingFields) -> bool:
    return getattr(body, "logprobs", None) not in (None, False)
