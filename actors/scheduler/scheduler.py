"""Continuous batching over several workers: who runs what in each lock-step step. Pure: no Ray, no torch, no clock.

The life of a request: `add` puts the request in the queue. `schedule` assigns it to a worker, gives it KV blocks for
all its tokens and runs its prompt in chunks, then one token in each step. `commit` appends the sampled tokens and
reports when the request ends. When a worker has no free block left, its newest request returns to its old place in the
queue, which is the front. It is computed again later from its prompt and output, perhaps at another worker. The same
happens to every request whose worker is gone. Prefixes that a worker's cache still holds are not computed again (see
actors/scheduler/worker_caches.py).

A request that goes on decoding costs a step nothing of its own: it is a row of columns (actors/scheduler/rows.py), it
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
from dataclasses import dataclass, field
from itertools import compress
from operator import attrgetter
from types import MappingProxyType

import numpy as np

from elastic_moe.actors.scheduler.admission import Part, admit, in_the_way, shortest_served
from elastic_moe.actors.scheduler.fair_queue import FairQueue
from elastic_moe.actors.scheduler.flights import Answers, Flight, StepOutputs, failure, output
from elastic_moe.actors.scheduler.kv_blocks import blocks_for
from elastic_moe.actors.scheduler.rows import RECENT_TOKENS, Indices, Rows, StopTokens
from elastic_moe.actors.scheduler.running_requests import RunningRequest
from elastic_moe.actors.scheduler.worker_caches import WorkerCache
from elastic_moe.cluster.errors import RequestError
from elastic_moe.cluster.messages.columns import column_of
from elastic_moe.cluster.messages.epochs import Epoch, StateRoom, WindowRoom
from elastic_moe.cluster.messages.requests import FinishReason, GenerateRequest, RequestId, TokenOutput, Tokens
from elastic_moe.cluster.messages.scores import PromptScores
from elastic_moe.cluster.messages.steps import Chunk, Decoding, Sample, StepPlan, StepResult
from elastic_moe.cluster.messages.views import EngineStatus
from elastic_moe.cluster.placement import WorkerId

ALONE_TOKENS = 512
"""Most prompt tokens in a worker's step while no request decodes. Matrix products run at full speed with so many, and
the step is short enough that a new request soon gets its part of the next one."""

_UNCHANGED = Decoding()

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
        window_rooms: Mapping[WorkerId, WindowRoom] | None = None,
    ) -> None:
        """`workers`: KV blocks of each, in rank order. `state_rooms` and `window_rooms` as in `set_workers`.
        `max_num_seqs` and `max_num_batched_tokens` are per worker.

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
        self._rows = Rows(block_size)
        self._bases: Indices = np.zeros(0, dtype=np.intp)
        """The first row of each worker, in rank order."""
        self._stops = StopTokens()
        self._flights: deque[Flight] = deque()
        """Steps in flight, oldest first."""
        self._last: Flight | None = None
        """The step from which workers can go on by rule, if there is one."""
        self._steps = self._preemptions = self._prompt_tokens = self._generation_tokens = self._epoch = 0
        self._prefix_queries = self._prefix_hits = self._corrupted = 0
        self.set_workers(workers, state_rooms or {}, window_rooms or {})

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
            return output(running_request, (), reason)
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
        self._stops.add(running_request.stop_candidates)
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
        rows = self._rows.ready()
        slow = {worker: cache.unsteady_in_order() for worker, cache in self._caches.items() if cache.unsteady}
        any_decodes = len(rows) > 0 or any(_decodes(request) for requests in slow.values() for request in requests)
        prompts = min(
            budget, self._max_num_prefill_tokens if any_decodes else max(ALONE_TOKENS, self._max_num_prefill_tokens)
        )
        parts = {worker: Part(cache, budget, prompts) for worker, cache in self._caches.items()}
        rows, grown = self._continue_rows(rows, parts, slow)
        for worker, requests in slow.items():
            self._continue(parts[worker], requests)
        admit(self._waiting, parts.values(), self._max_num_seqs, budget)
        if not len(rows) and not any(part.work for part in parts.values()):
            return None
        last = self._last if epoch == self._epoch else None
        self._last = flight = self._flight(step, parts, rows)
        self._flights.append(flight)
        self._epoch = epoch
        self._prefix_queries += sum(part.prefix_queries for part in parts.values())
        self._prefix_hits += sum(part.prefix_hits for part in parts.values())
        tokens_per_rank = tuple(budget - part.budget for part in parts.values())
        silent = StepPlan(epoch=epoch, step=step, tokens_per_rank=tokens_per_rank)
        plans = {}
        for worker, part in parts.items():
            part.forget, part.cache.forget = tuple(part.cache.forget), []
            decoding = self._decoding(part.cache, flight, last, grown.get(worker))
            if not part.work and not part.forget and decoding is _UNCHANGED:
                # one plan for all workers that just go on, which is encoded once
                plans[worker] = silent
                continue
            plans[worker] = StepPlan(
                epoch=epoch,
                step=step,
                tokens_per_rank=tokens_per_rank,
                new=tuple(s.introduction() for s, chunk in part.work if not s.introduced and s.flight[0] is chunk),
                decoding=decoding,
                chunks=tuple(chunk for _, chunk in part.work),
                finished=part.forget,
            )
        return plans

    def commit(self, results: Mapping[WorkerId, StepResult]) -> StepOutputs:
        """Take the results of the oldest step. Returns the sampled tokens.

        Raises AssertionError if the results do not answer the plans, which is a defect of a worker. The step then
        stays in flight.
        """
        assert self._flights, "no step is in flight"
        flight = self._flights[0]
        answers = Answers(flight, results)
        self._flights.popleft()
        self._steps += 1
        outputs: list[TokenOutput] = []
        tokens = self._commit_rows(flight, answers, outputs)
        for worker, part in flight.parts.items():
            for request, chunk in part.work:
                if request.in_flight(chunk):
                    self._commit_one(request, chunk, answers, worker, outputs)
        return StepOutputs(outputs, tokens)

    def rollback(self) -> None:
        """The oldest step has failed: drop the work of all steps in flight, so that it is scheduled again."""
        assert self._flights, "no step is in flight"
        while self._flights:
            for part in self._flights.pop().parts.values():
                part.cache.forget = [*part.forget, *part.cache.forget]
        self._last = None
        for cache in self._caches.values():
            for request in cache.running.items:
                cache.rollback(request)

    def in_oldest_step(self, worker: WorkerId) -> list[RequestId]:
        """The requests that `worker` runs in the oldest step in flight."""
        flight = self._flights[0]
        begin, end = flight.bounds[worker]
        return [*flight.names[begin:end], *(request.request_id for request, _ in flight.parts[worker].work)]

    # --- Requests that go on by rule ----------------------------------------------------------------------------

    def _continue_rows(
        self, rows: Indices, parts: Mapping[WorkerId, Part], slow: Mapping[WorkerId, Sequence[RunningRequest]]
    ) -> tuple[Indices, dict[WorkerId, Grown]]:
        """Run the next token of `rows`, as far as there is room. Returns those that run, and the blocks that workers
        must be told of, as in Decoding."""
        columns = self._rows
        rows = self._within_budget(rows, slow)
        preemptions = self._preemptions
        grown = self._grow_rows(rows[columns.known[rows] > columns.room[rows]])
        # the others take their blocks now too, so that nothing is preempted that runs in this step
        for request in (request for requests in slow.values() for request in requests):
            if request.cache is not None and _decodes(request):
                self._grow(request)
        if self._preemptions != preemptions:
            rows = rows[columns.steady[rows]]
            # a preempted request needs nothing, and another may have got its block
            grown = [request for request in grown if request.cache is not None]
        columns.run(rows)
        told: dict[WorkerId, Grown] = {}
        for request in grown:
            if (cache := request.cache) is not None:
                told.setdefault(cache.worker, Grown()).add(cache, request)
        for worker, (begin, end) in self._bounds(rows).items():
            parts[worker].decode_rows(end - begin)
        return rows, told

    def _grow_rows(self, rows: Indices) -> list[RunningRequest]:
        """Get a block for each of these rows, if necessary by preempting newer requests. Returns their requests."""
        needy = sorted(map(self._rows.at, rows.tolist()), key=_arrival)
        for request in needy:
            # an older request may have preempted this one meanwhile
            if request.cache is not None:
                block = request.cache.pool.allocate_one()
                if block is None:
                    self._grow(request)
                else:
                    request.blocks.append(block)
        seated = [request for request in needy if request.cache is not None]
        for request in seated:
            if request.window is not None and request.cache is not None:
                request.cache.grow_window(request)
        room = [len(request.blocks) * self._block_size for request in seated]
        self._rows.room[[request.row for request in seated]] = room
        return seated

    def _within_budget(self, rows: Indices, slow: Mapping[WorkerId, Sequence[RunningRequest]]) -> Indices:
        """Those of `rows` that may run: the oldest of each worker where there are too many."""
        budget = self._max_num_batched_tokens
        if self._max_num_seqs <= budget:
            return rows
        kept: list[Indices] = []
        for worker, (begin, end) in self._bounds(rows).items():
            own = rows[begin:end]
            others = [request for request in slow.get(worker, ()) if _decodes(request)]
            if len(own) + len(others) > budget:
                oldest = sorted([*map(self._rows.at, own.tolist()), *others], key=_arrival)[:budget]
                own = np.array(sorted(request.row for request in oldest if request.steady), dtype=np.intp)
            kept.append(own)
        if sum(map(len, kept)) == len(rows):
            return rows
        return np.sort(np.concatenate(kept))

    def _flight(self, step: int, parts: Mapping[WorkerId, Part], rows: Indices) -> Flight:
        marks, last = self._rows.mark[rows], self._last
        if last is not None and np.array_equal(last.rows, rows) and np.array_equal(last.marks, marks):
            names = last.names
        else:
            names = tuple(map(self._rows.names.__getitem__, rows.tolist()))
        return Flight(step=step, parts=parts, rows=rows, marks=marks, names=names, bounds=self._bounds(rows))

    def _decoding(self, cache: WorkerCache, flight: Flight, last: Flight | None, grown: Grown | None) -> Decoding:
        """What to tell a worker of its rows in this step. `last`: the step before, if workers can go on from it."""
        begin, end = flight.bounds[cache.worker]
        rows = flight.rows[begin:end]
        blocks, windows = (b"", b"") if grown is None else (column_of(grown.blocks), column_of(grown.windows))
        if last is not None:
            before, after = last.bounds[cache.worker]
            same = last.names is flight.names or np.array_equal(last.rows[before:after], rows)
            if end - begin == after - before and same:
                return _UNCHANGED if grown is None else Decoding(grown=blocks, grown_windows=windows)
        # the columns already have the token that this step will sample
        known = self._rows.known[rows] - 1
        seats = (rows - cache.base).astype(np.int32)
        return Decoding(seats=seats.tobytes(), known=known.tobytes(), grown=blocks, grown_windows=windows)

    def _bounds(self, rows: Indices) -> dict[WorkerId, tuple[int, int]]:
        """Where the rows of each worker begin and end in `rows`."""
        begins = np.searchsorted(rows, self._bases).tolist()
        ends = np.searchsorted(rows, self._bases + self._max_num_seqs).tolist()
        return dict(zip(self._caches, zip(begins, ends, strict=True), strict=True))

    def _commit_rows(self, flight: Flight, answers: Answers, outputs: list[TokenOutput]) -> Tokens:
        """Land the step's rows. Adds the outputs that say more than one token, and returns the others."""
        columns, rows, tokens, names = self._rows, flight.rows, answers.tokens, flight.names
        if not len(rows):
            return Tokens()
        live = columns.mark[rows] == flight.marks
        plain = live & (tokens >= 0)
        if not plain.all():
            for at in np.flatnonzero(live & ~plain).tolist():
                self._commit_one(columns.at(rows[at]), None, answers, flight.worker_at(at), outputs)
            rows, tokens, names = rows[plain], tokens[plain], tuple(compress(names, plain.tolist()))
        columns.land(rows, tokens)
        self._generation_tokens += len(rows)
        # the columns have room for so many of a request's newest tokens
        full = rows[columns.length[rows] % RECENT_TOKENS == 1]
        for row, newest in zip(full.tolist(), columns.recent[full].tolist(), strict=True):
            columns.at(row).fill(newest)
        offsets = columns.length[rows] - columns.start[rows] - 1
        ends = (columns.length[rows] >= columns.limit[rows]) | self._stops.among(tokens)
        if ends.any():
            for at in np.flatnonzero(ends).tolist():
                request = columns.at(rows[at])
                reason = request.finish_reason()
                ends[at] = reason is not None
                if reason is not None:
                    self._end(request)
                    outputs.append(output(request, (int(tokens[at]),), reason))
            names = tuple(compress(names, (~ends).tolist()))
            offsets, tokens = offsets[~ends], tokens[~ends]
        return Tokens(request_ids=names, offsets=offsets.tobytes(), token_ids=tokens.tobytes())

    # --- Requests one by one ------------------------------------------------------------------------------------

    def _commit_one(
        self,
        request: RunningRequest,
        chunk: Chunk | None,
        answers: Answers,
        worker: WorkerId,
        outputs: list[TokenOutput],
    ) -> None:
        """Land a request's chunk; None: its token that went by rule. Adds the output, if there is one."""
        cache, result, name = request.cache, answers.results[worker], request.request_id
        assert cache is not None
        if name in result.corrupted:
            outputs.append(self._give_up(request))
            return
        if reason := result.reason_of_end(name):
            self._end(request)
            outputs.append(failure(request, reason, refused=True))
            return
        unready = name in result.unready
        landed = True
        if unready:
            landed = cache.commit_but_last(request)
        else:
            cache.commit(request)
        wanted = landed and chunk is not None and chunk.score_from is not None
        found = answers.scores[worker].get(name) if wanted else None
        assert found is None or found.end == request.scored + 1, f"{worker} has scored other tokens"
        if (chunk is None or chunk.samples) and not unready:
            outputs.append(self._append(request, answers.samples[worker][name], found))
        elif found is not None:
            outputs.append(output(request, (), None, scores=found))

    def _continue(self, part: Part, requests: Sequence[RunningRequest]) -> None:
        """Continue these requests of this worker: one token of each that decodes, then the prompts that have begun."""
        present = [request for request in requests if request.cache is not None and not request.exhausted]
        for request in present:
            if request.remaining == 1 and part.budget:
                part.decode(request)
        for request in present:
            # those that have just run their newest token go on by rule
            if request.remaining > 1 and part.room:
                part.prefill(request)

    def _grow(self, request: RunningRequest) -> None:
        """Get a block for the request's newest token, if necessary by preempting the worker's newest request, which
        may be this one."""
        cache = request.cache
        assert cache is not None
        while len(request.blocks) * self._block_size < request.known:
            if cache.pool.num_free:
                cache.grow(request, cache.pool.allocate(1))
                return
            newest = cache.running.items[-1]
            self._requeue(newest)
            self._preemptions += 1
            if newest is request:
                return

    def _append(self, request: RunningRequest, sample: Sample, scores: PromptScores | None) -> TokenOutput:
        if not request.counted:
            request.counted = True
            self._prompt_tokens += request.num_prompt_tokens
        request.append(sample.token_id)
        if not request.params.max_tokens:
            self._end(request)
            # nobody gets the token that has ended it
            del request.tokens[-1]
            return output(request, (), FinishReason.LENGTH, scores=scores)
        self._generation_tokens += 1
        reason = request.finish_reason()
        if reason is not None:
            self._end(request)
        return output(request, (sample.token_id,), reason, sample, scores)

    def _give_up(self, request: RunningRequest) -> TokenOutput:
        """End a request whose logits are not numbers, and make sure that no request shares its KV-cache blocks."""
        assert request.cache is not None
        request.cache.unshare(request)
        self._corrupted += 1
        self._end(request, spoilt=True)
        return failure(request, CORRUPTED)

    def _end(self, request: RunningRequest, *, spoilt: bool = False) -> None:
        request.ended = True
        self._stops.remove(request.stop_candidates)
        del self._requests[request.request_id]
        if request.cache is not None:
            request.cache.drop(request, spoilt=spoilt)
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
        request = shortest_served(self._waiting, self._rows)
        victim = in_the_way(request, self._caches.values(), self._rows, self._max_num_seqs)
        if victim is not None:
            assert victim.cache is not None
            victim.cache.drop(victim)
            self._waiting.put_first(request)
            self._waiting.enter(victim)
            self._preemptions += 1

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
        requeued = 0
        rooms = {worker: (n, state_rooms.get(worker), window_rooms.get(worker)) for worker, n in workers.items()}
        for worker, cache in self._caches.items():
            if rooms.get(worker) != cache.whole_room:
                requeued += len(cache.running)
                for request in cache.running.items.copy():
                    self._requeue(request)
        old = self._caches
        self._caches = {}
        for worker, room in rooms.items():
            kept = old.get(worker)
            if kept is not None and kept.whole_room == room:
                self._caches[worker] = old.pop(worker)
        for cache in old.values():
            cache.close()
        for worker, (blocks, state_room, window_room) in rooms.items():
            # this keeps the order of ranks
            kept = self._caches.pop(worker, None)
            self._caches[worker] = kept or WorkerCache(
                worker,
                blocks,
                self._rows,
                max_num_seqs=self._max_num_seqs,
                prefix_caching=self._enable_prefix_caching,
                state_room=state_room,
                window_room=window_room,
            )
        self._bases = np.array([cache.base for cache in self._caches.values()], dtype=np.intp)
        self._last = None
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
            kv_usage={worker: cache.usage for worker, cache in self._caches.items()},
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
        assert self._rows.clients == Counter(s.client for s in self._requests.values() if s.cache is not None)
        assert self._rows.calls == Counter(s.call for s in self._requests.values() if s.cache is not None)
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
        by_rule: Counter[RequestId] = Counter()
        for flight in self._flights:
            self._validate_flight(flight)
            for request, chunk in (piece for part in flight.parts.values() for piece in part.work):
                if request.in_flight(chunk):
                    flying.setdefault(request.request_id, []).append(chunk)
            live = self._rows.mark[flight.rows] == flight.marks
            by_rule.update(name for name, counts in zip(flight.names, live.tolist(), strict=True) if counts)
        assert flying == {s.request_id: s.flight for s in self._requests.values() if s.flight}
        for request in self._requests.values():
            rule, chunks = by_rule[request.request_id], request.flight
            assert not rule or request.steady
            assert request.started == request.computed + rule + sum(chunk.length for chunk in chunks)
            assert request.known == request.length + rule + sum(chunk.samples for chunk in chunks)

    def _validate_flight(self, flight: Flight) -> None:
        for worker, part in flight.parts.items():
            assert part.cache is self._caches[worker]
            begin, end = flight.bounds[worker]
            tokens = end - begin + sum(chunk.length for _, chunk in part.work)
            assert tokens == self._max_num_batched_tokens - part.budget
            assert part.budget >= 0
            for request, chunk in part.work:
                assert chunk.length >= 1
                assert not request.in_flight(chunk) or request.cache is part.cache
                covered = chunk.block_offset + len(chunk.block_ids)
                assert covered >= blocks_for(chunk.start + chunk.length, self._block_size)


@dataclass(slots=True)
class Grown:
    """The blocks that one worker must be told of in a step, as in Decoding."""

    blocks: list[int] = field(default_factory=list)
    windows: list[int] = field(default_factory=list)

    def add(self, cache: WorkerCache, request: RunningRequest) -> None:
        """Add the last block of a request."""
        seat, number = request.row - cache.base, len(request.blocks) - 1
        self.blocks += (seat, number, request.blocks[-1])
        if request.window is not None:
            self.windows += (seat, number, request.window.blocks[-1])


def _decodes(request: RunningRequest) -> bool:
    """Whether a running request has only its newest token to run."""
    return request.remaining == 1 and not request.exhausted


_arrival = attrgetter("arrival")
