"""Batching under random orders of events: any order gives every request the tokens that it gets alone."""

from __future__ import annotations

import random
from collections import deque
from itertools import count

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from elastic_moe.actors.caches.kv_blocks import next_key, root_key
from elastic_moe.actors.scheduler.scheduler import Scheduler
from elastic_moe.cluster.errors import RequestError
from elastic_moe.cluster.messages.epochs import Epoch, StateRoom, WindowRoom, window_blocks
from elastic_moe.cluster.messages.grammars import Grammar, GrammarKind
from elastic_moe.cluster.messages.requests import FinishReason, GenerateRequest, RequestId, SamplingParams, TokenOutput
from elastic_moe.cluster.messages.steps import StepPlan, StepResult
from elastic_moe.cluster.placement import WorkerId
from tests.actors.simulated_worker import EOS, VOCABULARY, SimulatedWorker, alone, scores_of
from tests.properties import most

MAX_MODEL_LEN = 40
MOST_FLIGHTS = 3
TOKENS = st.integers(1, VOCABULARY - 1)
LIMIT = 20
"""Longer prompts have other keys and values, as with longrope."""

beginnings = st.builds(lambda size, step: [1 + i * step % (VOCABULARY - 1) for i in range(size)], st.integers(0, 25),
                       st.integers(1, 2))  # fmt: skip
prompts = st.builds(lambda begin, end: (*begin, *end), beginnings, st.lists(TOKENS, min_size=1, max_size=5))
requests = st.builds(
    lambda *parts: parts,
    prompts,
    st.builds(
        SamplingParams,
        max_tokens=st.integers(0, 20),
        min_tokens=st.sampled_from([0, 0, 3]),
        seed=st.integers(0, 3),
        ignore_eos=st.booleans(),
        stop_token_ids=st.sampled_from([(), (5,)]),
        logprobs=st.sampled_from([None, 0]),
        prompt_logprobs=st.sampled_from([None, None, 0]),
        grammar=st.sampled_from([None, None, Grammar(kind=GrammarKind.REGEX, text=".*")]),
    ),
    st.integers(0, 4),
    st.sampled_from(["", "", "salt"]),
    st.sampled_from([0, 0, 3]),
)


class Batching(RuleBasedStateMachine):
    """The engine's part, with simulated workers. Every rule leaves a state in which all invariants hold."""

    @initialize(
        blocks=st.lists(st.integers(2, 12), min_size=1, max_size=3),
        block_size=st.integers(1, 5),
        max_num_seqs=st.integers(1, 5),
        max_num_batched_tokens=st.integers(1, 24),
        max_num_prefill_tokens=st.none() | st.integers(1, 24),
        enable_prefix_caching=st.sampled_from([True, True, False]),
        room=st.none() | st.builds(StateRoom, seats=st.integers(1, 4), snapshots=st.integers(0, 4)),
        window=st.none() | st.tuples(st.integers(1, 9), st.integers(0, 20)),
    )
    def start(
        self,
        blocks: list[int],
        block_size: int,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_num_prefill_tokens: int | None,
        enable_prefix_caching: bool,
        room: StateRoom | None,
        window: tuple[int, int] | None,
    ) -> None:
        """`window`: tokens of it, and blocks beyond those of one request, if the model has layers with a window."""
        self.room = room
        self.windows = None
        if window is not None:
            tokens, more = window
            one = window_blocks(tokens, steps_in_flight=MOST_FLIGHTS, block_size=block_size)
            self.windows = WindowRoom(tokens=tokens, blocks=one + more, steps_in_flight=MOST_FLIGHTS)
        self.block_size = block_size
        self.budget = max_num_batched_tokens
        self.names = count()
        self.steps = count()
        self.workers: dict[WorkerId, SimulatedWorker] = {}
        for size in blocks:
            self._new_worker(size)
        self.scheduler = Scheduler(
            self._workers(),
            state_rooms=self._rooms(),
            window_rooms=self._window_rooms(),
            block_size=block_size,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            max_model_len=MAX_MODEL_LEN,
            eos_token_ids=(EOS,),
            max_num_prefill_tokens=max_num_prefill_tokens,
            enable_prefix_caching=enable_prefix_caching,
            rope_limits=(LIMIT,),
        )
        self.texts: dict[bytes, tuple[int, tuple[int, ...]]] = {}
        """What a block with this key must hold: the variant of its sequence, and the tokens."""
        self.flights: deque[dict[WorkerId, StepPlan]] = deque()
        self.results: deque[dict[WorkerId, StepResult]] = deque()
        """Of the oldest flights, as far as every worker has run them."""
        self.requests: dict[RequestId, GenerateRequest] = {}
        self.outputs: dict[RequestId, list[int]] = {}
        self.scored: dict[RequestId, int] = {}
        """Number of prompt tokens whose scores have come."""
        self.draining: set[WorkerId] = set()

    def _new_worker(self, size: int) -> None:
        worker = WorkerId(f"w{next(self.names)}")
        self.workers[worker] = SimulatedWorker(
            size, self.block_size, rope_limit=LIMIT, room=self.room, windows=self.windows, depth=MOST_FLIGHTS
        )

    def _workers(self) -> dict[WorkerId, int]:
        return {worker: len(simulated.cache) for worker, simulated in self.workers.items()}

    def _rooms(self) -> dict[WorkerId, StateRoom]:
        return {} if self.room is None else dict.fromkeys(self.workers, self.room)

    def _window_rooms(self) -> dict[WorkerId, WindowRoom]:
        return {} if self.windows is None else dict.fromkeys(self.workers, self.windows)

    @rule(spec=requests)
    def add(self, spec: tuple[tuple[int, ...], SamplingParams, int, str, int]) -> None:
        prompt, params, resumed, salt, scored = spec
        request = GenerateRequest(request_id=RequestId(f"r{next(self.names)}"), prompt_token_ids=prompt, params=params)
        full = alone(request, MAX_MODEL_LEN)
        request = GenerateRequest(
            request_id=request.request_id,
            prompt_token_ids=prompt,
            params=params,
            output_token_ids=full[:resumed],
            cache_salt=salt,
            # the first token comes after all scores
            num_scored=len(prompt) - 1 if full[:resumed] else min(scored, len(prompt) - 1),
        )
        try:
            end = self.scheduler.add(request)
        except RequestError:
            longest = min(len(prompt) + max(1, params.max_tokens), MAX_MODEL_LEN)
            assert all(len(simulated.cache) * self.block_size < longest - 1 for simulated in self.workers.values())
            return
        if end is not None:
            assert end.finish_reason is not None
            assert full == request.output_token_ids
            return
        self.requests[request.request_id] = request
        self.outputs[request.request_id] = list(request.output_token_ids)
        self.scored[request.request_id] = request.num_scored
        self._note_texts(request)

    def _note_texts(self, request: GenerateRequest) -> None:
        variant = int(len(request.prompt_token_ids) > LIMIT)
        key = root_key(salt=request.cache_salt, variant=variant)
        tokens = request.prompt_token_ids + alone(request, MAX_MODEL_LEN)
        for begin in range(0, len(tokens) - self.block_size + 1, self.block_size):
            content = tokens[begin : begin + self.block_size]
            key = next_key(key, content)
            self.texts[key] = (variant, content)

    @precondition(lambda self: self.requests)
    @rule(pick=st.randoms(use_true_random=False))
    def abort(self, pick: random.Random) -> None:
        request_id = pick.choice(list(self.requests))
        assert self.scheduler.abort(request_id)
        del self.requests[request_id], self.outputs[request_id]

    @precondition(lambda self: self.requests)
    @rule(pick=st.randoms(use_true_random=False))
    def abort_and_add_under_the_same_name(self, pick: random.Random) -> None:
        request_id = pick.choice(list(self.requests))
        assert self.scheduler.abort(request_id)
        old = self.requests.pop(request_id)
        del self.outputs[request_id]
        again = GenerateRequest(request_id=request_id, prompt_token_ids=old.prompt_token_ids[:1], params=old.params)
        self._note_texts(again)
        try:
            self.scheduler.add(again)
        except RequestError:
            return
        self.requests[request_id] = again
        self.outputs[request_id] = []
        self.scored[request_id] = 0

    @precondition(lambda self: len(self.flights) < MOST_FLIGHTS)
    @rule()
    def schedule(self) -> None:
        plans = self.scheduler.schedule(Epoch(1), next(self.steps))
        if plans is not None:
            assert list(plans) == list(self.workers)
            for plan in plans.values():
                assert max(plan.tokens_per_rank) <= self.budget
            self.flights.append(plans)

    @precondition(lambda self: len(self.results) < len(self.flights))
    @rule()
    def run(self) -> None:
        """Workers may be ahead of what the scheduler knows."""
        self.results.append(self._run(self.flights[len(self.results)], list(self.workers)))

    @precondition(lambda self: self.flights)
    @rule()
    def commit(self) -> None:
        if not self.results:
            self.run()
        self.flights.popleft()
        self._receive(self.scheduler.commit(self.results.popleft()))

    @precondition(lambda self: self.flights)
    @rule(pick=st.randoms(use_true_random=False))
    def fail_halfway(self, pick: random.Random) -> None:
        """Some workers get through more steps than others, before all are rolled back."""
        workers = list(self.workers)
        for plans in list(self.flights)[len(self.results) :]:
            workers = [worker for worker in workers if pick.random() < 0.5]
            self._run(plans, workers)
        self.flights.clear()
        self.results.clear()
        self.scheduler.rollback()

    @precondition(lambda self: not self.flights)
    @rule(pick=st.randoms(use_true_random=False), sizes=st.lists(st.integers(2, 12), max_size=2))
    def change_members(self, pick: random.Random, sizes: list[int]) -> None:
        kept = [worker for worker in self.workers if pick.random() < 0.6]
        pick.shuffle(kept)
        self.workers = {worker: self.workers[worker] for worker in kept}
        for size in sizes:
            self._new_worker(size)
        self.draining &= set(self.workers)
        self.scheduler.set_workers(self._workers(), self._rooms(), self._window_rooms())

    @precondition(lambda self: self.workers)
    @rule(pick=st.randoms(use_true_random=False))
    def drain(self, pick: random.Random) -> None:
        workers = list(self.workers)
        self.draining = set(pick.sample(workers, pick.randrange(len(workers))))
        self.scheduler.drain(self.draining)

    def _run(self, plans: dict[WorkerId, StepPlan], workers: list[WorkerId]) -> dict[WorkerId, StepResult]:
        ranks = {worker: rank for rank, worker in enumerate(plans)}
        return {worker: self.workers[worker].run(plans[worker], ranks[worker]) for worker in workers}

    def _receive(self, outputs: list[TokenOutput]) -> None:
        for output in outputs:
            request = self.requests[output.request_id]
            tokens = self.outputs[output.request_id]
            assert output.offset == len(tokens), "a token is repeated or missing"
            assert len(output.logprobs) == (0 if request.params.logprobs is None else len(output.token_ids))
            self._receive_scores(request, output)
            tokens.extend(output.token_ids)
            full = alone(request, MAX_MODEL_LEN)
            assert tuple(tokens) == full[: len(tokens)]
            if request.params.max_tokens:
                assert (output.finish_reason is not None) == (len(tokens) > 0 and tuple(tokens) == full)
            if output.finish_reason is FinishReason.STOP:
                assert tokens[-1] in (EOS, *request.params.stop_token_ids)
            if output.finish_reason is not None:
                del self.requests[output.request_id], self.outputs[output.request_id]

    def _receive_scores(self, request: GenerateRequest, output: TokenOutput) -> None:
        """No score is repeated or missing, and all come with the first token at the latest."""
        before = self.scored[request.request_id]
        if output.scores is not None:
            assert output.scores == scores_of(request.prompt_token_ids, before + 1, output.scores.end)
            self.scored[request.request_id] += len(output.scores)
        if output.token_ids or output.finish_reason is not None:
            scored, last = self.scored[request.request_id], len(request.prompt_token_ids) - 1
            assert request.params.prompt_logprobs is None or scored == last

    @invariant()
    def valid(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        self.scheduler.validate()
        assert self.scheduler.num_requests == len(self.requests)
        status = self.scheduler.status()
        assert status.waiting + sum(status.running.values()) == len(self.requests)

    @invariant()
    def known_blocks_hold_what_they_are_known_for(self) -> None:
        """Whatever a step in flight, whole or halfway, writes: it is never to a block that may be shared."""
        if not hasattr(self, "scheduler"):
            return
        for worker, home in self.scheduler._caches.by_worker.items():
            for key, block in home.pool._blocks.items():
                variant, content = self.texts[key]
                assert self.workers[worker].cache[block] == [(variant, token) for token in content]
            windows = {} if home.windows is None else home.windows.pool._blocks
            for key, block in windows.items():
                variant, content = self.texts[key]
                assert self.workers[worker].window_cache[block] == [(variant, token) for token in content]
            for key, place in home.snapshots._places.items():
                variant, content = self.texts[key]
                seen = self.workers[worker].snapshot(place)
                assert (seen[0], seen[1][-self.block_size :]) == (variant, content)

    def teardown(self) -> None:
        """Whatever happened, every request that some worker can hold ends, and nothing is left in memory."""
        if not hasattr(self, "scheduler"):
            return
        while self.flights:
            self.commit()
        self._new_worker(MAX_MODEL_LEN)
        self.scheduler.set_workers(self._workers(), self._rooms(), self._window_rooms())
        work = sum(len(r.prompt_token_ids) + r.params.max_tokens for r in self.requests.values())
        for _ in range(50 + 20 * work):
            for _ in range(MOST_FLIGHTS - len(self.flights)):
                self.schedule()
                self.scheduler.validate()
            if not self.flights:
                break
            self.commit()
            self.scheduler.validate()
        assert not self.requests, "a request starves"
        assert set(self.scheduler.status().kv_usage.values()) == {0.0}
        self._last_request_finds_the_workers_empty()

    def _last_request_finds_the_workers_empty(self) -> None:
        last = GenerateRequest(request_id=RequestId("last"), prompt_token_ids=(1,), params=SamplingParams(max_tokens=1))
        self.requests[last.request_id], self.outputs[last.request_id] = last, []
        self.scored[last.request_id] = 0
        assert self.scheduler.add(last) is None
        self.schedule()
        self.commit()
        assert [known for simulated in self.workers.values() for known in simulated.known] == ["last"]


def test_any_order_of_events_gives_every_request_the_tokens_that_it_gets_alone() -> None:
    run_state_machine_as_test(
        Batching,
        settings=settings(
            max_examples=most(100),
            stateful_step_count=60,
            deadline=None,
            suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
        ),
    )
