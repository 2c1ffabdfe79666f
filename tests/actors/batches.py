"""Schedulers, requests and results for tests of batching, in a line each."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

from elastic_moe.actors.scheduler.scheduler import Scheduler
from elastic_moe.cluster.messages.epochs import Epoch
from elastic_moe.cluster.messages.requests import GenerateRequest, RequestId, SamplingParams, TokenOutput
from elastic_moe.cluster.messages.seats import Seats
from elastic_moe.cluster.messages.steps import Decoding, Sample, StepPlan, StepResult
from elastic_moe.cluster.placement import WorkerId

EOS = 0
A, B = WorkerId("a"), WorkerId("b")
Plans = dict[WorkerId, StepPlan]


def scheduler(workers: dict[WorkerId, int], *, enable_prefix_caching: bool = False, **changes: Any) -> Scheduler:
    """Without prefix caching: the prompts of these tests begin alike."""
    settings = {
        "block_size": 4,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 16,
        "max_model_len": 64,
    } | changes
    return Scheduler(workers, **settings, eos_token_ids=(EOS,), enable_prefix_caching=enable_prefix_caching)


def request(name: str, prompt: int = 4, output: tuple[int, ...] = (), **params: object) -> GenerateRequest:
    return GenerateRequest(
        request_id=RequestId(name),
        prompt_token_ids=tuple(range(1, prompt + 1)),
        params=SamplingParams(**({"max_tokens": 8} | params)),  # type: ignore[arg-type]
        output_token_ids=output,
    )


_SEATS: WeakKeyDictionary[Scheduler, defaultdict[WorkerId, Seats]] = WeakKeyDictionary()


def try_plan(s: Scheduler, step: int = 0) -> Plans | None:
    """The next plans as workers see them: with a chunk for each sequence that goes on by rule."""
    plans = s.schedule(Epoch(1), step)
    s.validate()
    seats = _SEATS.setdefault(s, defaultdict(Seats))
    return plans and {
        worker: replace(p, chunks=seats[worker].chunks(p), decoding=Decoding()) for worker, p in plans.items()
    }


def plan(s: Scheduler, step: int = 0) -> Plans:
    plans = try_plan(s, step)
    assert plans is not None
    return plans


def answers(plans: Plans, token: int = 7) -> dict[WorkerId, StepResult]:
    return {
        worker: StepResult(
            step=p.step,
            samples=tuple(Sample(request_id=c.request_id, token_id=token) for c in p.chunks if c.samples),
            compute_s=0.0,
        )
        for worker, p in plans.items()
    }


def step(s: Scheduler, token: int = 7) -> list[TokenOutput]:
    outputs = list(s.commit(answers(plan(s), token)))
    s.validate()
    return outputs


def ids(plans: Plans, worker: WorkerId) -> list[str]:
    return [chunk.request_id for chunk in plans[worker].chunks]
