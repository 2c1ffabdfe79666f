"""A running request in the API: the tokens that have come, and those that nobody has read yet.

Unread tokens pile up where a client reads slowly. They are merged into one output, and counted, so that the owner of
all streams can bound their memory.
"""

from __future__ import annotations

import asyncio
import dataclasses
from typing import Protocol

from elastic_moe.actors.remote.links import Link
from elastic_moe.cluster.messages.requests import FinishReason, GenerateRequest, TokenLogprobs, TokenOutput
from elastic_moe.cluster.messages.scores import PromptScores, joined


class TakesTokens(Protocol):
    """Takes single tokens while the reader of a stream waits."""

    @property
    def finished(self) -> bool:
        """Whether the token that was taken last has ended the answer."""
        ...

    def take(self, token_id: int, group: int) -> bool:
        """Returns False where the reader has to have the token. `group`: number of the group that it came from."""
        ...


class RequestStream:
    """The stream of one request, for one reader, on one event loop."""

    def __init__(self, request: GenerateRequest, shortcut: TakesTokens | None = None) -> None:
        """`shortcut`: takes tokens in place of the reader."""
        self.request = request
        self._shortcut = shortcut
        self.received: list[int] = list(request.output_token_ids)
        self.scored = request.num_scored
        """Number of prompt tokens whose scores have come."""
        self.link: Link | None = None
        """The connection to the engine that has accepted the request; None while no engine has."""
        self.resubmissions = 0
        """How often another engine was given the request."""
        self.number = 0
        """By which the engine's messages name the request."""
        self.group = 0
        """Number of the group that has the request."""
        self.cancelled = False
        """Whether the engine is to end the request, as soon as it has it."""
        self.unread = 0
        """Number of unread entries: one for a token, and one for each log probability."""
        self._first: TokenOutput | None = None
        """The first unread output. If there are more: `_tokens` and `_logprobs` have theirs, `_last` is the newest."""
        self._tokens: list[int] = []
        self._logprobs: list[TokenLogprobs] = []
        self._scores: list[PromptScores] = []
        """Scores of the prompt in all unread outputs."""
        self._last: TokenOutput | None = None
        self._end: TokenOutput | Exception | None = None
        """The error that ends the stream after its unread tokens."""
        self._came: asyncio.Future[None] | None = None
        """The future that the reader waits for."""

    @property
    def resumed(self) -> GenerateRequest:
        return dataclasses.replace(self.request, output_token_ids=tuple(self.received), num_scored=self.scored)

    def take(self, output: TokenOutput) -> bool:
        """Take the new tokens and scores of `output`. Returns False where earlier ones are missing, which were lost on
        the way."""
        repeats = len(self.received) - output.offset
        scores = output.scores
        if repeats < 0 or (scores is not None and scores.start > self.scored + 1):
            return False
        if scores is not None:
            # place 0 of the prompt has no score
            scores = scores.from_place(self.scored + 1) if scores.end > self.scored + 1 else None
            output = dataclasses.replace(output, scores=scores)
        if repeats:
            output = dataclasses.replace(
                output,
                offset=len(self.received),
                token_ids=output.token_ids[repeats:],
                logprobs=output.logprobs[repeats:],
            )
        if output.finish_reason is not None and self.resubmissions:
            output = dataclasses.replace(output, resumptions=output.resumptions + self.resubmissions)
        self.received += output.token_ids
        self.scored += len(scores) if scores is not None else 0
        if output.token_ids or output.finish_reason is not None or scores is not None:
            self._put(output)
        return True

    def take_token(self, offset: int, token_id: int) -> bool:
        """Take one token by the shortcut. Returns False, and does nothing, where `take` has to take it."""
        waiting, shortcut = self._came, self._shortcut
        if shortcut is None or waiting is None or waiting.done() or offset != len(self.received):
            return False
        try:
            if not shortcut.take(token_id, self.group):
                return False
        except Exception as error:  # noqa: BLE001 - raised again by the reader
            self.refuse(error)
            return True
        self.received.append(token_id)
        if shortcut.finished:
            # the reader sees it when it wakes
            self._put(TokenOutput(request_id=self.request.request_id, offset=len(self.received), token_ids=()))
        return True

    def fail(self, message: str) -> None:
        """End the stream with an error after its unread tokens."""
        self._end = TokenOutput(
            request_id=self.request.request_id,
            offset=len(self.received),
            token_ids=(),
            finish_reason=FinishReason.ERROR,
            error=message,
        )
        self._wake()

    def refuse(self, error: Exception) -> None:
        """Raise `error` when the next output is read. Unread tokens are thrown away."""
        self._read()
        self._end = error
        self._wake()

    async def next(self) -> TokenOutput:
        """All unread tokens as one output; waits until there is one. Raises the error that `refuse` was given."""
        while self._first is None:
            if isinstance(self._end, Exception):
                raise self._end
            if self._end is not None:
                return self._end
            self._came = asyncio.get_running_loop().create_future()
            await self._came
        output = self._read()
        assert output is not None
        return output

    def _read(self) -> TokenOutput | None:
        """Take all unread tokens as one output."""
        first, last, tokens, logprobs = self._first, self._last, self._tokens, self._logprobs
        scores, self._scores = joined(self._scores), []
        self._first = self._last = None
        self.unread = 0
        if first is None or last is None:
            return first
        self._tokens, self._logprobs = [], []
        return dataclasses.replace(
            last,
            offset=first.offset,
            cached_tokens=first.cached_tokens,
            queued_s=first.queued_s,
            token_ids=(*first.token_ids, *tokens),
            logprobs=(*first.logprobs, *logprobs),
            scores=scores,
        )

    def _put(self, output: TokenOutput) -> None:
        if self._end is not None:
            return
        if output.finish_reason is FinishReason.ERROR:
            self._end = output
        elif self._first is None:
            self._first = output
        else:
            self._last = output
            self._tokens += output.token_ids
            self._logprobs += output.logprobs
        if output.scores is not None:
            self._scores.append(output.scores)
            self.unread += len(output.scores) * output.scores.width
        self.unread += len(output.token_ids)
        if output.logprobs:
            self.unread += sum(1 + len(entry.top) for entry in output.logprobs)
        self._wake()

    def _wake(self) -> None:
        if self._came is not None and not self._came.done():
            self._came.set_result(None)
