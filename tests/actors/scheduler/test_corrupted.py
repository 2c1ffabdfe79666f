"""Requests whose logits are not numbers: they end with an error, and those beside them go on."""

from __future__ import annotations

import dataclasses

import pytest

from elastic_moe.actors.scheduler.scheduler import Scheduler
from elastic_moe.cluster.messages.requests import FinishReason, RequestId, TokenOutput
from elastic_moe.cluster.messages.steps import StepResult
from tests.actors.batches import A, answers, plan, request, scheduler, step

BAD = RequestId("bad")


def broken(result: StepResult) -> StepResult:
    """As a worker says it."""
    samples = tuple(sample for sample in result.samples if sample.request_id != BAD)
    corrupted = (BAD,) if len(samples) < len(result.samples) else ()
    return dataclasses.replace(result, samples=samples, corrupted=corrupted)


def broken_step(s: Scheduler) -> list[TokenOutput]:
    outputs = s.commit({worker: broken(result) for worker, result in answers(plan(s)).items()})
    s.validate()
    return outputs


def test_a_request_without_a_token_ends_with_an_error_and_others_go_on() -> None:
    s = scheduler({A: 16})
    s.add(request("good", max_tokens=3))
    s.add(request(BAD, max_tokens=3))
    first = step(s)
    assert [output.token_ids for output in first] == [(7,), (7,)]
    good, bad = broken_step(s)
    assert (good.request_id, good.token_ids) == ("good", (7,))
    assert (bad.request_id, bad.token_ids, bad.finish_reason, bad.offset) == (BAD, (), FinishReason.ERROR, 1)
    assert bad.error is not None
    assert "not numbers" in bad.error
    assert [(o.request_id, o.finish_reason) for o in step(s)] == [("good", FinishReason.LENGTH)]
    assert s.status().corrupted_requests == 1
    assert s.status().kv_usage == {A: 0.0}


def test_a_step_in_flight_of_a_failed_request_is_ignored() -> None:
    s = scheduler({A: 16})
    s.add(request(BAD, max_tokens=8))
    plans, ahead = plan(s, 1), plan(s, 2)
    (end,) = s.commit({worker: broken(result) for worker, result in answers(plans).items()})
    assert end.finish_reason is FinishReason.ERROR
    assert not s.commit({w: broken(r) for w, r in answers(ahead).items()})
    s.validate()
    assert s.status().corrupted_requests == 1


def test_blocks_of_a_failed_request_are_not_shared() -> None:
    s = scheduler({A: 16}, enable_prefix_caching=True)
    for name, ending in (("first", step), (BAD, broken_step)):
        s.add(request(name, prompt=10, max_tokens=1))
        (output,) = ending(s)
        assert output.finish_reason is not None
    s.add(request("last", prompt=10, max_tokens=1))
    assert step(s)[0].cached_tokens == 0


def test_a_result_for_a_request_that_was_not_to_be_sampled_is_a_defect() -> None:
    s = scheduler({A: 16})
    s.add(request("good"))
    results = {w: dataclasses.replace(r, corrupted=(BAD,)) for w, r in answers(plan(s)).items()}
    with pytest.raises(AssertionError, match="gives up what it was not asked for"):
        s.commit(results)
