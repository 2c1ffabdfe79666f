"""Counts one response in the metrics of its replica."""

from __future__ import annotations

import time

from elastic_moe.cluster.messages.requests import FinishReason, GenerateRequest, TokenOutput
from elastic_moe.deploy.generation.life import Life
from elastic_moe.deploy.generation.metrics import Metrics


class Counting:
    def __init__(self, metrics: Metrics, request: GenerateRequest, *, adopted: bool = False) -> None:
        """`adopted`: a replica that is gone has accepted it, and has counted what came before."""
        self._metrics = metrics
        self._last = time.perf_counter()
        self._life = Life(request)
        self._tokens = 0
        self._adopted = adopted
        self._engine = 0
        self._waits = not adopted
        """Whether the prompt is yet to be counted: it is known with the first output which group runs it."""

    def came(self, output: TokenOutput, tokens: int, engine: int) -> None:
        """`tokens` is the number of tokens so far; `engine` that of the group that made them."""
        now = time.perf_counter()
        self._engine = engine
        self._begin()
        self._life.came(output, tokens)
        if self._tokens or not self._adopted:
            self._metrics.tokens_came(tokens - self._tokens, now - self._last, engine, first=self._tokens == 0)
        self._last, self._tokens = now, tokens

    def ended(self, reason: FinishReason) -> None:
        self._begin()
        self._metrics.request_ended(self._life, reason, self._engine)

    def _begin(self) -> None:
        if self._waits:
            self._waits = False
            self._metrics.request_began(len(self._life.request.prompt_token_ids), self._engine)
