"""Clients take turns: in the queue, and where one has all the places."""

from __future__ import annotations

import dataclasses
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastic_moe.actors.caches.running_requests import RunningRequest
from elastic_moe.actors.scheduler.fair_queue import OVERTAKEN, FairQueue
from elastic_moe.actors.scheduler.scheduler import Scheduler
from elastic_moe.cluster.messages.requests import GenerateRequest
from tests.actors.batches import A, B, ids, plan, request, scheduler, step


def of(client: str, name: str, prompt: int = 4, **params: object) -> GenerateRequest:
    return dataclasses.replace(request(f"{client}{name}", prompt, **params), client=client)


def waiting(
    client: str, arrival: int, prompt: int = 4, *, name: str | None = None, priority: int = 0
) -> RunningRequest:
    asked = dataclasses.replace(of(client, name or str(arrival), prompt), priority=priority)
    return RunningRequest(asked, arrival=arrival, max_model_len=1000, eos=())


def served(queue: FairQueue, count: int) -> list[str]:
    names = []
    for _ in range(count):
        sequence = queue.items[0]
        queue.start(sequence)
        names.append(sequence.client)
    return names


def test_one_client_is_served_in_order_of_arrival() -> None:
    queue = FairQueue()
    prompts = [4, 40, 1, 7, 30]
    for arrival, prompt in enumerate(prompts):
        queue.enter(waiting("a", arrival, prompt))
    assert [sequence.arrival for sequence in queue.items] == [0, 1, 2, 3, 4]


def test_a_new_clients_request_goes_before_the_backlog_of_another() -> None:
    queue = FairQueue()
    for arrival in range(1000):
        queue.enter(waiting("greedy", arrival))
    assert served(queue, 3) == ["greedy"] * 3
    for arrival in range(1000, 1003):
        queue.enter(waiting("new", arrival))
    assert served(queue, 6) == ["new", "greedy", "new", "greedy", "new", "greedy"]


def test_turns_are_counted_in_tokens() -> None:
    queue = FairQueue()
    for arrival in range(8):
        queue.enter(waiting("long", arrival, 3 * 256))
        queue.enter(waiting("short", 100 + arrival, 0))
    assert Counter(served(queue, 10)) == {"short": 8, "long": 2}


@given(st.lists(st.tuples(st.text(max_size=2), st.integers(0, 700)), min_size=1, max_size=200))
def test_no_client_starves(newcomers: list[tuple[str, int]]) -> None:
    """However many come meanwhile, as many clients or as one."""
    queue = FairQueue()
    for arrival in range(3):
        queue.enter(waiting("x", arrival, 100))
    last = queue.items[-1]
    rounds = 0
    while last in queue.items:
        client, prompt = newcomers[rounds % len(newcomers)]
        rounds += 1
        queue.enter(waiting(client, 100 + rounds, prompt))
        queue.start(queue.items[0])
        queue.validate()
        assert rounds < 40


def test_clients_that_are_gone_are_forgotten() -> None:
    queue = FairQueue()
    for arrival in range(1000):
        queue.enter(waiting(f"client {arrival}", arrival))
        queue.start(queue.items[0])
    assert len(queue._upcoming) < 100


def test_a_call_for_many_answers_takes_turns_with_the_clients_next_call() -> None:
    queue = FairQueue()
    for arrival in range(6):
        queue.enter(waiting("a", arrival, name=f"first-{arrival}"))
    queue.start(queue.items[0])
    queue.enter(waiting("b", 10))
    for arrival in range(20, 22):
        queue.enter(waiting("a", arrival, name=f"second-{arrival}"))
    queue.validate()
    order = []
    while queue.items:
        order.append(queue.items[0].arrival)
        queue.start(queue.items[0])
        queue.validate()
    assert order.index(10) <= 1
    order.remove(10)
    assert order == [20, 1, 21, 2, 3, 4, 5]


@given(st.lists(st.tuples(st.sampled_from("ab"), st.sampled_from("xyz"), st.booleans()), max_size=60))
def test_the_queue_stays_in_order(events: list[tuple[str, str, bool]]) -> None:
    queue = FairQueue()
    left: list[RunningRequest] = []
    for arrival, (client, call, leaves) in enumerate(events):
        queue.enter(waiting(client, arrival, arrival % 7, name=f"{call}-{arrival}"))
        if leaves:
            left.append(queue.items[0])
            queue.start(queue.items[0])
        elif len(left) > 1:
            queue.put_back(left.pop(0))
            queue.enter(left.pop(0))
        queue.validate()


# --- Places that run --------------------------------------------------------------------------------------------


def fill(s: Scheduler, count: int, client: str = "g") -> None:
    for n in range(count):
        s.add(of(client, str(n), max_tokens=40))
    for _ in range(4):
        step(s)


def clients(s: Scheduler) -> Counter[str]:
    return Counter(q.client for home in s._caches.by_worker.values() for q in home.running.items)


def test_a_newcomer_need_not_wait_for_another_clients_answers() -> None:
    s = scheduler({A: 200, B: 200}, max_num_seqs=4)
    fill(s, 20)
    assert clients(s) == {"g": 8}
    s.add(of("n", "0"))
    plans = plan(s)
    assert "n0" in [*ids(plans, A), *ids(plans, B)]
    assert s.num_requests == 21


def test_a_newcomer_gets_memory_as_well_as_seats() -> None:
    s = scheduler({A: 20}, max_num_seqs=8)
    fill(s, 5)
    assert clients(s) == {"g": 5}
    s.add(of("n", "0", 24, max_tokens=4))
    for _ in range(5):
        step(s)
    assert clients(s)["n"] == 1


def test_two_clients_do_not_preempt_each_other_by_turns() -> None:
    """Until the two have the same; from then on each keeps what it has."""
    s = scheduler({A: 200, B: 200}, max_num_seqs=4)
    fill(s, 20)
    for n in range(20):
        s.add(of("n", str(n), max_tokens=40))
    for _ in range(20):
        step(s)
    assert clients(s)["n"] >= 1
    assert s.status().preemptions <= 4


def test_a_clients_next_call_need_not_wait_for_its_last_one() -> None:
    s = scheduler({A: 200, B: 200}, max_num_seqs=4)
    for n in range(20):
        s.add(of("g", f"first-{n}", max_tokens=40))
    for _ in range(4):
        step(s)
    s.add(of("g", "second-0"))
    plans = plan(s)
    assert "gsecond-0" in [*ids(plans, A), *ids(plans, B)]


def test_one_client_is_never_preempted_for_its_own() -> None:
    s = scheduler({A: 200}, max_num_seqs=4)
    fill(s, 20)
    for _ in range(10):
        step(s)
    assert s.status().preemptions == 0


def test_every_request_ends_with_all_its_tokens() -> None:
    s = scheduler({A: 60}, max_num_seqs=3)
    made: Counter[str] = Counter()
    for n in range(12):
        s.add(of("gn"[n % 3 == 2], str(n), max_tokens=9))
    for _ in range(200):
        if not s.num_requests:
            break
        for output in step(s):
            assert output.offset == made[output.request_id]
            made[output.request_id] += len(output.token_ids)
    assert set(made.values()) == {9}
    assert len(made) == 12


@pytest.mark.parametrize("client", ["new", "greedy"])
def test_each_of_many_small_requests_gets_a_place_soon(client: str) -> None:
    """And not only the first: turns stand still while all places are taken."""
    s = scheduler({A: 400, B: 400}, max_num_seqs=4, max_num_batched_tokens=64, max_model_len=1024)
    for call in range(4):
        for choice in range(16):
            s.add(of("greedy", f"{call}-{choice}", max_tokens=900))
    for _ in range(20):
        step(s)
    for number in range(5):
        small = of(client, f"small{number}-0", max_tokens=5)
        s.add(small)
        ended = False
        for _ in range(12):
            ended = ended or any(output.request_id == small.request_id and output.finish_reason for output in step(s))
        assert ended, number


# --- Priorities -------------------------------------------------------------------------------------------------


def test_a_lower_number_is_served_earlier() -> None:
    queue = FairQueue()
    for arrival, priority in enumerate([0, 5, -1, 0, -1, 2]):
        queue.enter(waiting("a", arrival, priority=priority))
        queue.validate()
    assert [sequence.arrival for sequence in queue.items] == [2, 4, 0, 3, 5, 1]


def test_priority_takes_no_turn_of_another_client() -> None:
    queue = FairQueue()
    for arrival in range(4):
        queue.enter(waiting("modest", arrival))
        queue.enter(waiting("urgent", 10 + arrival, priority=-1000))
    assert Counter(served(queue, 4)) == {"modest": 2, "urgent": 2}


def test_a_request_of_low_priority_does_not_starve() -> None:
    queue = FairQueue()
    last = waiting("a", 0, priority=10**9)
    queue.enter(last)
    rounds = 0
    while last in queue.items:
        rounds += 1
        queue.enter(waiting("a", rounds, priority=0))
        queue.enter(waiting("b", 10**6 + rounds, priority=-7))
        queue.start(queue.items[0])
        queue.start(queue.items[0])
        queue.validate()
        assert rounds <= OVERTAKEN + 2


def test_a_low_priority_preempts_no_higher_one_of_its_client() -> None:
    s = scheduler({A: 400}, max_num_seqs=4, max_num_batched_tokens=64, max_model_len=1024)
    for choice in range(8):
        s.add(of("a", f"many-{choice}", max_tokens=50))
    step(s)
    s.add(dataclasses.replace(of("a", "later-0", max_tokens=5), priority=1))
    for _ in range(5):
        step(s)
    assert s.status().preemptions == 0
    s.add(of("a", "equal-0", max_tokens=5))
    step(s)
    assert s.status().preemptions == 1
