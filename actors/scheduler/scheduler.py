"""Continuous batching over several workers: who runs what in each lock-step step. Pure: no Ray, no torch, no clock.

The life of a request: `add` puts the request in the queue. `schedule` assigns it to a worker, gives it KV blocks for
all its tokens and runs its prompt in chunks, then one token in each step. `commit` appends the sampled tokens and
reports when the request ends. When a worker has no free block left, its newest request returns to its old place in the
queue, which is the front. It is computed again later from its prompt and output, perhaps at another worker. The same
happens to every request whose worker is gone. Prefixes that a worker's cache still holds are not computed again (see
actors/scheduler/worker_caches.py).

Several steps may be in flight. Each step is made as if the steps before it had ended: a worker feeds the token that it
has just sampled. The scheduler knows ahead when a request ends because of its length. It does not know ahead when a
stop token ends a request; the next step then runs one token too many, which is thrown away. Workers run steps in order,
so a block that is freed may be given to another request at once.

A step is a transaction. The result of `schedule` counts when `commit` takes the step's results, oldest step first.
After `rollback` the work of all steps in flight is scheduled again. Requests may be added and aborted at any time.

A worker may answer that it does not know yet what a request's grammar allows next. The request's last token is then run
again in the next step that is made, and nobody waits for it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Mapping
from types import MappingProxyType

from elastic_moe.actors.scheduler.admission import Part, admit, in_the_way, shortest_served
from elastic_moe.actors.scheduler.fair_queue import FairQueue
from elastic_moe.actors.scheduler.kv_blocks import blocks_for
from elastic_moe.actors.scheduler.running_requests import RunningRequest
from elastic_moe.actors.scheduler.worker_caches import WorkerCache
from elastic_moe.cluster.errors import RequestError
from elastic_moe.cluster.messages.epochs import Epoch, StateRoom
from elastic_moe.cluster.messages.requests import FinishReason, GenerateRequest, RequestId, TokenOutput
from elastic_moe.cluster.messages.scores import PromptScores
from elastic_moe.cluster.messages.steps import Chunk, Sample, StepPlan, StepResult
from elastic_moe.cluster.messages.views import EngineStatus
from elastic_moe.cluster.placement import WorkerId

ALONE_TOKENS = 512
"""Most prompt tokens in a worker's step while no request decodes. Matrix products run at full speed with so many, and
the step is short enough that a new request soon gets its part of the next one."""

CORRUPTED = (
    "the model's logits for this request are not numbers (NaN or infinity): its weights may be damaged, "
    "or --dtype too narrow for them"
)


class Scheduler:
    """Owns the queue and decides which request runs at which worker. Not thread-safe."""

    def __init__(
        self,
        workers: Mapping[WorkerId, int],
        *,
        block_size: int,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_model_len: int,
        eos_token_ids: Collection[int],
        max_num_prefill_tokens: int | None = None,
        enable_prefix_caching: bool = True,
        rope_limits: Collection[int] = (),
        rope_growth_limit: int | None = None,
        state_rooms: Mapping[WorkerId, StateRoom] | None = None,
    ) -> None:
        """`workers`: KV blocks of each, in rank order. `state_rooms` as in `set_workers`. `max_num_seqs` and
        `max_num_batched_tokens` are per worker.

        `max_num_prefill_tokens`, per worker too, bounds prompts in steps that also decode. `rope_limits` and
        `rope_growth_limit` as in ModelInfo.
        """
        if min(block_size, max_num_seqs, max_num_batched_tokens, max_model_len - 1) < 1:
            raise ValueError("block_size, max_num_seqs and max_num_batched_tokens must be positive, max_model_len > 1")
        self._block_size = block_size
        self._max_num_seqs = max_num_seqs
        self._max_num_batched_tokens = max_num_batched_tokens
        self._max_num_prefill_tokens = max_num_prefill_tokens or max_num_batched_tokens
        self._max_model_len = max_model_len
        self._eos_token_ids = tuple(eos_token_ids)
        self._enable_prefix_caching = enable_prefix_caching
        self._rope_limits = tuple(rope_limits)
        self._rope_growth_limit = rope_growth_limit
        self._caches: dict[WorkerId, WorkerCache] = {}
        self._waiting = FairQueue()
        self._requests: dict[RequestId, RunningRequest] = {}
        self._arrivals = 0
        self._flights: deque[tuple[int, dict[WorkerId, Part]]] = deque()
        """Steps in flight, with every worker's part, oldest first."""
        self._steps = self._preemptions = self._prompt_tokens = self._generation_tokens = self._epoch = 0
        self._prefix_queries = self._prefix_hits = self._corrupted = 0
        self.set_workers(workers, state_rooms or {})

    # --- Requests -----------------------------------------------------------------------------------------------

    def add(self, request: GenerateRequest) -> TokenOutput | None:
        """Queue a request. Returns its end at once if it is resumed and nothing is left to generate, else None.

        Raises RequestError, naming the field, where it can never be served.
        """
        self._check(request)
        running_request = RunningRequest(
            request,
            arrival=self._arrivals,
            max_model_len=self._max_model_len,
            eos=tuple(dict.fromkeys((*self._eos_token_ids, *request.eos_token_ids))),
            variant=self._variant(len(request.prompt_token_ids)),
        )
        if reason := running_request.finish_reason():
            return _output(running_request, (), reason)
        # while there are no workers, no size is known, and the request waits
        if self._caches and not any(cache.can_ever_hold(running_request) for cache in self._caches.values()):
            room = self._block_size * max((cache.pool.num_blocks for cache in self._caches.values()), default=0)
            raise RequestError(
                f"the prompt has {running_request.num_prompt_tokens} tokens and max_tokens is "
                f"{request.params.max_tokens}: no worker's KV cache holds more than {room} tokens",
                param="prompt" if running_request.num_prompt_tokens > room else "max_tokens",
                code="context_length_exceeded",
            )
        self._arrivals += 1
        self._requests[request.request_id] = running_request
        self._waiting.enter(running_request)
        return None

    def _variant(self, prompt: int) -> int:
        """The variant of a prompt of `prompt` tokens. Only prompts of the same variant share keys and values."""
        if self._rope_growth_limit is not None and prompt > self._rope_growth_limit:
            return len(self._rope_limits) + prompt
        return sum(prompt > limit for limit in self._rope_limits)

    def abort(self, request_id: RequestId) -> bool:
        """Forget a request, waiting or running. Returns whether it existed. No more output is made for it."""
        request = self._requests.get(request_id)
        if request is None:
            return False
        self._end(request)
        return True

    def _check(self, request: GenerateRequest) -> None:
        prompt, params = len(request.prompt_token_ids), request.params
        if request.request_id in self._requests:
            raise RequestError(f"request {request.request_id!r} is already running", param="request_id", status=409)
        if not prompt:
            raise RequestError("the prompt is empty", param="prompt")
        if params.max_tokens < 0:
            raise RequestError(f"max_tokens: expected at least 0, got {params.max_tokens}", param="max_tokens")
        if prompt + min(1, params.max_tokens) > self._max_model_len:
            raise RequestError(
                f"the prompt has {prompt} tokens: the model's longest context is {self._max_model_len} tokens, "
                "the answer included",
                param="prompt",
                code="context_length_exceeded",
            )

    # --- Steps --------------------------------------------------------------------------------------------------

    def schedule(self, epoch: Epoch, step: int) -> dict[WorkerId, StepPlan] | None:
        """Every worker's plan of the next step, or None if there is nothing to run.

        Decoding requests come first, then prompts that have begun, then new requests, each group in its order. A step
        lasts as long as its longest part, so all workers run few prompt tokens while any request decodes.
        """
        self._make_way()
        budget = self._max_num_batched_tokens
        decoding = any(cache.decoding for cache in self._caches.values())
        prompts = min(
            budget, self._max_num_prefill_tokens if decoding else max(ALONE_TOKENS, self._max_num_prefill_tokens)
        )
        parts = {worker: Part(cache, budget, prompts) for worker, cache in self._caches.items()}
        for part in parts.values():
            self._continue(part)
        admit(self._waiting, parts.values(), self._max_num_seqs, self._max_num_batched_tokens)
        if not any(part.work for part in parts.values()):
            return None
        self._flights.append((step, parts))
        self._epoch = epoch
        self._prefix_queries += sum(part.prefix_queries for part in parts.values())
        self._prefix_hits += sum(part.prefix_hits for part in parts.values())
        tokens_per_rank = tuple(self._max_num_batched_tokens - part.budget for part in parts.values())
        plans = {}
        for worker, part in parts.items():
            part.forget, part.cache.forget = tuple(part.cache.forget), []
            plans[worker] = StepPlan(
                epoch=epoch,
                step=step,
                tokens_per_rank=tokens_per_rank,
                new=tuple(s.introduction() for s, chunk in part.work if not s.introduced and s.flight[0] is chunk),
                chunks=tuple(chunk for _, chunk in part.work),
                finished=part.forget,
            )
        return plans

    def commit(self, results: Mapping[WorkerId, StepResult]) -> list[TokenOutput]:
        """Take the results of the oldest step. Returns the sampled tokens in the order of the plans.

        Raises AssertionError if the results do not answer the plans, which is a defect of a worker. The step then
        stays in flight.
        """
        assert self._flights, "no step is in flight"
        step, parts = self._flights[0]
        assert set(results) == set(parts), "a worker's result is missing, or is of no member"
        assert all(result.step == step for result in results.values()), "a result of another step"
        samples = {worker: {sample.request_id: sample for sample in results[worker].samples} for worker in parts}
        scores = {worker: {one.request_id: one.scores for one in results[worker].scored} for worker in parts}
        for worker, part in parts.items():
            sampled, scored = samples[worker].keys(), scores[worker].keys()
            to_sample = {chunk.request_id for _, chunk in part.work if chunk.samples}
            to_score = {chunk.request_id for _, chunk in part.work if chunk.score_from is not None}
            corrupted, without = set(results[worker].corrupted), results[worker].without_sample
            assert without <= to_sample | corrupted & to_score, f"{worker} gives up what it was not asked for"
            assert sampled | without & to_sample == to_sample, f"{worker} has not sampled what it was asked to"
            assert not sampled & without, f"{worker} has sampled what it says it could not"
            assert scored | corrupted & to_score == to_score, f"{worker} has not scored what it was asked to"
            assert not scored & corrupted, f"{worker} has scored what it says it could not"
        self._flights.popleft()
        self._steps += 1
        outputs: list[TokenOutput] = []
        for worker, part in parts.items():
            for request, chunk in part.work:
                if not request.in_flight(chunk):
                    continue
                if request.request_id in results[worker].corrupted:
                    outputs.append(self._give_up(request))
                    continue
                if reason := results[worker].reason_of_end(request.request_id):
                    self._end(request)
                    outputs.append(_failure(request, reason, refused=True))
                    continue
                unready = request.request_id in results[worker].unready
                if unready:
                    landed = part.cache.commit_but_last(request)
                else:
                    landed = True
                    part.cache.commit(request)
                wanted = landed and chunk.score_from is not None
                found = scores[worker].get(request.request_id) if wanted else None
                assert found is None or found.end == request.scored + 1, f"{worker} has scored other tokens"
                if chunk.samples and not unready:
                    outputs.append(self._append(request, samples[worker][request.request_id], found))
                elif found is not None:
                    outputs.append(_output(request, (), None, scores=found))
        return outputs

    def rollback(self) -> None:
        """The oldest step has failed: drop the work of all steps in flight, so that it is scheduled again."""
        assert self._flights, "no step is in flight"
        while self._flights:
            _, parts = self._flights.pop()
            for part in parts.values():
                part.cache.forget = [*part.forget, *part.cache.forget]
        for cache in self._caches.values():
            for request in cache.running.items:
                cache.rollback(request)

    def _continue(self, part: Part) -> None:
        """Continue the requests of this worker: one token of each that decodes, then the prompts that have begun."""
        cache = part.cache
        ready = [request for request in cache.running.items if not request.exhausted]
        prefilling = [request for request in ready if request.remaining > 1]
        decoding = [request for request in ready if request.remaining == 1]
        for request in decoding:
            # an older request has preempted this one meanwhile
            if request.cache is None:
                continue
            if not part.budget:
                break
            if self._grow(part, request):
                part.decode(request)
        for request in prefilling:
            if part.room and request.cache is not None:
                part.prefill(request)

    def _grow(self, part: Part, request: RunningRequest) -> bool:
        """Get a block for the request's newest token, if necessary by preempting the worker's newest request.

        Returns False if `request` itself was the newest and was preempted.
        """
        cache = part.cache
        while len(request.blocks) * self._block_size < request.known:
            if cache.pool.num_free:
                request.blocks += cache.pool.allocate(1)
                break
            newest = cache.running.items[-1]
            self._requeue(newest)
            self._preemptions += 1
            if newest is request:
                return False
        return True

    def _append(self, request: RunningRequest, sample: Sample, scores: PromptScores | None) -> TokenOutput:
        if not request.counted:
            request.counted = True
            self._prompt_tokens += request.num_prompt_tokens
        request.tokens.append(sample.token_id)
        if not request.params.max_tokens:
            self._end(request)
            # nobody gets the token that has ended it
            del request.tokens[-1]
            return _output(request, (), FinishReason.LENGTH, scores=scores)
        self._generation_tokens += 1
        reason = request.finish_reason()
        if reason is not None:
            self._end(request)
        return _output(request, (sample.token_id,), reason, sample, scores)

    def _give_up(self, request: RunningRequest) -> TokenOutput:
        """End a request whose logits are not numbers, and make sure that no request shares its KV-cache blocks."""
        assert request.cache is not None
        request.cache.unshare(request)
        self._corrupted += 1
        self._end(request)
        return _failure(request, CORRUPTED)

    def _end(self, request: RunningRequest) -> None:
        request.ended = True
        del self._requests[request.request_id]
        if request.cache is not None:
            request.cache.drop(request)
        else:
            self._waiting.remove(request)

    def _requeue(self, request: RunningRequest) -> None:
        assert request.cache is not None
        request.cache.drop(request)
        self._waiting.put_back(request)

    def _make_way(self) -> None:
        """Preempt at most one request, if one client has all places, for the client that has the fewest running."""
        if not self._waiting.items:
            return
        request = shortest_served(self._waiting, self._caches.values())
        victim = in_the_way(request, self._caches.values(), self._max_num_seqs)
        if victim is not None:
            assert victim.cache is not None
            victim.cache.drop(victim)
            self._waiting.put_first(request)
            self._waiting.enter(victim)
            self._preemptions += 1

    # --- Membership ---------------------------------------------------------------------------------------------

    def set_workers(
        self, workers: Mapping[WorkerId, int], state_rooms: Mapping[WorkerId, StateRoom] = MappingProxyType({})
    ) -> int:
        """Set the workers from the next step on, with their numbers of KV blocks, in rank order.

        `state_rooms` has the workers whose model keeps states. Requests whose worker is gone return to the queue with
        all their tokens; the number of these requests is returned. A worker with another number of blocks or room for
        states than before counts as a new worker. A worker that restarted under its old name must be left out of one
        call first.
        """
        assert not self._flights, "the membership changes between steps"
        requeued = 0
        rooms = {worker: (blocks, state_rooms.get(worker)) for worker, blocks in workers.items()}
        for worker, cache in self._caches.items():
            if rooms.get(worker) != (cache.pool.num_blocks, cache.state_room):
                requeued += len(cache.running)
                for request in cache.running.items.copy():
                    self._requeue(request)
        old = self._caches
        self._caches = {}
        for worker, (blocks, state_room) in rooms.items():
            kept = old.get(worker)
            if kept is None or (kept.pool.num_blocks, kept.state_room) != (blocks, state_room):
                kept = WorkerCache(
                    worker,
                    blocks,
                    self._block_size,
                    prefix_caching=self._enable_prefix_caching,
                    state_room=state_room,
                )
            self._caches[worker] = kept
        return requeued

    def drain(self, workers: Collection[WorkerId]) -> None:
        """Give no new requests to exactly these workers from now on. Requests that run there continue."""
        for cache in self._caches.values():
            cache.draining = cache.worker in workers

    # --- Views --------------------------------------------------------------------------------------------------

    @property
    def num_requests(self) -> int:
        """Requests that have not ended."""
        return len(self._requests)

    def status(self) -> EngineStatus:
        """Totals count from the start; `steps` are committed ones, `prompt_tokens` counts each prompt once."""
        return EngineStatus(
            running={worker: len(cache.running) for worker, cache in self._caches.items()},
            waiting=len(self._waiting),
            kv_usage={worker: cache.pool.usage for worker, cache in self._caches.items()},
            steps=self._steps,
            preemptions=self._preemptions,
            corrupted_requests=self._corrupted,
            prompt_tokens=self._prompt_tokens,
            generation_tokens=self._generation_tokens,
            prefix_queries=self._prefix_queries,
            prefix_hits=self._prefix_hits,
            epoch=self._epoch,
        )

    def validate(self) -> None:
        """Asserts every invariant. For tests: it takes time in proportion to all blocks and tokens."""
        for cache in self._caches.values():
            cache.validate()
            assert len(cache.running) <= min(self._max_num_seqs, cache.seats)
        placed = {s.request_id: s for cache in self._caches.values() for s in cache.running.items}
        waiting = {s.request_id: s for s in self._waiting.items}
        assert len(placed) == sum(len(cache.running) for cache in self._caches.values()), "a request has two workers"
        assert not placed.keys() & waiting.keys()
        assert placed | waiting == self._requests, "a request is lost"
        self._waiting.validate()
        for request in self._requests.values():
            assert not request.ended
            assert request.num_prompt_tokens <= len(request.tokens) < request.longest
            assert request.longest <= self._max_model_len + (not request.params.max_tokens)
            assert request.scored <= request.num_to_score
        for request in self._waiting.items:
            assert request.cache is None
            assert not request.blocks
            assert request.computed == request.introduced_blocks == 0
            assert not request.flight
        flying: dict[RequestId, list[Chunk]] = {}
        for _, parts in self._flights:
            self._validate_flight(parts)
            for request, chunk in (piece for part in parts.values() for piece in part.work):
                if request.in_flight(chunk):
                    flying.setdefault(request.request_id, []).append(chunk)
        assert flying == {s.request_id: s.flight for s in self._requests.values() if s.flight}

    def _validate_flight(self, parts: Mapping[WorkerId, Part]) -> None:
        for worker, part in parts.items():
            assert part.cache is self._caches[worker]
            tokens = sum(chunk.length for _, chunk in part.work)
            assert tokens == self._max_num_batched_tokens - part.budget
            assert part.budget >= 0
            for request, chunk in part.work:
                assert chunk.length >= 1
                assert not request.in_flight(chunk) or request.cache is part.cache
                covered = chunk.block_offset + len(chunk.block_ids)
                assert covered >= blocks_for(chunk.start + chunk.length, self._block_size)


def _failure(request: RunningRequest, error: str, *, refused: bool = False) -> TokenOutput:
    return TokenOutput(
        request_id=request.request_id,
        offset=request.num_output,
        token_ids=(),
        finish_reason=FinishReason.ERROR,
        error=error,
        refused=refused,
    )


def _output(
    request: RunningRequest,
    tokens: tuple[int, ...],
    reason: FinishReason | None,
    sample: Sample | None = None,
    scores: PromptScores | None = None,
) -> TokenOutput:
    return TokenOutput(
        request_id=request.request_id,
        offset=request.num_output - len(tokens),
        token_ids=tokens,
        cached_tokens=request.cached_tokens or 0,
        resumptions=0 if reason is None else request.resumptions,
        logprobs=(sample.logprobs,) if sample is not None and sample.logprobs is not None else (),
        scores=scores,
        finish_reason=reason,
        stop_token_id=request.stop_token_id() if reason is FinishReason.STOP else None,
    )
