"""Continuous batching over several workers: who runs what in each lock-step step. Pure: no Ray, no torch, no clock.

The life of a request: `add` puts it in the queue. `schedule` gives it a home worker with KV blocks for all its tokens
and runs its prompt in chunks, then one token a step. `commit` appends what was sampled and tells when it ends.
When a worker is out of blocks, its newest request goes back to the queue (to the place it had, so the front) and is
computed again later, from prompt and output, perhaps elsewhere. So does every request whose worker is gone. What a
worker's cache still holds of it is not computed again (see actors/scheduler/homes.py).

Several steps may be in flight, each made as if those before it were done already: a host feeds the token that it has
just sampled. That a request ends for its length is known ahead; that it ends with a stop token is not, and then the
step after runs one token too many, which is thrown away. Hosts run steps in order, so that a block that was freed
meanwhile may be handed out at once.

A step is a transaction: what `schedule` has made counts when `commit` takes its results, oldest step first, and after
`rollback` the work of all steps in flight is scheduled again. Requests may be added and aborted at any time.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Mapping

from elastic_moe.actors.scheduler.admission import Part, admit, in_the_way, shortest_served
from elastic_moe.actors.scheduler.fair_queue import FairQueue
from elastic_moe.actors.scheduler.homes import Home
from elastic_moe.actors.scheduler.kv_blocks import blocks_for
from elastic_moe.actors.scheduler.sequences import Sequence
from elastic_moe.cluster.errors import RequestError
from elastic_moe.cluster.messages.epochs import Epoch
from elastic_moe.cluster.messages.requests import FinishReason, GenerateRequest, RequestId, TokenOutput
from elastic_moe.cluster.messages.steps import Chunk, Sample, StepPlan, StepResult
from elastic_moe.cluster.messages.views import EngineStatus
from elastic_moe.cluster.placement import WorkerId

ALONE_TOKENS = 512
"""Of prompts in a worker's step while nobody decodes: enough for products to run at full speed, and few enough that a
request which comes meanwhile gets its part of the next step soon, beside the others and on another worker."""

CORRUPTED = (
    "the model's logits for this request are not numbers (NaN or infinity): its weights may be damaged, "
    "or --dtype too narrow for them"
)


class Scheduler:
    """The queue, and what runs where. Not thread-safe."""

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
    ) -> None:
        """`workers`: KV blocks of each, in rank order. `max_num_seqs` and `max_num_batched_tokens` are per worker.

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
        self._homes: dict[WorkerId, Home] = {}
        self._waiting = FairQueue()
        self._sequences: dict[RequestId, Sequence] = {}
        self._arrivals = 0
        self._flights: deque[tuple[int, dict[WorkerId, Part]]] = deque()
        """Steps in flight, with every worker's part, oldest first."""
        self._steps = self._preemptions = self._prompt_tokens = self._generation_tokens = self._epoch = 0
        self._prefix_queries = self._prefix_hits = self._corrupted = 0
        self.set_workers(workers)

    # --- Requests -----------------------------------------------------------------------------------------------

    def add(self, request: GenerateRequest) -> TokenOutput | None:
        """Queue a request. Returns its end at once if it is resumed and nothing is left to generate, else None.

        Raises RequestError, naming the field, where it can never be served.
        """
        self._check(request)
        sequence = Sequence(
            request,
            arrival=self._arrivals,
            max_model_len=self._max_model_len,
            eos=tuple(dict.fromkeys((*self._eos_token_ids, *request.eos_token_ids))),
            variant=self._variant(len(request.prompt_token_ids)),
        )
        if reason := sequence.finish_reason():
            return _output(sequence, (), reason)
        # With no worker at all there is nothing to compare with: it waits for one.
        if self._homes and not any(home.can_ever_hold(sequence) for home in self._homes.values()):
            room = self._block_size * max((home.pool.num_blocks for home in self._homes.values()), default=0)
            raise RequestError(
                f"the prompt has {sequence.num_prompt_tokens} tokens and max_tokens is {request.params.max_tokens}: "
                f"no worker's KV cache holds more than {room} tokens",
                param="prompt" if sequence.num_prompt_tokens > room else "max_tokens",
                code="context_length_exceeded",
            )
        self._arrivals += 1
        self._sequences[request.request_id] = sequence
        self._waiting.enter(sequence)
        return None

    def _variant(self, prompt: int) -> int:
        """Prompts of this many tokens share keys and values with prompts of the same variant only."""
        if self._rope_growth_limit is not None and prompt > self._rope_growth_limit:
            return len(self._rope_limits) + prompt
        return sum(prompt > limit for limit in self._rope_limits)

    def abort(self, request_id: RequestId) -> bool:
        """Forget a request, whatever it is doing. Returns whether it was there; nothing more is output for it."""
        sequence = self._sequences.get(request_id)
        if sequence is None:
            return False
        self._end(sequence)
        return True

    def _check(self, request: GenerateRequest) -> None:
        prompt, params = len(request.prompt_token_ids), request.params
        if request.request_id in self._sequences:
            raise RequestError(f"request {request.request_id!r} is already running", param="request_id", status=409)
        if not prompt:
            raise RequestError("the prompt is empty", param="prompt")
        if params.max_tokens < 1:
            raise RequestError(f"max_tokens: expected at least 1, got {params.max_tokens}", param="max_tokens")
        if prompt >= self._max_model_len:
            raise RequestError(
                f"the prompt has {prompt} tokens: the model's longest context is {self._max_model_len} tokens, "
                "the answer included",
                param="prompt",
                code="context_length_exceeded",
            )

    # --- Steps --------------------------------------------------------------------------------------------------

    def schedule(self, epoch: Epoch, step: int) -> dict[WorkerId, StepPlan] | None:
        """Every worker's plan of the next step, or None when there is nothing to run.

        Decoding sequences come first, then prompts that have begun, then new ones, each in its order. A step
        lasts as long as its longest part, so while anybody decodes, all workers run few tokens of prompts.
        """
        self._make_way()
        budget = self._max_num_batched_tokens
        decoding = any(home.decoding for home in self._homes.values())
        prompts = min(
            budget, self._max_num_prefill_tokens if decoding else max(ALONE_TOKENS, self._max_num_prefill_tokens)
        )
        parts = {worker: Part(home, budget, prompts) for worker, home in self._homes.items()}
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
            part.forget, part.home.forget = tuple(part.home.forget), []
            plans[worker] = StepPlan(
                epoch=epoch,
                step=step,
                tokens_per_rank=tokens_per_rank,
                new=tuple(s.introduction() for s, chunk in part.work if not s.told and s.flight[0] is chunk),
                chunks=tuple(chunk for _, chunk in part.work),
                finished=part.forget,
            )
        return plans

    def commit(self, results: Mapping[WorkerId, StepResult]) -> list[TokenOutput]:
        """The oldest step is done: lengths advance, and the sampled tokens are returned in the order of the plans.

        Results that do not answer the plans are a defect of a host: AssertionError, and the step is still in flight.
        """
        assert self._flights, "no step is in flight"
        step, parts = self._flights[0]
        assert set(results) == set(parts), "a worker's result is missing, or is of no member"
        assert all(result.step == step for result in results.values()), "a result of another step"
        samples = {worker: {sample.request_id: sample for sample in results[worker].samples} for worker in parts}
        for worker, part in parts.items():
            expected = {chunk.request_id for _, chunk in part.work if chunk.samples}
            corrupted = set(results[worker].corrupted)
            assert samples[worker].keys() | corrupted == expected, f"{worker} has not sampled what it was asked to"
            assert not samples[worker].keys() & corrupted, f"{worker} has sampled what it says it could not"
        self._flights.popleft()
        self._steps += 1
        outputs: list[TokenOutput] = []
        for worker, part in parts.items():
            for sequence, chunk in part.work:
                if not sequence.flies(chunk):
                    continue
                if sequence.request_id in results[worker].corrupted:
                    outputs.append(self._give_up(sequence))
                    continue
                part.home.commit(sequence)
                if chunk.samples:
                    outputs.append(self._append(sequence, samples[worker][sequence.request_id]))
        return outputs

    def rollback(self) -> None:
        """The oldest step failed somewhere: nothing in flight counts, and all its work is scheduled again."""
        assert self._flights, "no step is in flight"
        while self._flights:
            _, parts = self._flights.pop()
            for part in parts.values():
                part.home.forget = [*part.forget, *part.home.forget]
        for home in self._homes.values():
            for sequence in home.running.items:
                home.rollback(sequence)

    def _continue(self, part: Part) -> None:
        """Run what is at home here: each decoding sequence one token, then the prompts that have begun."""
        home = part.home
        ready = [sequence for sequence in home.running.items if not sequence.exhausted]
        prefilling = [sequence for sequence in ready if sequence.remaining > 1]
        decoding = [sequence for sequence in ready if sequence.remaining == 1]
        for sequence in decoding:
            # Preempted meanwhile for an older one.
            if sequence.home is None:
                continue
            if not part.budget:
                break
            if self._grow(part, sequence):
                part.decode(sequence)
        for sequence in prefilling:
            if part.room and sequence.home is not None:
                part.prefill(sequence)

    def _grow(self, part: Part, sequence: Sequence) -> bool:
        """Find a block for its newest token, if need be by preempting the newest here. False: that was itself."""
        home = part.home
        while len(sequence.blocks) * self._block_size < sequence.known:
            if home.pool.num_free:
                sequence.blocks += home.pool.allocate(1)
                break
            newest = home.running.items[-1]
            self._requeue(newest)
            self._preemptions += 1
            if newest is sequence:
                return False
        return True

    def _append(self, sequence: Sequence, sample: Sample) -> TokenOutput:
        sequence.tokens.append(sample.token_id)
        self._generation_tokens += 1
        if not sequence.counted:
            sequence.counted = True
            self._prompt_tokens += sequence.num_prompt_tokens
        reason = sequence.finish_reason()
        if reason is not None:
            self._end(sequence)
        return _output(sequence, (sample.token_id,), reason, sample)

    def _give_up(self, sequence: Sequence) -> TokenOutput:
        """End a request whose logits are not numbers; nobody is to begin with what it left in the KV cache."""
        assert sequence.home is not None
        sequence.home.pool.forget(sequence.blocks)
        self._corrupted += 1
        self._end(sequence)
        return TokenOutput(
            request_id=sequence.request_id,
            offset=sequence.num_output,
            token_ids=(),
            finish_reason=FinishReason.ERROR,
            error=CORRUPTED,
        )

    def _end(self, sequence: Sequence) -> None:
        sequence.ended = True
        del self._sequences[sequence.request_id]
        if sequence.home is not None:
            sequence.home.drop(sequence)
        else:
            self._waiting.remove(sequence)

    def _requeue(self, sequence: Sequence) -> None:
        assert sequence.home is not None
        sequence.home.drop(sequence)
        self._waiting.put_back(sequence)

    def _make_way(self) -> None:
        """For the client that has fewest running, where another has all the places. At most one a step, which is soon
        over."""
        if not self._waiting.items:
            return
        sequence = shortest_served(self._waiting, self._homes.values())
        victim = in_the_way(sequence, self._homes.values(), self._max_num_seqs)
        if victim is not None:
            assert victim.home is not None
            victim.home.drop(victim)
            self._waiting.put_first(sequence)
            self._waiting.enter(victim)
            self._preemptions += 1

    # --- Membership ---------------------------------------------------------------------------------------------

    def set_workers(self, workers: Mapping[WorkerId, int]) -> int:
        """The members from the next step on, with their KV blocks, in rank order.

        Requests whose home is gone return to the queue with all their tokens; how many, is returned. A worker that is
        listed with another number of blocks counts as a new one; so must one that restarted under its old name be left
        out once first.
        """
        assert not self._flights, "the membership changes between steps"
        requeued = 0
        for worker, home in self._homes.items():
            if workers.get(worker) != home.pool.num_blocks:
                requeued += len(home.running)
                for sequence in home.running.items.copy():
                    self._requeue(sequence)
        old = self._homes
        self._homes = {}
        for worker, num_kv_blocks in workers.items():
            kept = old.get(worker)
            if kept is None or kept.pool.num_blocks != num_kv_blocks:
                kept = Home(worker, num_kv_blocks, self._block_size, prefix_caching=self._enable_prefix_caching)
            self._homes[worker] = kept
        return requeued

    def drain(self, workers: Collection[WorkerId]) -> None:
        """From now on give no new requests to exactly these; those that run there go on."""
        for home in self._homes.values():
            home.draining = home.worker in workers

    # --- Views --------------------------------------------------------------------------------------------------

    @property
    def num_requests(self) -> int:
        """Requests that have not ended."""
        return len(self._sequences)

    def status(self) -> EngineStatus:
        """Totals count from the start; `steps` are committed ones, `prompt_tokens` counts each prompt once."""
        return EngineStatus(
            running={worker: len(home.running) for worker, home in self._homes.items()},
            waiting=len(self._waiting),
            kv_usage={worker: home.pool.usage for worker, home in self._homes.items()},
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
        for home in self._homes.values():
            home.validate()
            assert len(home.running) <= self._max_num_seqs
        homed = {s.request_id: s for home in self._homes.values() for s in home.running.items}
        waiting = {s.request_id: s for s in self._waiting.items}
        assert len(homed) == sum(len(home.running) for home in self._homes.values()), "a request has two homes"
        assert not homed.keys() & waiting.keys()
        assert homed | waiting == self._sequences, "a request is lost"
        self._waiting.validate()
        for sequence in self._sequences.values():
            assert not sequence.ended
            assert sequence.num_prompt_tokens <= len(sequence.tokens) < sequence.longest <= self._max_model_len
        for sequence in self._waiting.items:
            assert sequence.home is None
            assert not sequence.blocks
            assert sequence.computed == sequence.told_blocks == 0
            assert not sequence.flight
        flying: dict[RequestId, list[Chunk]] = {}
        for _, parts in self._flights:
            self._validate_flight(parts)
            for sequence, chunk in (piece for part in parts.values() for piece in part.work):
                if sequence.flies(chunk):
                    flying.setdefault(sequence.request_id, []).append(chunk)
        assert flying == {s.request_id: s.flight for s in self._sequences.values() if s.flight}

    def _validate_flight(self, parts: Mapping[WorkerId, Part]) -> None:
        for worker, part in parts.items():
            assert part.home is self._homes[worker]
            tokens = sum(chunk.length for _, chunk in part.work)
            assert tokens == self._max_num_batched_tokens - part.budget
            assert part.budget >= 0
            for sequence, chunk in part.work:
                assert chunk.length >= 1
                assert not sequence.flies(chunk) or sequence.home is part.home
                covered = chunk.block_offset + len(chunk.block_ids)
                assert covered >= blocks_for(chunk.start + chunk.length, self._block_size)


def _output(
    sequence: Sequence, tokens: tuple[int, ...], reason: FinishReason | None, sample: Sample | None = None
) -> TokenOutput:
    return TokenOutput(
        request_id=sequence.request_id,
        offset=sequence.num_output - len(tokens),
        token_ids=tokens,
        cached_tokens=sequence.cached_tokens or 0,
        logprobs=(sample.logprobs,) if sample is not None and sample.logprobs is not None else (),
        finish_reason=reason,
        stop_token_id=sequence.stop_token_id() if reason is FinishReason.STOP else None,
    )
