"""Continuous batching over several workers: who runs what in each lock-step step. Pure: no Ray, no torch, no clock.

The life of a request: `add` puts the request in the queue. `schedule` assigns it to a worker, gives it KV blocks for
all its tokens and runs its prompt in chunks, then one token in each step. `commit` appends the sampled tokens and
reports when the request ends. When a worker has no free block left, its newest request returns to its old place in the
queue, which is the front. It is computed again later from its prompt and output, perhaps at another worker. The same
happens to every request whose worker is gone. Prefixes that a worker's cache still holds are not computed again (see
actors/caches/worker_cache.py).

A request that goes on decoding costs a step nothing of its own: it is a row of columns (actors/caches/rows.py), it
has no message, and its token is an entry of a column too. `schedule` handles one by one only what begins, ends, needs a
block, or was cut.

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

from collections import Counter, deque
from collections.abc import Collection, Mapping, Sequence
from types import MappingProxyType

from elastic_moe.actors.caches.kv_blocks import blocks_for
from elastic_moe.actors.caches.rows import Rows
from elastic_moe.actors.caches.running_requests import RunningRequest
from elastic_moe.actors.caches.worker_caches import WorkerCaches
from elastic_moe.actors.scheduler.admission import Part, admit, in_the_way, shortest_served
from elastic_moe.actors.scheduler.continuing import Candidates, Continuing
from elastic_moe.actors.scheduler.flights import UNCHANGED, Answers, Flight, Grown, StepOutputs, output
from elastic_moe.actors.scheduler.landing import Landing
from elastic_moe.actors.scheduler.prefill_pace import PrefillPace
from elastic_moe.actors.scheduler.request_book import RequestBook
from elastic_moe.cluster.messages.epochs import Epoch, StateRoom, WindowRoom
from elastic_moe.cluster.messages.requests import GenerateRequest, RequestId, TokenOutput
from elastic_moe.cluster.messages.steps import Chunk, StepPlan, StepResult
from elastic_moe.cluster.messages.views import EngineStatus
from elastic_moe.cluster.placement import WorkerId

ALONE_TOKENS = 512
"""Most prompt tokens in a worker's step while no request decodes. Matrix products run at full speed with so many, and
the step is short enough that a new request soon gets its part of the next one."""


class Scheduler:
    """Makes the steps of all workers. Not thread-safe."""

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
        pace: PrefillPace | None = None,
        enable_prefix_caching: bool = True,
        rope_limits: Collection[int] = (),
        rope_growth_limit: int | None = None,
        state_rooms: Mapping[WorkerId, StateRoom] | None = None,
        window_rooms: Mapping[WorkerId, WindowRoom] | None = None,
    ) -> None:
        """`workers`: KV blocks of each, in rank order. `state_rooms` and `window_rooms` as in `set_workers`.
        `max_num_seqs` and `max_num_batched_tokens` are per worker.

        `max_num_prefill_tokens`, per worker too, bounds prompts in steps that also decode; so does `pace`, by the time
        that steps take. `rope_limits` and `rope_growth_limit` as in ModelInfo.
        """
        if min(block_size, max_num_seqs, max_num_batched_tokens, max_model_len - 1) < 1:
            raise ValueError("block_size, max_num_seqs and max_num_batched_tokens must be positive, max_model_len > 1")
        self._max_num_seqs = max_num_seqs
        self._max_num_batched_tokens = max_num_batched_tokens
        self._max_num_prefill_tokens = max_num_prefill_tokens or max_num_batched_tokens
        self._pace = pace
        self._rows = Rows(block_size)
        self._caches = WorkerCaches(self._rows, max_num_seqs=max_num_seqs, prefix_caching=enable_prefix_caching)
        self._book = RequestBook(
            max_model_len=max_model_len,
            eos_token_ids=eos_token_ids,
            rope_limits=rope_limits,
            rope_growth_limit=rope_growth_limit,
        )
        self._continuing = Continuing(
            self._book,
            self._caches,
            self._rows,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
        )
        self._landing = Landing(self._book, self._rows)
        self._flights: deque[Flight] = deque()
        """Steps in flight, oldest first."""
        self._last: Flight | None = None
        """The step from which workers can go on by rule, if there is one."""
        self._apart: deque[RequestId] = deque()
        """Requests that must each run a step alone before others run again."""
        self._epoch = self._steps = self._prefix_queries = self._prefix_hits = 0
        self.set_workers(workers, state_rooms or {}, window_rooms or {})

    # --- Requests -----------------------------------------------------------------------------------------------

    def add(self, request: GenerateRequest) -> TokenOutput | None:
        """Queue a request. Returns its end at once if it is resumed and nothing is left to generate, else None.

        Raises RequestError, naming the field, where it can never be served.
        """
        running_request = self._book.read(request)
        if reason := running_request.finish_reason():
            return output(running_request, (), reason)
        self._caches.check(running_request)
        self._book.enter(running_request)
        return None

    def abort(self, request_id: RequestId) -> bool:
        """Forget a request, waiting or running. Returns whether it existed. No more output is made for it."""
        request = self._book.requests.get(request_id)
        if request is None:
            return False
        self._book.end(request)
        return True

    # --- Steps --------------------------------------------------------------------------------------------------

    def schedule(self, epoch: Epoch, step: int) -> dict[WorkerId, StepPlan] | None:
        """Every worker's plan of the next step, or None if there is nothing to run.

        Decoding requests come first, then prompts that have begun, then new requests, each group in its order. A step
        lasts as long as its longest part, so all workers run few prompt tokens while any request decodes. After
        `run_apart` a step has one request.
        """
        alone = self._first_apart()
        if alone is None:
            self._make_way()
        candidates = self._continuing.candidates()
        if alone is not None:
            candidates = candidates.only(alone)
        budget = self._max_num_batched_tokens
        prompts = min(budget, self._prompt_tokens_beside(candidates))
        parts = {worker: Part(cache, budget, prompts) for worker, cache in self._caches.by_worker.items()}
        rows, grown = self._continuing.run(candidates, parts)
        if alone is None:
            admit(self._book.waiting, parts.values(), self._max_num_seqs, budget)
        if not len(rows) and not any(part.work for part in parts.values()):
            if alone is None or self._flights:
                return None
            # it cannot go on now, and must not hold the others up
            self._apart.popleft()
            return self.schedule(epoch, step)
        last = self._last if epoch == self._epoch else None
        flight = Flight.of(step, parts, rows, self._rows, self._caches.bounds(rows), self._last)
        self._last, self._epoch = flight, epoch
        self._flights.append(flight)
        self._prefix_queries += sum(part.prefix_queries for part in parts.values())
        self._prefix_hits += sum(part.prefix_hits for part in parts.values())
        return self._plans(flight, last, epoch, grown)

    def _first_apart(self) -> RunningRequest | None:
        while self._apart:
            request = self._book.requests.get(self._apart[0])
            if request is not None and request.cache is not None:
                return request
            # it has ended, or its worker is gone
            self._apart.popleft()
        return None

    def _prompt_tokens_beside(self, candidates: Candidates) -> int:
        """Most prompt tokens of a worker in a step in which these requests go on."""
        most = self._max_num_prefill_tokens
        if not candidates.any_decodes():
            return max(ALONE_TOKENS, most)
        if self._pace is None or not (candidates.others or len(self._book.waiting)):
            # there is no prompt to run, or no pace that limits it
            return most
        decodes = Counter(request.cache.worker for request in candidates.decoding_others() if request.cache is not None)
        for worker, (begin, end) in self._caches.bounds(candidates.rows).items():
            decodes[worker] += end - begin
        begun = sum(map(len, candidates.others.values())) + len(candidates.rows) - decodes.total()
        crowd = (begun + len(self._book.waiting)) / decodes.total()
        return min(most, self._pace.tokens(max(decodes.values()), crowd))

    def _make_way(self) -> None:
        """Preempt at most one request, if one client has all places, for the client that has the fewest running."""
        waiting, caches = self._book.waiting, self._caches.by_worker.values()
        if not waiting.items:
            return
        request = shortest_served(waiting, self._rows)
        victim = in_the_way(request, caches, self._rows, self._max_num_seqs)
        if victim is not None:
            self._book.replace(victim, request)

    def _plans(
        self, flight: Flight, last: Flight | None, epoch: Epoch, grown: Mapping[WorkerId, Grown]
    ) -> dict[WorkerId, StepPlan]:
        """`last` and `grown` as in `Flight.decoding`."""
        tokens_per_rank = tuple(self._max_num_batched_tokens - part.budget for part in flight.parts.values())
        silent = StepPlan(epoch=epoch, step=flight.step, tokens_per_rank=tokens_per_rank)
        plans = {}
        for worker, part in flight.parts.items():
            part.forget, part.cache.forget = tuple(part.cache.forget), []
            decoding = flight.decoding(part.cache, last, grown.get(worker), self._rows.known)
            if not part.work and not part.forget and decoding is UNCHANGED:
                # one plan for all workers that just go on, which is encoded once
                plans[worker] = silent
                continue
            plans[worker] = StepPlan(
                epoch=epoch,
                step=flight.step,
                tokens_per_rank=tokens_per_rank,
                new=tuple(s.introduction() for s, chunk in part.work if not s.introduced and s.flight[0] is chunk),
                decoding=decoding,
                chunks=tuple(chunk for _, chunk in part.work),
                finished=part.forget,
            )
        return plans

    def commit(self, results: Mapping[WorkerId, StepResult], step_s: float | None = None) -> StepOutputs:
        """Take the results of the oldest step, which took `step_s` if that is known. Returns the sampled tokens.

        Raises AssertionError if the results do not answer the plans, which is a defect of a worker. The step then
        stays in flight.
        """
        assert self._flights, "no step is in flight"
        flight = self._flights[0]
        answers = Answers(flight, results)
        self._flights.popleft()
        self._steps += 1
        if self._apart and self._apart[0] in flight.requests():
            self._apart.popleft()
        if self._pace is not None and step_s is not None:
            self._pace.met(flight.decodes, flight.prompts, step_s)
        return self._landing.land(flight, answers)

    def rollback(self) -> None:
        """The oldest step has failed: drop the work of all steps in flight, so that it is scheduled again."""
        assert self._flights, "no step is in flight"
        while self._flights:
            for part in self._flights.pop().parts.values():
                part.cache.forget = [*part.forget, *part.cache.forget]
        self._last = None
        for cache in self._caches.by_worker.values():
            for request in cache.running.items:
                cache.rollback(request)

    def in_oldest_step(self) -> list[RequestId]:
        """The requests of the oldest step in flight."""
        return self._flights[0].requests()

    def run_apart(self, request_ids: Sequence[RequestId]) -> None:
        """Run each of these requests in a step of its own before any other step: one of them makes steps fail, and
        nobody knows which. Call it after `rollback`."""
        self._apart = deque(request_ids)

    # --- Membership ---------------------------------------------------------------------------------------------

    def set_workers(
        self,
        workers: Mapping[WorkerId, int],
        state_rooms: Mapping[WorkerId, StateRoom] = MappingProxyType({}),
        window_rooms: Mapping[WorkerId, WindowRoom] = MappingProxyType({}),
    ) -> int:
        """Set the workers from the next step on, with their numbers of KV blocks, in rank order.

        `state_rooms` has the workers whose model keeps states, and `window_rooms` those whose model has layers with a
        sliding window. Requests whose worker is gone return to the queue with all their tokens; the number of these
        requests is returned. A worker with room for more or less than before counts as a new worker. A worker that
        restarted under its old name must be left out of one call first.
        """
        assert not self._flights, "the membership changes between steps"
        homeless = self._caches.replace(workers, state_rooms, window_rooms)
        for request in homeless:
            self._book.waiting.put_back(request)
        self._last = None
        return len(homeless)

    def drain(self, workers: Collection[WorkerId]) -> None:
        """Give no new requests to exactly these workers from now on. Requests that run there continue."""
        self._caches.drain(workers)

    # --- Views --------------------------------------------------------------------------------------------------

    @property
    def num_requests(self) -> int:
        """Requests that have not ended."""
        return len(self._book.requests)

    def status(self) -> EngineStatus:
        """Without what the engine adds. Totals count from the start; `steps` are committed ones, `prompt_tokens` counts
        each prompt once."""
        caches = self._caches.by_worker
        return EngineStatus(
            running={worker: len(cache.running) for worker, cache in caches.items()},
            waiting=len(self._book.waiting),
            kv_usage={worker: cache.usage for worker, cache in caches.items()},
            steps=self._steps,
            preemptions=self._book.preemptions,
            corrupted_requests=self._landing.corrupted,
            prompt_tokens=self._landing.prompt_tokens,
            generation_tokens=self._landing.generation_tokens,
            prefix_queries=self._prefix_queries,
            prefix_hits=self._prefix_hits,
        )

    def validate(self) -> None:
        """Asserts every invariant. For tests: it takes time in proportion to all blocks and tokens."""
        caches = self._caches.by_worker.values()
        for cache in caches:
            cache.validate()
            assert len(cache.running) <= min(self._max_num_seqs, cache.seats)
        self._book.validate([request for cache in caches for request in cache.running.items])
        requests = self._book.requests.values()
        assert self._rows.clients == Counter(s.client for s in requests if s.cache is not None)
        assert self._rows.calls == Counter(s.call for s in requests if s.cache is not None)
        flying: dict[RequestId, tuple[Chunk, ...]] = {}
        by_rule: Counter[RequestId] = Counter()
        for flight in self._flights:
            self._validate_flight(flight)
            for request, chunk in (piece for part in flight.parts.values() for piece in part.work):
                if request.in_flight(chunk):
                    flying[request.request_id] = (*flying.get(request.request_id, ()), chunk)
            live = self._rows.mark[flight.rows] == flight.marks
            by_rule.update(name for name, counts in zip(flight.names, live.tolist(), strict=True) if counts)
        assert flying == {s.request_id: s.flight for s in requests if s.flight}
        for request in requests:
            rule, chunks = by_rule[request.request_id], request.flight
            assert not rule or request.steady
            assert request.started == request.computed + rule + sum(chunk.length for chunk in chunks)
            assert request.known == request.length + rule + sum(chunk.samples for chunk in chunks)

    def _validate_flight(self, flight: Flight) -> None:
        for worker, part in flight.parts.items():
            assert part.cache is self._caches.by_worker[worker]
            begin, end = flight.bounds[worker]
            tokens = end - begin + sum(chunk.length for _, chunk in part.work)
            assert tokens == self._max_num_batched_tokens - part.budget
            assert part.budget >= 0
            for request, chunk in part.work:
                assert chunk.length >= 1
                assert not request.in_flight(chunk) or request.cache is part.cache
                covered = chunk.block_offset + len(chunk.block_ids)
                assert covered >= blocks_for(chunk.start + chunk.length, self._rows.block_size)
