"""Batching where memory is short, and where workers come and go."""

from __future__ import annotations

from elastic_moe.cluster.messages.epochs import Epoch
from tests.actors.batches import A, B, answers, ids, plan, request, scheduler, step

# --- Out of memory ----------------------------------------------------------------------------------------------


def test_the_newest_is_preempted_and_computed_again() -> None:
    s = scheduler({A: 4})
    s.add(request("old", prompt=8, max_tokens=7))
    s.add(request("new", prompt=7, max_tokens=4))
    step(s)
    plans = plan(s)
    assert s.status().preemptions == 1
    assert ids(plans, A) == ["old"]
    assert plans[A].finished == ("new",)
    s.commit(answers(plans))
    assert s.status().running == {A: 1}
    while s.status().running[A] == 1 and s.num_requests == 2:
        step(s)
    plans = plan(s)
    assert plans[A].new[0].token_ids == (*range(1, 8), 7)
    assert s.commit(answers(plans))[0].offset == 1


def test_a_large_request_is_not_starved_by_small_ones() -> None:
    s = scheduler({A: 8}, max_num_seqs=4)
    for i in range(100):
        # One ends and one comes in every step, so that all blocks are never free by chance.
        s.add(request(f"small{i}", prompt=4, max_tokens=4))
        if i == 8:
            s.add(request("large", prompt=20, max_tokens=4))
        plans = plan(s)
        s.commit(answers(plans))
        if "large" in ids(plans, A):
            break
    assert i <= 12
    assert s.status().waiting == i - 8


def test_small_requests_pass_a_large_one_on_workers_that_cannot_hold_it() -> None:
    s = scheduler({A: 8, B: 4})
    s.add(request("r", prompt=16, max_tokens=4))
    step(s)
    s.add(request("large", prompt=20, max_tokens=4))
    s.add(request("small", prompt=4, max_tokens=4))
    plans = plan(s)
    assert ids(plans, A) == ["r"]
    assert ids(plans, B) == ["small"]


# --- Membership -------------------------------------------------------------------------------------------------


def test_requests_of_a_worker_that_is_gone_go_on_elsewhere() -> None:
    s = scheduler({A: 10, B: 10})
    s.add(request("r"))
    s.add(request("q"))
    plans = plan(s)
    assert (ids(plans, A), ids(plans, B)) == (["r"], ["q"])
    s.commit(answers(plans, 5))
    plan(s)
    s.rollback()
    s.set_workers({B: 10})
    s.validate()
    plans = plan(s)
    assert plans[B].tokens_per_rank == (6,)
    assert [(c.request_id, c.start, c.length) for c in plans[B].chunks] == [("q", 4, 1), ("r", 0, 5)]
    assert plans[B].new[0].token_ids == (1, 2, 3, 4, 5)
    assert {output.request_id: output.offset for output in s.commit(answers(plans))} == {"q": 1, "r": 1}
    assert s.status().preemptions == 0


def test_new_workers_become_homes_and_ranks_may_change() -> None:
    s = scheduler({A: 10})
    s.add(request("r"))
    step(s)
    s.set_workers({B: 10, A: 10})
    s.add(request("q"))
    plans = plan(s)
    assert list(plans) == [B, A]
    assert (ids(plans, B), ids(plans, A)) == (["q"], ["r"])
    assert plans[A].tokens_per_rank == (4, 1)


def test_a_draining_worker_gets_no_new_requests() -> None:
    s = scheduler({A: 10, B: 10})
    s.add(request("r"))
    step(s)
    s.drain([A])
    s.set_workers({A: 10, B: 10})
    s.add(request("q"))
    s.add(request("p"))
    plans = plan(s)
    assert (ids(plans, A), ids(plans, B)) == (["r"], ["q", "p"])
    s.rollback()
    s.drain([])
    s.add(request("n"))
    assert ids(plan(s), A) == ["r", "n"]


def test_requests_of_a_worker_that_leaves_are_counted() -> None:
    s = scheduler({A: 10, B: 10})
    s.add(request("r"))
    s.add(request("q"))
    step(s)
    assert s.set_workers({B: 10, A: 10}) == 0
    assert s.set_workers({B: 10}) == 1


def test_requests_wait_for_a_worker_when_there_is_none() -> None:
    s = scheduler({A: 10})
    s.add(request("r", prompt=30))
    s.set_workers({})
    assert s.schedule(Epoch(1), 0) is None
    s.add(request("q"))
    s.set_workers({B: 4})
    assert ids(plan(s), B) == ["q"]
    s.rollback()
    s.set_workers({B: 4, A: 10})
    assert ids(plan(s), A) == ["r"]


def test_status_counts() -> None:
    s = scheduler({A: 10, B: 10})
    s.add(request("r", prompt=5, max_tokens=2))
    step(s)
    status = s.status()
    assert (status.steps, status.prompt_tokens, status.generation_tokens) == (1, 5, 1)
    assert status.kv_usage == {A: 0.2, B: 0.0}
