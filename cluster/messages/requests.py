"""API and engine: requests go in, tokens come out.

API -> engine   Hello, Submit, AbortRequests, CancelRequests, Adopt
engine -> API   Done or Refused as the answer to a Submit, Adopted to an Adopt; Outputs as tokens are made
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import compress
from typing import NewType

from elastic_moe.cluster.messages.columns import column_of, integers
from elastic_moe.cluster.messages.grammars import Grammar
from elastic_moe.cluster.messages.scores import PromptScores

RequestId = NewType("RequestId", str)


class FinishReason(StrEnum):
    STOP = "stop"
    """An end-of-sequence or stop token, or (found by the API) a stop string."""
    LENGTH = "length"
    ABORT = "abort"
    """The client went away, or has cancelled the request."""
    ERROR = "error"


@dataclass(frozen=True, slots=True, kw_only=True)
class ThinkingBudget:
    """Most tokens of an answer's reasoning, and the tokens around it."""

    tokens: int
    end: tuple[int, ...]
    """They follow when the tokens are used up. There is at least one."""
    start: tuple[int, ...] = ()
    """The reasoning begins after them; without any, the answer begins within the reasoning."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How to choose tokens. Checked where it is made (the API); the names and meanings are vLLM's."""

    max_tokens: int
    """0 makes no token: the request ends when its prompt has been run."""
    min_tokens: int = 0
    temperature: float = 1.0
    """0 is greedy."""
    top_p: float = 1.0
    top_k: int = 0
    """0: all tokens."""
    min_p: float = 0.0
    seed: int = 0
    """Always set: the API draws one where the client gave none, so that a resumed request goes on alike."""
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    logprobs: int | None = None
    """How many alternatives to report with every token; None reports nothing."""
    logprob_token_ids: tuple[int, ...] = ()
    """If there are any, these tokens are reported with every token, in place of the most likely ones."""
    prompt_logprobs: int | None = None
    """How many alternatives to report with every token of the prompt but the first; None reports nothing."""
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    allowed_token_ids: tuple[int, ...] | None = None
    """The only tokens that may be chosen; None allows all."""
    bad_words: tuple[tuple[int, ...], ...] = ()
    """Token sequences that the output must not contain: the last token of one is not chosen after the others."""
    thinking: ThinkingBudget | None = None
    """None: the model reasons for as long as it wants."""
    grammar: Grammar | None = None
    """What the output must look like. None allows everything."""
    grammar_after: tuple[int, ...] | None = None
    """The output may begin with anything, and the grammar with the token after the first place where these tokens stand
    in the output in a row, such as the end of the reasoning. None: the grammar begins with the output."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateRequest:
    """One sequence to complete. `output_token_ids` are those a client already has, when a request is resumed:
    the engine continues after them as if it had made them itself."""

    request_id: RequestId
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    output_token_ids: tuple[int, ...] = ()
    cache_salt: str = ""
    """Requests share cached prefixes with those of the same salt only."""
    eos_token_ids: tuple[int, ...] = ()
    """The tokenizer's own, which end the answer as the model's do."""
    client: str = ""
    """Name of the client that sent the request: clients take turns in the queue."""
    lasting: bool = False
    """Whether it outlives the API replica that it came from. Any replica may follow it, and only CancelRequests ends
    it before its end."""
    priority: int = 0
    """Among the requests of one client, a lower number is served earlier."""
    num_scored: int = 0
    """Number of prompt tokens whose scores the client already has, when a request is resumed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLogprobs:
    """Log probability of a chosen token, and of the most likely ones (best first), before temperature and filters."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenOutput:
    """New tokens of one request. `offset` counts the output tokens before them, so that repeats can be recognized."""

    request_id: RequestId
    offset: int
    token_ids: tuple[int, ...]
    cached_tokens: int = 0
    """Prompt tokens that were in the prefix cache when the request first ran."""
    queued_s: float | None = None
    """With the first token: seconds from the request's arrival at the engine to its first step."""
    resumptions: int = 0
    """With the last output: how often the request began again elsewhere, because a worker, an engine or memory went."""
    logprobs: tuple[TokenLogprobs, ...] = ()
    """One per token of `token_ids` where the request asked for them, else empty."""
    scores: PromptScores | None = None
    """Log probabilities of prompt tokens, where the request asked for them. All have come with the first token."""
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None
    """The `stop_token_ids` member that ended it, if one did (an end-of-sequence token leaves None)."""
    error: str | None = None
    """For finish_reason ERROR: one line for the client."""
    refused: bool = False
    """Whether the error lies in the request, which turned out only now."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """Where a process listens, and the secret that opens it."""

    address: str
    port: int
    token: str
    """32 characters, drawn anew by every process."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Hello:
    """The first message of an API replica. What is made for it while it is away, it gets when it comes again."""

    client_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Submit:
    """Requests to accept, all or none; one that is already running is left alone.

    Of a lasting request that is known already, the client gets the tokens that it lacks, and then the others as they
    are made.
    """

    requests: tuple[GenerateRequest, ...]
    numbers: tuple[int, ...] = ()
    """For each request, if given: the number from 1 by which this client knows it in `Tokens`. Names are long."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AbortRequests:
    """Requests to forget. Those that have ended, or are not the client's, are passed over. Not answered.

    A lasting request that runs goes on without this client; one that has ended is forgotten.
    """

    request_ids: tuple[RequestId, ...]
    numbers: tuple[int, ...] = ()
    """Further requests, by their numbers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CancelRequests:
    """Lasting requests to end now, whoever follows them: their last output has the reason ABORT. Not answered."""

    request_ids: tuple[RequestId, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Adopt:
    """Lasting requests that the client would follow if no living replica does. Answered by Adopted."""

    request_ids: tuple[RequestId, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Adopted:
    """Those of the requests that nobody follows. The client submits them next."""

    request_ids: tuple[RequestId, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Refused:
    """The engine refused requests: the fields of a RequestError."""

    message: str
    param: str | None
    code: str | None
    status: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokens:
    """One more token of each of many requests, with nothing else to say about it."""

    request_ids: tuple[RequestId, ...] = ()
    """[n]; none where `numbers` says it."""
    offsets: bytes = b""
    """[n] 32-bit integers, as in TokenOutput."""
    token_ids: bytes = b""
    """[n] 32-bit integers."""
    numbers: bytes = b""
    """[n] 32-bit integers, as in Submit; none where `request_ids` says it."""

    def __len__(self) -> int:
        return len(self.token_ids) // 4

    def rows(self) -> Iterator[tuple[int, int, int]]:
        """Number of the request, offset and token. Raises ValueError if the columns do not match."""
        return zip(integers(self.numbers), integers(self.offsets), integers(self.token_ids), strict=True)

    def __iter__(self) -> Iterator[TokenOutput]:
        """The same as outputs of one token each, where requests are named. Raises ValueError if the columns do not
        match."""
        columns = integers(self.offsets), integers(self.token_ids)
        for request_id, offset, token in zip(self.request_ids, *columns, strict=True):
            yield TokenOutput(request_id=request_id, offset=offset, token_ids=(token,))

    def chosen(self, which: Sequence[bool]) -> Tokens:
        """Those of the requests for which `which` [n] is true."""
        return Tokens(
            request_ids=tuple(compress(self.request_ids, which)),
            offsets=column_of(list(compress(integers(self.offsets), which))),
            token_ids=column_of(list(compress(integers(self.token_ids), which))),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Outputs:
    """New outputs for one client, sent without a question."""

    outputs: tuple[TokenOutput, ...]
    tokens: Tokens = Tokens()
    """Outputs of further requests."""
