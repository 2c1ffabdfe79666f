"""The times of one request in the replica that has accepted it: counted in its metrics, and sent as a trace.

vLLM's words: a request is in the *queue* until its first step, in *prefill* until its first token, in *decode* until
its last one. The engine tells how long the request waited for its first step; everything else is seen from here, so
prefill includes the way to the engine and back.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

from elastic_moe.actors.telemetry.exporting import Exporter
from elastic_moe.actors.telemetry.spans import Attribute, Span, trace_parent
from elastic_moe.cluster.lines import counted
from elastic_moe.cluster.messages.requests import FinishReason, GenerateRequest, TokenOutput

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Times:
    """Seconds from the request's beginning. A request that ended early lacks the later ones."""

    queued_s: float | None
    first_s: float | None
    last_s: float | None
    whole_s: float

    @property
    def prefill_s(self) -> float | None:
        if self.queued_s is None or self.first_s is None:
            return None
        return max(0.0, self.first_s - self.queued_s)

    @property
    def decode_s(self) -> float | None:
        return None if self.first_s is None or self.last_s is None else self.last_s - self.first_s


class Life:
    """Begins when it is made. `clock` is monotonic."""

    def __init__(self, request: GenerateRequest, *, clock: Callable[[], float] = time.perf_counter) -> None:
        self.request = request
        self.tokens = len(request.output_token_ids)
        self.resumptions = 0
        self._clock = clock
        self._began = clock()
        self._began_at_s = time.time()
        self._parent = trace_parent.get()
        self._queued_s: float | None = None
        self._first: float | None = None
        self._last: float | None = None

    def came(self, output: TokenOutput, tokens: int) -> None:
        """An output came. `tokens`: the number of the answer's tokens so far."""
        if self._queued_s is None and output.queued_s is not None:
            self._queued_s = output.queued_s
        self.resumptions = max(self.resumptions, output.resumptions)
        if tokens > self.tokens:
            self._last = self._clock()
            self._first = self._last if self._first is None else self._first
        self.tokens = tokens

    def has_gone_on(self, tokens: int, last: float) -> None:
        """Tokens after the first have come: there are so many now, and the last of them came at `last`."""
        self.tokens, self._last = tokens, last

    def times(self) -> Times:
        """The request's times up to now."""

        def since(moment: float | None) -> float | None:
            return None if moment is None else moment - self._began

        return Times(
            queued_s=self._queued_s,
            first_s=since(self._first),
            last_s=since(self._last),
            whole_s=self._clock() - self._began,
        )

    def report(self, times: Times, reason: FinishReason, exporter: Exporter | None, *, log: bool) -> None:
        """Send the trace, and write the line, of a request that has ended."""
        if exporter is not None:
            exporter.export(self._span(times, reason), self._parent)
        if log:
            logger.info(
                "request %s ended (%s) after %.3f s: %s, %s",
                self.request.request_id, reason.value, times.whole_s,
                counted(len(self.request.prompt_token_ids), "prompt token"), counted(self.tokens, "token"),
                extra={"request_id": self.request.request_id},
            )  # fmt: skip

    def _span(self, times: Times, reason: FinishReason) -> Span:
        begin_s = self._began_at_s
        bounds = {
            "queue": (0.0, times.queued_s),
            "prefill": (times.queued_s, times.first_s),
            "decode": (times.first_s, times.last_s),
        }
        return Span(
            name="llm_request",
            begin_s=begin_s,
            end_s=begin_s + times.whole_s,
            attributes=self._attributes(times, reason),
            children=tuple(
                Span(name=name, begin_s=begin_s + begin, end_s=begin_s + max(begin, end))
                for name, (begin, end) in bounds.items()
                if begin is not None and end is not None
            ),
            error="the request ended with an error" if reason is FinishReason.ERROR else None,
            serves=True,
        )

    def _attributes(self, times: Times, reason: FinishReason) -> dict[str, Attribute]:
        """vLLM's names where it has one."""
        params = self.request.params
        found: dict[str, Attribute | None] = {
            "gen_ai.request.id": self.request.request_id,
            "gen_ai.request.max_tokens": params.max_tokens,
            "gen_ai.request.temperature": params.temperature,
            "gen_ai.request.top_p": params.top_p,
            "gen_ai.usage.prompt_tokens": len(self.request.prompt_token_ids),
            "gen_ai.usage.completion_tokens": self.tokens,
            "gen_ai.latency.time_in_queue": times.queued_s,
            "gen_ai.latency.time_to_first_token": times.first_s,
            "gen_ai.latency.e2e": times.whole_s,
            "gen_ai.latency.time_in_model_prefill": times.prefill_s,
            "gen_ai.latency.time_in_model_decode": times.decode_s,
            "emoe.finish_reason": reason.value,
            "emoe.resumptions": self.resumptions,
        }
        return {name: value for name, value in found.items() if value is not None}
