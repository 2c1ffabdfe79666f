"""Requests that go on by rule: what plans say of them, and what comes of their columns."""

from __future__ import annotations

import pytest

from elastic_moe.actors.scheduler.flights import StepOutputs
from elastic_moe.actors.scheduler.scheduler import Scheduler
from elastic_moe.cluster.messages.columns import NO_TOKEN, column_of, integers
from elastic_moe.cluster.messages.epochs import Epoch
from elastic_moe.cluster.messages.requests import FinishReason, RequestId
from elastic_moe.cluster.messages.seats import Seats
from elastic_moe.cluster.messages.steps import Decoding, StepPlan, StepResult
from elastic_moe.cluster.placement import WorkerId
from tests.actors.batches import EOS, A, B, answers, request, scheduler

Plans = dict[WorkerId, StepPlan]


class Workers:
    """Two steps ahead of what is committed, if asked; tokens are `token` for all."""

    def __init__(self, s: Scheduler) -> None:
        self.s = s
        self.steps = 0
        self.seats = {A: Seats(), B: Seats()}

    def plan(self, epoch: int = 1) -> Plans:
        self.steps += 1
        plans = self.s.schedule(Epoch(epoch), self.steps)
        self.s.validate()
        assert plans is not None
        return plans

    def results(self, plans: Plans, token: int = 7) -> dict[WorkerId, StepResult]:
        results = {}
        for worker, plan in plans.items():
            chunks = self.seats[worker].chunks(plan)
            told = answers({worker: plan}, token)[worker].samples
            by_rule = len(chunks) - len(plan.chunks)
            results[worker] = StepResult(
                step=plan.step, samples=told, tokens=column_of([token] * by_rule), compute_s=0.0
            )
        return results

    def step(self, token: int = 7) -> StepOutputs:
        outputs = self.s.commit(self.results(self.plan(), token))
        self.s.validate()
        return outputs


def decoding(plans: Plans, worker: WorkerId = A) -> tuple[list[int] | None, list[int], list[int]]:
    told = plans[worker].decoding
    return None if told.seats is None else integers(told.seats), integers(told.known), integers(told.grown)


def test_a_plan_is_silent_about_requests_that_go_on() -> None:
    s = scheduler({A: 20}, block_size=4)
    workers = Workers(s)
    for name in ("p", "q"):
        s.add(request(name, prompt=4, max_tokens=20))
    first = workers.plan()
    assert [c.request_id for c in first[A].chunks] == ["p", "q"]
    assert decoding(first) == ([], [], []), "nothing goes on"
    s.commit(workers.results(first))
    second = workers.plan()
    assert not second[A].chunks
    assert decoding(second) == ([0, 1], [5, 5], [0, 1, 2, 1, 1, 3]), "each has needed a block"
    outputs = s.commit(workers.results(second, 8))
    assert not outputs.single
    assert [(o.request_id, o.offset, o.token_ids) for o in outputs] == [("p", 1, (8,)), ("q", 1, (8,))]
    for _ in range(3):
        plans = workers.plan()
        assert (plans[A].decoding, plans[A].chunks) == (Decoding(), ())
        s.commit(workers.results(plans))
    assert decoding(workers.plan()) == (None, [], [0, 2, 4, 1, 2, 5]), "only the new blocks are told"


def test_seats_are_told_when_they_change() -> None:
    s = scheduler({A: 30, B: 30})
    workers = Workers(s)
    for name in ("p", "q", "r", "s"):
        s.add(request(name, prompt=5, max_tokens=20))
    workers.step()
    workers.step()
    s.abort(RequestId("p"))
    plans = workers.plan()
    assert (decoding(plans, A), plans[A].finished) == (([1], [7], []), ("p",))
    assert plans[B].decoding == Decoding(), "nothing changes there"
    s.commit(workers.results(plans))
    s.add(request("new", prompt=3, max_tokens=20))
    plans = workers.plan()
    assert [(new.request_id, new.seat) for new in plans[A].new] == [("new", 0)], "the seat of the one that left"
    assert decoding(plans)[0] is None
    s.commit(workers.results(plans))
    assert decoding(workers.plan())[0] == [0, 1]


def test_all_is_told_in_another_epoch_and_after_a_failure() -> None:
    s = scheduler({A: 20})
    workers = Workers(s)
    s.add(request("p", prompt=4, max_tokens=20))
    for _ in range(3):
        workers.step()
    plans = workers.plan(epoch=2)
    assert decoding(plans)[:2] == ([0], [7])
    s.commit(workers.results(plans))
    ahead = [workers.plan(epoch=2), workers.plan(epoch=2)]
    assert all(plans[A].decoding.seats is None for plans in ahead)
    s.rollback()
    s.validate()
    again = workers.plan(epoch=3)
    (chunk,) = again[A].chunks
    # the worker may not have heard of the block that it was given in a failed step
    assert (chunk.start, chunk.known, chunk.block_offset, len(chunk.block_ids)) == (7, 8, 2, 1)
    assert decoding(again)[0] == []
    s.commit(workers.results(again))
    assert decoding(workers.plan(epoch=3))[:2] == ([0], [9])


def test_ends_are_told_and_columns_have_the_rest() -> None:
    s = scheduler({A: 30}, max_num_seqs=4)
    workers = Workers(s)
    s.add(request("short", prompt=3, max_tokens=3))
    s.add(request("deaf", prompt=3, max_tokens=20, ignore_eos=True))
    s.add(request("long", prompt=3, max_tokens=20))
    s.add(request("stops", prompt=3, max_tokens=20, stop_token_ids=(9,)))
    workers.step()
    outputs = workers.step(9)
    assert [(o.request_id, o.finish_reason, o.stop_token_id) for o in outputs.single] == [
        ("stops", FinishReason.STOP, 9)
    ]
    assert outputs.tokens.request_ids == ("short", "deaf", "long")
    outputs = workers.step(EOS)
    assert {o.request_id: o.finish_reason for o in outputs.single} == {
        "short": FinishReason.STOP,
        "long": FinishReason.STOP,
    }
    assert [(o.request_id, o.offset, o.token_ids) for o in outputs.tokens] == [("deaf", 2, (EOS,))]
    assert s.num_requests == 1


def test_results_must_have_a_token_for_each() -> None:
    s = scheduler({A: 20})
    workers = Workers(s)
    for name in ("p", "q"):
        s.add(request(name, prompt=3, max_tokens=20))
    workers.step()
    plans = workers.plan()
    good = workers.results(plans)
    for wrong in ([7], [7, 7, 7], [7, NO_TOKEN]):
        bad = StepResult(step=plans[A].step, samples=(), tokens=column_of(wrong), compute_s=0.0)
        with pytest.raises(AssertionError, match="sampled"):
            s.commit({A: bad})
    assert len(s.commit(good)) == 2, "the step was still in flight"


def test_tokens_survive_a_preemption_in_the_middle_of_a_block() -> None:
    """The newest tokens lie in a column until a block is full."""
    s = scheduler({A: 7}, block_size=4)
    workers = Workers(s)
    s.add(request("old", prompt=8, max_tokens=20))
    s.add(request("new", prompt=8, max_tokens=8))
    tokens = iter(range(10, 100))
    seen: dict[str, list[int]] = {"old": [], "new": []}
    while s.num_requests:
        for output in workers.step(next(tokens)):
            assert output.offset == len(seen[output.request_id])
            seen[output.request_id] += output.token_ids
    assert s.status().preemptions
    assert (len(seen["old"]), len(seen["new"])) == (20, 8)
    assert seen["old"] == list(range(10, 30))
