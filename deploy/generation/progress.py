"""What is counted of one answer while it is made: how many tokens have come and when, and why it has ended."""

from __future__ import annotations

import time
from collections.abc import Callable

from elastic_moe.cluster.messages.requests import FinishReason, GenerateRequest, TokenOutput
from elastic_moe.deploy.generation.life import Life
from elastic_moe.deploy.generation.metrics import Metrics


class Progress:
    """Begins when it is made. `end` reports it."""

    def __init__(self, request: GenerateRequest, metrics: Metrics, began: Callable[[], None]) -> None:
        """`began` is called with the first output."""
        self.reason = FinishReason.ABORT
        self.tokens = 0
        self._request = request
        self._metrics = metrics
        self._counts = metrics.tokens
        self._began = began
        self._life = Life(request)
        self._last = time.perf_counter()
        self._waits = True
        self._group = 0

    def begin(self, group: int) -> None:
        """An output came from a group."""
        self._group = group
        if self._waits:
            self._waits = False
            self._began()
            self._metrics.request_began(len(self._request.prompt_token_ids), group)

    def came(self, output: TokenOutput, tokens: int, reason: FinishReason | None) -> None:
        """`tokens`: the number of the answer's tokens so far. `reason`: why the answer has ended, if it has."""
        now = time.perf_counter()
        self._life.came(output, tokens)
        if tokens > self.tokens:
            self._metrics.tokens_came(tokens - self.tokens, now - self._last, self._group, first=self.tokens == 0)
            self._last, self.tokens = now, tokens
        if reason is not None:
            self.reason = reason

    def next_token(self, group: int) -> None:
        """One more token came from a group, not the first."""
        now = time.perf_counter()
        self._counts.next(1, now - self._last, group)
        self._last, self._group = now, group
        self.tokens += 1

    def end(self) -> None:
        if self.tokens > self._life.tokens:
            self._life.has_gone_on(self.tokens, self._last)
        if self._waits:
            self._metrics.request_began(len(self._request.prompt_token_ids), self._group)
        self._metrics.request_ended(self._life, self.reason, self._group)
