"""One answer on its way from the engine to the client: makes its text, and finds its stop strings and its end.

    prompt -> GenerateRequest -> engine.generate() -> TokenOutput -> Answer.feed() -> Delta -> a chunk of the response

`Answer` is pure. `answer_deltas` runs one answer, `merged` several at a time. Where an answer is streamed, most tokens
take the shortcut (shortcut.py) past all of it but `Answer`.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from elastic_moe.cluster.errors import NotReadyError, RequestError
from elastic_moe.cluster.messages.requests import FinishReason, GenerateRequest, TokenLogprobs, TokenOutput
from elastic_moe.cluster.messages.scores import PromptScores, joined
from elastic_moe.deploy.backend.backend import GenerationFailed, Requests
from elastic_moe.deploy.backend.request_stream import TakesTokens
from elastic_moe.deploy.generation.metrics import Metrics
from elastic_moe.deploy.generation.progress import Progress
from elastic_moe.deploy.parsing.events import Event, TextKind, TextPiece
from elastic_moe.deploy.parsing.events import merged as merged_events
from elastic_moe.deploy.parsing.parser import AnswerParser
from elastic_moe.deploy.text.detokenizer import StopStrings
from elastic_moe.deploy.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredToken:
    logprobs: TokenLogprobs
    text_offset: int
    """Number of characters of the answer before this token."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Delta:
    """The new part of one answer."""

    index: int
    text: str
    """The new text that is the answer itself, without reasoning and calls."""
    events: tuple[Event, ...] = ()
    """What the parser makes of the new text, `text` included, where the answer has one."""
    tokens: tuple[ScoredToken, ...] = ()
    """The new tokens, where the client asks for log probabilities. They may be ahead of the text."""
    token_ids: tuple[int, ...] = ()
    """The ids of the new tokens, where the client asks for them."""
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    """The stop token or stop string that has ended the answer; None for an end-of-sequence token."""
    called: bool = False
    """Whether the answer has ended with tool calls, all of them finished."""

    @property
    def empty(self) -> bool:
        return not (self.text or self.events or self.tokens or self.token_ids) and self.finish_reason is None


class Answer:
    """Makes deltas of the engine's outputs. Outputs after the end are ignored."""

    def __init__(
        self,
        *,
        index: int,
        request: GenerateRequest,
        tokenizer: Tokenizer,
        stops: Sequence[str] = (),
        include_stop: bool = False,
        skip_special_tokens: bool = True,
        eos_token_ids: Sequence[int] = (),
        return_token_ids: bool = False,
        parser: AnswerParser | None = None,
        markers: Mapping[int, str] | None = None,
        interval: int = 1,
    ) -> None:
        """`markers` are the special tokens that the parser needs, with their texts, also where the client sees none.
        `interval`: tokens in a delta, as far as they come one by one; the first one and the end are never held back."""
        self.index = index
        self.request = request
        self.completion_tokens = 0
        """Number of tokens up to the end, with the one that ended the answer."""
        self.cached_tokens: int | None = None
        """Number of prompt tokens that were found in a cache; None before the first output."""
        self.reasoning_tokens = 0
        """Number of tokens of the reasoning."""
        self._undecided_tokens = 0
        self.parser = parser
        self._markers = markers if markers and skip_special_tokens else {}
        self._events: list[Event] = []
        """Events that no delta has yet."""
        self.finished = False
        self._include_stop = include_stop
        self._stopping_tokens = {*eos_token_ids, *request.params.stop_token_ids}
        self._detokenizer = tokenizer.detokenizer(request.prompt_token_ids, skip_special_tokens=skip_special_tokens)
        self._stop_strings = StopStrings(stops, include=include_stop)
        self._text_chars = 0
        self._return_token_ids = return_token_ids
        self._scores: list[PromptScores] = []
        self._interval = interval
        self._held = Delta(index=index, text="")
        """What is held back; `_held_tokens` counts its tokens."""
        self._held_tokens = 0
        self._begun = interval == 1
        """Whether there has been something to send."""

    @property
    def scores(self) -> PromptScores | None:
        """The log probabilities of the prompt's tokens, where the client asks for them. They are whole with the first
        delta; None for a prompt of one token."""
        return joined(self._scores)

    def feed(self, output: TokenOutput) -> Delta:
        """The delta to send after an output; it is empty where there is nothing to send yet. Raises GenerationFailed
        where the engine reports an error, and RequestError where the request is to blame for it."""
        before = self.completion_tokens
        delta = self._feed(output)
        return delta if self._interval == 1 else self._paced(delta, self.completion_tokens - before)

    def _paced(self, delta: Delta, tokens: int) -> Delta:
        """What is held back and `delta`, which has so many tokens; or an empty delta, as both are held back now."""
        delta, self._held_tokens = _joined(self._held, delta), self._held_tokens + tokens
        waits = self._begun and self._held_tokens < self._interval and delta.finish_reason is None
        nothing = Delta(index=self.index, text="")
        self._held = delta if waits else nothing
        if waits:
            return nothing
        self._held_tokens = 0
        self._begun |= not delta.empty
        return delta

    def _feed(self, output: TokenOutput) -> Delta:
        if output.refused:
            raise RequestError(output.error or "the request cannot be served", code="grammar_failed")
        if output.finish_reason is FinishReason.ERROR:
            raise GenerationFailed(output.error or "the engine has ended this request because of an error")
        if self.cached_tokens is None:
            # after a loss of the engine, the resumed request reports the number again; the first report counts
            self.cached_tokens = output.cached_tokens
        if output.scores is not None:
            self._scores.append(output.scores)
        text = ""
        scored: list[ScoredToken] = []
        made: list[int] = []
        last = len(output.token_ids) - 1 if output.finish_reason is FinishReason.STOP else None
        for position, token_id in enumerate(output.token_ids):
            if output.logprobs:
                scored.append(ScoredToken(logprobs=output.logprobs[position], text_offset=self._text_chars))
            if self._return_token_ids:
                made.append(token_id)
            silent = position == last and token_id in self._stopping_tokens and not self._include_stop
            text += self._token(self._push("" if silent else self._text_of(token_id)))
            if self._stop_strings.found is not None or (self.parser is not None and self.parser.finished):
                return self._end(text, scored, made, FinishReason.STOP, self._stop_strings.found)
        if output.finish_reason is not None:
            rest = self._detokenizer.flush()
            rest = self._stop_strings.push(rest) if rest else ""
            text += self._parsed(rest + self._stop_strings.flush())
            return self._end(text, scored, made, output.finish_reason, output.stop_token_id)
        return Delta(
            index=self.index, text=text, events=self._new_events(), tokens=tuple(scored), token_ids=tuple(made)
        )

    def take_held(self) -> Delta:
        """What is held back, where an error ends the answer."""
        held, self._held = self._held, Delta(index=self.index, text="")
        return held

    @property
    def is_plain(self) -> bool:
        """Whether a token makes nothing but text: no event, no end, and no number that the client asks for."""
        watched = self.parser is not None or self._markers or self._stop_strings.looks
        return not watched and not self._return_token_ids and self.request.params.logprobs is None

    def feed_plain(self, token_id: int) -> str:
        """The text to send after one more token, which does not end the answer. Only where the answer is plain."""
        self.completion_tokens += 1
        text = self._detokenizer.push(token_id)
        return text if self._interval == 1 else self._paced(Delta(index=self.index, text=text), 1).text

    def _text_of(self, token_id: int) -> str:
        marker = self._markers.get(token_id)
        return self._detokenizer.push(token_id) if marker is None else self._detokenizer.flush() + marker

    def _token(self, text: str) -> str:
        """The part of a token's text that is content, after the parser has had it all."""
        if self.parser is None:
            return text
        reasoned = self.parser.in_reasoning
        content = self._parsed(text)
        # the tokens of the marks themselves do not count, and while text is held back, it may be a mark
        self._undecided_tokens = self._undecided_tokens + 1 if reasoned and self.parser.in_reasoning else 0
        if not self.parser.holds_back:
            self.reasoning_tokens += self._undecided_tokens
            self._undecided_tokens = 0
        return content

    def _parsed(self, text: str, *, last: bool = False) -> str:
        if self.parser is None:
            return text
        events = self.parser.push(text) if text else []
        if last:
            events += self.parser.end()
        self._events += events
        pieces = (event for event in events if isinstance(event, TextPiece) and event.kind is TextKind.CONTENT)
        return "".join(piece.text for piece in pieces)

    def _new_events(self) -> tuple[Event, ...]:
        events, self._events = tuple(self._events), []
        return events

    def _push(self, text: str) -> str:
        self.completion_tokens += 1
        self._text_chars += len(text)
        # as in vLLM, stop strings count only after min_tokens
        if self.completion_tokens <= self.request.params.min_tokens:
            return text
        return self._stop_strings.push(text)

    def _end(
        self,
        text: str,
        scored: Sequence[ScoredToken],
        made: Sequence[int],
        reason: FinishReason,
        stop_reason: int | str | None,
    ) -> Delta:
        self.finished = True
        text += self._parsed("", last=True)
        return Delta(
            index=self.index,
            text=text,
            events=self._new_events(),
            called=self.parser is not None and self.parser.called,
            tokens=tuple(scored),
            token_ids=tuple(made),
            finish_reason=reason,
            stop_reason=stop_reason,
        )


def _joined(first: Delta, then: Delta) -> Delta:
    """Two deltas of one answer as one."""
    return replace(
        then,
        text=first.text + then.text,
        events=merged_events(first.events + then.events),
        tokens=first.tokens + then.tokens,
        token_ids=first.token_ids + then.token_ids,
    )


class Short(TakesTokens, Protocol):
    """A way for tokens that needs no deltas (shortcut.py)."""

    progress: Progress | None


async def answer_deltas(
    engine: Requests,
    answer: Answer,
    metrics: Metrics,
    *,
    began: Callable[[], None] = lambda: None,
    shortcut: Short | None = None,
) -> AsyncGenerator[Delta, None]:
    """The deltas of one answer. The request is aborted in the engine at a stop string, or when the generator is closed.

    `began` is called once, with the first output. Tokens that take the `shortcut` are in no delta.
    """
    progress = Progress(answer.request, metrics, began)
    try:
        async with contextlib.aclosing(_outputs(engine, answer, progress, shortcut)) as outputs:
            async for output in outputs:
                # a request may go on in another group
                progress.begin(engine.group_of(answer.request.request_id))
                if answer.finished:
                    return
                delta = answer.feed(output)
                progress.came(output, answer.completion_tokens, delta.finish_reason)
                if not delta.empty:
                    yield delta
                if answer.finished:
                    return
            raise GenerationFailed("the engine ended this request without an answer")
    except (GenerationFailed, NotReadyError, RequestError):
        progress.reason = FinishReason.ERROR
        if not (held := answer.take_held()).empty:
            yield held
        raise
    finally:
        progress.end()


def _outputs(
    engine: Requests, answer: Answer, progress: Progress, shortcut: Short | None
) -> AsyncGenerator[TokenOutput, None]:
    if shortcut is None:
        return engine.generate(answer.request)
    shortcut.progress = progress
    return engine.generate(answer.request, shortcut)


async def merged(streams: Sequence[AsyncGenerator[Delta, None]]) -> AsyncGenerator[Delta, None]:
    """The deltas of several answers as they come. An error in one ends all, and closing the generator closes all.

    If nobody reads, the answers wait, and their tokens count as unread where the backend bounds them.
    """
    if len(streams) == 1:
        async with contextlib.aclosing(streams[0]) as only:
            async for delta in only:
                yield delta
        return
    queue: asyncio.Queue[Delta | BaseException | None] = asyncio.Queue(len(streams))

    async def forward(stream: AsyncGenerator[Delta, None]) -> None:
        try:
            async with contextlib.aclosing(stream):
                async for delta in stream:
                    await queue.put(delta)
        except Exception as error:  # noqa: BLE001 - raised again by the reader
            await queue.put(error)
        else:
            await queue.put(None)

    tasks: list[asyncio.Task[None]] = []
    try:
        for stream in streams:
            tasks.append(asyncio.create_task(forward(stream)))
            # let other requests run: a thousand long prompts must not be sent at once
            await asyncio.sleep(0)
        running = len(tasks)
        while running:
            item = await queue.get()
            if isinstance(item, BaseException):
                raise item
            if item is None:
                running -= 1
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
