"""Batching, event by event. Memory and membership are in test_memory.py, random orders in test_random.py."""

import dataclasses

import pytest

from elastic_moe.actors.scheduler.prefill_pace import PrefillPace
from elastic_moe.cluster.errors import RequestError
from elastic_moe.cluster.messages.epochs import Epoch
from elastic_moe.cluster.messages.requests import FinishReason, GenerateRequest, RequestId, TokenLogprobs, TokenOutput
from elastic_moe.cluster.messages.steps import Sample, StepResult
from tests.actors.batches import EOS, A, B, answers, ids, plan, request, scheduler, step

# --- What is refused --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bad", "param", "words"),
    [
        (request("r", prompt=0), "prompt", "empty"),
        (request("r", prompt=64), "prompt", "64 tokens"),
        (request("r", max_tokens=-1), "max_tokens", "at least 0"),
        (request("r", prompt=30, max_tokens=30), "max_tokens", "no worker's KV cache holds more than 40"),
        (request("r", prompt=50, max_tokens=1), "prompt", "no worker's KV cache holds more than 40"),
    ],
)
def test_refuses_what_can_never_be_served(bad: GenerateRequest, param: str, words: str) -> None:
    s = scheduler({A: 10})
    with pytest.raises(RequestError, match=words) as raised:
        s.add(bad)
    assert raised.value.param == param
    assert s.num_requests == 0
    s.validate()


def test_the_last_token_needs_no_place_in_the_cache() -> None:
    s = scheduler({A: 2})
    s.add(request("r", prompt=4, max_tokens=5))
    with pytest.raises(RequestError, match="KV cache"):
        s.add(request("q", prompt=4, max_tokens=6))
    for _ in range(5):
        outputs = step(s)
    assert outputs[0].finish_reason is FinishReason.LENGTH


def test_refuses_a_request_id_in_use_until_it_is_free() -> None:
    s = scheduler({A: 10})
    s.add(request("r"))
    with pytest.raises(RequestError, match="already running") as raised:
        s.add(request("r"))
    assert raised.value.status == 409
    s.abort(RequestId("r"))
    s.add(request("r"))


def test_requests_share_their_parameters_and_keep_their_seeds() -> None:
    s = scheduler({A: 10})
    for name, seed, top_k in (("a", 5, 2), ("b", 6, 2), ("c", 6, 3)):
        s.add(request(name, seed=seed, top_k=top_k))
    first, second, other = s._book.requests.values()
    assert first.params is second.params
    assert first.params is not other.params
    (new,) = (worker_plan.new for worker_plan in plan(s).values())
    assert [(sequence.params.seed, sequence.params.top_k) for sequence in new] == [(5, 2), (6, 2), (6, 3)]


@pytest.mark.parametrize("name", ["block_size", "max_num_seqs", "max_num_batched_tokens", "max_model_len"])
def test_refuses_impossible_settings(name: str) -> None:
    with pytest.raises(ValueError, match="must be positive"):
        scheduler({A: 10}, **{name: 0})


# --- How a request ends -----------------------------------------------------------------------------------------


def test_stops_at_the_end_of_sequence() -> None:
    s = scheduler({A: 10})
    s.add(request("r"))
    assert step(s, 5) == [TokenOutput(request_id=RequestId("r"), offset=0, token_ids=(5,))]
    (output,) = step(s, EOS)
    assert output == TokenOutput(
        request_id=RequestId("r"), offset=1, token_ids=(EOS,), finish_reason=FinishReason.STOP, stop_token_id=None
    )
    assert s.num_requests == 0
    assert s.schedule(Epoch(1), 9) is None


def test_stops_at_the_tokenizers_own_end_of_sequence() -> None:
    s = scheduler({A: 10})
    s.add(dataclasses.replace(request("r", min_tokens=1), eos_token_ids=(9,)))
    plans = plan(s)
    assert plans[A].new[0].eos_token_ids == (EOS, 9)
    (output,) = s.commit(answers(plans, 9))
    assert (output.finish_reason, output.stop_token_id) == (FinishReason.STOP, None)


@pytest.mark.parametrize(
    ("params", "token", "reason", "stop"),
    [
        ({"ignore_eos": True}, EOS, None, None),
        ({"stop_token_ids": (9,)}, 9, FinishReason.STOP, 9),
        ({"stop_token_ids": (EOS,)}, EOS, FinishReason.STOP, None),
        ({"stop_token_ids": (EOS,), "ignore_eos": True}, EOS, FinishReason.STOP, EOS),
        ({"max_tokens": 1}, 5, FinishReason.LENGTH, None),
        ({"max_tokens": 1}, EOS, FinishReason.STOP, None),
        ({"min_tokens": 2}, EOS, None, None),
        ({"max_tokens": 1, "min_tokens": 1, "stop_token_ids": (9,)}, 9, FinishReason.STOP, 9),
    ],
)
def test_how_the_first_token_ends_it(
    params: dict[str, object], token: int, reason: FinishReason | None, stop: int | None
) -> None:
    s = scheduler({A: 10})
    s.add(request("r", **params))
    (output,) = step(s, token)
    assert (output.finish_reason, output.stop_token_id) == (reason, stop)


def test_ends_at_the_models_length() -> None:
    s = scheduler({A: 10}, max_model_len=6)
    s.add(request("r", prompt=4, max_tokens=100))
    assert step(s)[0].finish_reason is None
    assert step(s)[0].finish_reason is FinishReason.LENGTH


def test_logprobs_are_passed_on() -> None:
    s = scheduler({A: 10})
    s.add(request("r"))
    entry = TokenLogprobs(token_id=7, logprob=-0.5, top=((7, -0.5),))
    results = answers(plan(s))
    sample = dataclasses.replace(results[A].samples[0], logprobs=entry)
    (output,) = s.commit({A: dataclasses.replace(results[A], samples=(sample,))})
    assert output.logprobs == (entry,)


# --- Resumed requests -------------------------------------------------------------------------------------------


def test_a_resumed_request_goes_on_where_it_was() -> None:
    s = scheduler({A: 10})
    assert s.add(request("r", output=(5, 6, 7), max_tokens=5)) is None
    plans = plan(s)
    assert plans[A].new[0].token_ids == (1, 2, 3, 4, 5, 6, 7)
    assert plans[A].new[0].num_prompt_tokens == 4
    assert s.commit(answers(plans))[0].offset == 3
    (output,) = step(s)
    assert (output.offset, output.finish_reason) == (4, FinishReason.LENGTH)


@pytest.mark.parametrize(
    ("output", "params", "reason"),
    [
        ((5, 6), {"max_tokens": 2}, FinishReason.LENGTH),
        ((5, EOS), {}, FinishReason.STOP),
        ((5, 9), {"stop_token_ids": (9,)}, FinishReason.STOP),
    ],
)
def test_a_resumed_request_that_had_ended_ends_at_once(
    output: tuple[int, ...], params: dict[str, object], reason: FinishReason
) -> None:
    s = scheduler({A: 10})
    end = s.add(request("r", output=output, **params))
    assert end is not None
    assert (end.offset, end.token_ids, end.finish_reason) == (2, (), reason)
    assert s.num_requests == 0


# --- Steps ------------------------------------------------------------------------------------------------------


def test_prompts_run_in_chunks_after_decodes() -> None:
    s = scheduler({A: 30}, max_num_batched_tokens=10)
    s.add(request("r", prompt=4))
    s.add(request("q", prompt=17))
    plans = plan(s)
    assert [(c.request_id, c.start, c.length, c.samples) for c in plans[A].chunks] == [
        ("r", 0, 4, True),
        ("q", 0, 6, False),
    ]
    s.commit(answers(plans))
    plans = plan(s)
    assert plans[A].new == ()
    assert [(c.request_id, c.start, c.length, c.samples) for c in plans[A].chunks] == [
        ("r", 4, 1, True),
        ("q", 6, 9, False),
    ]
    assert plans[A].tokens_per_rank == (10,)
    s.commit(answers(plans))
    plans = plan(s)
    assert [(c.request_id, c.start, c.length, c.samples) for c in plans[A].chunks] == [
        ("r", 5, 1, True),
        ("q", 15, 2, True),
    ]


def test_every_worker_gets_a_plan_of_the_same_sizes() -> None:
    s = scheduler({A: 10, B: 10})
    s.add(request("r", prompt=5))
    plans = plan(s)
    assert list(plans) == [A, B]
    assert plans[A].tokens_per_rank == plans[B].tokens_per_rank == (5, 0)
    assert plans[B].chunks == ()


def test_homes_are_the_least_loaded() -> None:
    s = scheduler({A: 30, B: 30}, max_num_batched_tokens=32)
    for name, prompt in [("r0", 20), ("r1", 4), ("r2", 4), ("r3", 4)]:
        s.add(request(name, prompt=prompt))
    plans = plan(s)
    # as many on each; among equals, where fewer tokens wait
    assert ids(plans, A) == ["r0", "r3"]
    assert ids(plans, B) == ["r1", "r2"]


def test_prompts_run_in_small_pieces_while_anybody_decodes() -> None:
    """On every worker: a step lasts as long as its longest part."""
    s = scheduler({A: 30, B: 30}, max_num_prefill_tokens=6)
    s.add(request("long alone", prompt=16))
    assert [chunk.length for chunk in plan(s)[A].chunks] == [16]
    s.rollback()
    step(s)
    for name in ("q", "r", "p"):
        s.add(request(name, prompt=8))
    lengths = []
    for _ in range(3):
        plans = plan(s)
        lengths.append([{c.request_id: c.length for c in p.chunks} for p in plans.values()])
        s.commit(answers(plans))
    assert lengths == [
        [{"long alone": 1, "r": 6}, {"q": 6}],
        [{"long alone": 1, "r": 2}, {"q": 2, "p": 4}],
        [{"long alone": 1, "r": 1}, {"q": 1, "p": 4}],
    ]


def test_prompts_beside_decodes_are_cut_by_the_time_that_steps_take() -> None:
    s = scheduler({A: 60}, max_num_batched_tokens=64, pace=PrefillPace(8))
    s.add(request("decodes", prompt=4, max_tokens=60))
    step(s)
    lengths = []
    for name in ("", "", "first", "", "", "second", ""):
        if name:
            s.add(request(name, prompt=44))
        plans = plan(s)
        prompt = plans[A].tokens_per_rank[0] - 1
        # a decode takes 40 ms, and a prompt's token 1.6 ms
        s.commit(answers(plans), 0.04 + 0.0016 * max(0, prompt))
        lengths.append(prompt)
    assert lengths[:3] == [0, 0, 8]
    # as many wait as decode
    assert lengths[3] == pytest.approx(37, abs=1)


def test_a_request_whose_last_token_is_in_flight_does_not_decode() -> None:
    s = scheduler({A: 30}, max_num_prefill_tokens=6)
    s.add(request("one token", prompt=8, max_tokens=1))
    ahead = plan(s)
    s.add(request("next", prompt=16))
    assert [chunk.length for chunk in plan(s)[A].chunks] == [16]
    s.commit(answers(ahead))


def test_no_more_than_max_num_seqs_run_on_a_worker() -> None:
    s = scheduler({A: 30, B: 30}, max_num_seqs=2)
    for i in range(6):
        s.add(request(f"r{i}", prompt=1))
    plan(s)
    status = s.status()
    assert status.running == {A: 2, B: 2}
    assert status.waiting == 2


def test_few_tokens_a_step_still_serve_every_request() -> None:
    s = scheduler({A: 30}, max_num_batched_tokens=2)
    for i in range(4):
        s.add(request(f"r{i}", prompt=3, max_tokens=4))
    for _ in range(60):
        if not s.num_requests:
            break
        step(s)
    assert s.num_requests == 0


def test_a_worker_forgets_with_the_next_plan() -> None:
    s = scheduler({A: 30})
    s.add(request("r", max_tokens=1))
    step(s)
    assert s.schedule(Epoch(1), 1) is None
    s.add(request("q"))
    assert plan(s)[A].finished == ("r",)


def test_a_step_that_failed_is_scheduled_again() -> None:
    s = scheduler({A: 30})
    s.add(request("old", max_tokens=1))
    step(s)
    s.add(request("r"))
    first = plan(s)
    s.rollback()
    s.validate()
    assert plan(s) == first
    assert s.commit(answers(first))[0].offset == 0
    second = plan(s)
    s.rollback()
    assert plan(s) == second
    assert second[A].finished == ()
    assert s.status().generation_tokens == 2


def test_results_that_do_not_answer_the_plans_change_nothing() -> None:
    s = scheduler({A: 30, B: 30})
    s.add(request("r"))
    plans = plan(s)
    good = answers(plans)
    for bad in ({A: good[A]}, good | {A: dataclasses.replace(good[A], samples=())}):
        with pytest.raises(AssertionError):
            s.commit(bad)
    with pytest.raises(AssertionError, match="another step"):
        s.commit({worker: dataclasses.replace(result, step=9) for worker, result in good.items()})
    assert [output.offset for output in s.commit(good)] == [0]


def test_block_ids_are_sent_until_a_step_is_done() -> None:
    s = scheduler({A: 30})
    s.add(request("r", prompt=4))
    chunk = plan(s)[A].chunks[0]
    assert (chunk.block_offset, len(chunk.block_ids)) == (0, 1)
    s.rollback()
    assert plan(s)[A].chunks[0] == chunk
    s.commit({A: StepResult(step=0, samples=(Sample(request_id=chunk.request_id, token_id=7),), compute_s=0.0)})
    chunk = plan(s)[A].chunks[0]
    assert (chunk.block_offset, len(chunk.block_ids), chunk.start, chunk.known) == (1, 1, 4, 5)


# --- Aborts -----------------------------------------------------------------------------------------------------


def test_abort_while_waiting_running_and_in_flight() -> None:
    s = scheduler({A: 30})
    assert not s.abort(RequestId("r"))
    s.add(request("r"))
    assert s.abort(RequestId("r"))
    assert s.schedule(Epoch(1), 0) is None

    s.add(request("r"))
    s.add(request("q"))
    plans = plan(s)
    assert s.abort(RequestId("r"))
    s.validate()
    assert [output.request_id for output in s.commit(answers(plans))] == ["q"]
    s.abort(RequestId("q"))
    s.validate()
    assert s.status().kv_usage == {A: 0.0}
    s.add(request("p"))
    assert plan(s)[A].finished == ("r", "q")


def test_a_new_request_of_an_aborted_ones_name_does_not_get_its_token() -> None:
    s = scheduler({A: 30})
    s.add(request("r"))
    plans = plan(s)
    s.abort(RequestId("r"))
    s.add(request("r", prompt=6))
    assert not s.commit(answers(plans))
    plans = plan(s)
    assert plans[A].finished == ("r",)
    assert plans[A].new[0].num_prompt_tokens == 6
    assert plans[A].chunks[0].length == 6
