"""Which requests there are, whether a new one is accepted, and the queue of those that wait."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

from elastic_moe.actors.caches.rows import StopTokens
from elastic_moe.actors.caches.running_requests import RunningRequest
from elastic_moe.actors.scheduler.fair_queue import FairQueue
from elastic_moe.cluster.errors import RequestError
from elastic_moe.cluster.lines import counted
from elastic_moe.cluster.messages.requests import GenerateRequest, RequestId, SamplingParams

MOST_PARAMS = 1024
"""Sampling parameters that are kept to be shared."""


class RequestBook:
    """Every request that has not ended is in it, and either waits or runs at a worker."""

    def __init__(
        self,
        *,
        max_model_len: int,
        eos_token_ids: Collection[int],
        rope_limits: Collection[int],
        rope_growth_limit: int | None,
    ) -> None:
        """`rope_limits` and `rope_growth_limit` as in ModelInfo."""
        self._max_model_len = max_model_len
        self._eos_token_ids = tuple(eos_token_ids)
        self._rope_limits = tuple(rope_limits)
        self._rope_growth_limit = rope_growth_limit
        self._arrivals = 0
        self._params: dict[SamplingParams, SamplingParams] = {}
        self.requests: dict[RequestId, RunningRequest] = {}
        """Those that wait and those that run."""
        self.waiting = FairQueue()
        self.stops = StopTokens()
        """The stop tokens of all requests."""
        self.preemptions = 0

    def read(self, request: GenerateRequest) -> RunningRequest:
        """A request that may be entered. Raises RequestError, naming the field, where it can never be served."""
        self._check(request)
        running = RunningRequest(
            request,
            arrival=self._arrivals,
            max_model_len=self._max_model_len,
            eos=self._ends(request.eos_token_ids),
            variant=self._variant(len(request.prompt_token_ids)),
        )
        running.params = self._shared(request.params)
        return running

    def _shared(self, params: SamplingParams) -> SamplingParams:
        """These parameters without the seed, in one object for all requests that have the same."""
        unseeded = replace(params, seed=0)
        if len(self._params) >= MOST_PARAMS:
            self._params.clear()
        return self._params.setdefault(unseeded, unseeded)

    def _ends(self, eos_token_ids: Sequence[int]) -> tuple[int, ...]:
        """The model's end-of-sequence tokens with those of a request: mostly the same ones, in one tuple for all."""
        further = tuple(token for token in dict.fromkeys(eos_token_ids) if token not in self._eos_token_ids)
        return (*self._eos_token_ids, *further) if further else self._eos_token_ids

    def _check(self, request: GenerateRequest) -> None:
        prompt, params = len(request.prompt_token_ids), request.params
        if request.request_id in self.requests:
            raise RequestError(f"request {request.request_id!r} is already running", param="request_id", status=409)
        if not prompt:
            raise RequestError("the prompt is empty", param="prompt")
        if params.max_tokens < 0:
            raise RequestError(f"max_tokens: expected at least 0, got {params.max_tokens}", param="max_tokens")
        if prompt + min(1, params.max_tokens) > self._max_model_len:
            raise RequestError(
                f"the prompt has {counted(prompt, 'token')}: the model's longest context is {self._max_model_len} "
                "tokens, the answer included",
                param="prompt",
                code="context_length_exceeded",
            )

    def _variant(self, prompt: int) -> int:
        """The variant of a prompt of `prompt` tokens. Only prompts of the same variant share keys and values."""
        if self._rope_growth_limit is not None and prompt > self._rope_growth_limit:
            return len(self._rope_limits) + prompt
        return sum(prompt > limit for limit in self._rope_limits)

    def enter(self, request: RunningRequest) -> None:
        """Queue a new request."""
        self._arrivals += 1
        self.requests[request.request_id] = request
        self.stops.add(request.stop_candidates)
        self.waiting.enter(request)

    def end(self, request: RunningRequest, *, spoilt: bool = False) -> None:
        """Forget a request, waiting or running. `spoilt`: nobody may use the KV blocks that it has filled."""
        request.ended = True
        self.stops.remove(request.stop_candidates)
        del self.requests[request.request_id]
        if request.cache is not None:
            request.cache.drop(request, spoilt=spoilt)
        else:
            self.waiting.remove(request)

    def preempt(self, request: RunningRequest) -> None:
        """Take a request off its worker. It returns to its old place in the queue."""
        assert request.cache is not None
        request.cache.drop(request)
        self.waiting.put_back(request)
        self.preemptions += 1

    def replace(self, victim: RunningRequest, request: RunningRequest) -> None:
        """Take `victim` off its worker, and let the waiting `request` be the next that starts. The victim queues
        again."""
        assert victim.cache is not None
        victim.cache.drop(victim)
        self.waiting.put_first(request)
        self.waiting.enter(victim)
        self.preemptions += 1

    def validate(self, running: Collection[RunningRequest]) -> None:
        """Asserts the invariants of the book. `running`: the requests of all workers."""
        placed = {request.request_id: request for request in running}
        waiting = {request.request_id: request for request in self.waiting.items}
        assert len(placed) == len(running), "a request has two workers"
        assert not placed.keys() & waiting.keys()
        assert placed | waiting == self.requests, "a request is lost"
        self.waiting.validate()
        for request in self.requests.values():
            assert not request.ended
            assert request.num_prompt_tokens <= len(request.tokens) < request.longest
            assert request.longest <= self._max_model_len + (not request.params.max_tokens)
            assert request.scored <= request.num_to_score
        for request in self.waiting.items:
            assert request.cache is None
            assert not request.blocks
            assert request.computed == request.introduced_blocks == 0
            assert not request.flight
