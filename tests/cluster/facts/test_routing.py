import numpy as np
import pytest

from elastic_moe.cluster.facts.routing import (
    MAX_DECODE_WEIGHT,
    RoutingWindow,
    decode_weight,
    load_imbalance,
    load_per_worker,
    weighted_load,
)
from elastic_moe.cluster.messages.epochs import PhaseCounts, RoutingCounts
from elastic_moe.cluster.placement import EMPTY, Placement, Worker, WorkerId

L, E = 2, 4


def counts(value: int) -> RoutingCounts:
    phase = PhaseCounts(tokens=value, load=np.full((L, E), value, dtype=np.int64))
    return RoutingCounts(
        prefill=phase,
        decode=PhaseCounts(tokens=0, load=np.zeros((L, E), dtype=np.int64)),
        sample=np.ones((value, L, 2), dtype=np.uint8),
    )


def test_reports_add_up_and_leave_the_window() -> None:
    window = RoutingWindow(L, E, window_s=60.0, buckets=6)
    window.add(counts(1), 100.0)
    window.add(counts(2), 101.0)
    window.add(counts(4), 130.0)
    assert window.tokens(131.0) == 7
    assert (window.load(131.0) == 7).all()
    transitions = window.sample(131.0).transitions()
    assert transitions.sum() == transitions[0, 1, 1] == 7 * 2 * 2
    assert window.load(131.0).dtype == np.int64
    assert window.load_parts(131.0)[:, 0, 0].tolist() == [3, 4]
    assert RoutingWindow(L, E, window_s=60.0).load_parts(0.0).shape == (0, L, E)
    # the edge moves by whole buckets of 10 s
    assert window.tokens(159.0) == 7
    assert window.tokens(160.0) == 4
    assert window.tokens(1000.0) == 0
    assert not window.sample(1000.0).transitions().any()


def test_memory_does_not_grow_with_reports() -> None:
    window = RoutingWindow(L, E, window_s=60.0, buckets=6)
    for second in range(1000):
        window.add(counts(1), float(second))
        assert len(window._buckets) <= 6
    assert 50 <= window.tokens(1000.0) <= 60


def test_a_model_of_one_layer_has_no_transitions() -> None:
    window = RoutingWindow(1, E, window_s=60.0)
    phase = PhaseCounts(tokens=1, load=np.ones((1, E), np.int64))
    window.add(RoutingCounts(prefill=phase, decode=phase, sample=np.zeros((2, 1, 1), np.uint8)), 0.0)
    assert window.sample(0.0).transitions().shape == (0, E, E)


def placement(table: list[list[int]], slots: tuple[int, ...]) -> Placement:
    workers = tuple(Worker(id=WorkerId(f"w{i}"), node="n", slots=n) for i, n in enumerate(slots))
    return Placement(num_logical_experts=E, workers=workers, physical_to_logical_map=np.array(table))


def test_replicas_share_an_experts_load() -> None:
    where = placement([[0, 1, EMPTY, 0, 2, 3], [0, 1, 2, 3, EMPTY, EMPTY]], (3, 3))
    load = np.array([[8, 1, 2, 3], [4, 0, 0, 4]])
    assert load_per_worker(load, where).tolist() == [[5.0, 9.0], [4.0, 4.0]]
    assert load_imbalance(load, where).tolist() == pytest.approx([9 / 7, 1.0])


def test_uneven_workers_and_nothing_counted() -> None:
    where = placement([[0, 1, 2, 3]], (3, 1))
    assert load_imbalance(np.zeros((1, E), dtype=np.int64), where).tolist() == [1.0]
    assert load_imbalance(np.ones((1, E), dtype=np.int64), where).tolist() == [1.5]


def phase(load: list[int], steps_s: float = 0.0, steps_tokens: int = 0) -> PhaseCounts:
    return PhaseCounts(tokens=sum(load), load=np.array([load]), steps_s=steps_s, steps_tokens=steps_tokens)


def test_phases_are_kept_apart() -> None:
    window = RoutingWindow(1, E, window_s=60.0)
    nothing = np.zeros((0, 1, 1), np.uint8)
    for n in (1, 2):
        window.add(
            RoutingCounts(prefill=phase([n, 0, 0, 0], 0.5, 100), decode=phase([0, n, 0, 0]), sample=nothing), 0.0
        )
    prefill, decode = window.phases(1.0)
    assert (prefill.load.tolist(), decode.load.tolist()) == ([[3, 0, 0, 0]], [[0, 3, 0, 0]])
    assert (prefill.tokens, prefill.steps_s, prefill.steps_tokens, decode.steps_tokens) == (3, 1.0, 200, 0)


def test_tokens_are_weighted_by_their_time() -> None:
    prefill, decode = phase([10, 0, 0, 0], 1.0, 1000), phase([0, 10, 0, 0], 3.0, 1000)
    assert decode_weight(prefill, decode) == pytest.approx(3.0)
    assert weighted_load(prefill, decode).tolist() == [[5.0, 15.0, 0.0, 0.0]]


@pytest.mark.parametrize(
    ("prefill_s", "decode_s", "weight"), [(0.0, 1.0, 1.0), (1.0, 0.1, 1.0), (1e-9, 1.0, MAX_DECODE_WEIGHT)]
)
def test_weights_are_bounded(prefill_s: float, decode_s: float, weight: float) -> None:
    assert decode_weight(phase([1, 0, 0, 0], prefill_s, 10), phase([1, 0, 0, 0], decode_s, 10)) == weight
    assert weighted_load(phase([0] * E), phase([0] * E)).tolist() == [[0.0] * E]


def test_parts_that_are_over_are_told_once() -> None:
    window = RoutingWindow(L, E, window_s=60, buckets=6)
    for now in (5.0, 15.0, 16.0, 25.0):
        window.add(counts(1), now)
    assert [(number, int(load.sum())) for number, load in window.closed(-1, 25.0)] == [(0, L * E), (1, 2 * L * E)]
    assert [number for number, _ in window.closed(0, 25.0)] == [1]
    assert [number for number, _ in window.closed(1, 25.0)] == []
    assert [number for number, _ in window.closed(1, 31.0)] == [2]


def test_a_window_that_begins_again_has_the_new_subject_only() -> None:
    window = RoutingWindow(L, E, window_s=60, buckets=6)
    window.add(counts(5), 5.0)
    window.add(counts(2), 15.0)
    assert (window.taken == 7).all()
    window.begin_with(np.full((L, E), 2), 2, 15.0)
    assert (window.load(15.0) == 2).all()
    assert window.tokens(15.0) == 4
    assert not window.sample(15.0).transitions().any()
    window.add(counts(1), 16.0)
    assert (window.load(16.0) == 3).all()
    assert (window.taken == 8).all(), "what was ever taken does not begin again"
    empty = RoutingWindow(L, E, window_s=60)
    empty.begin_with(np.ones((L, E), dtype=np.int64), 2, 0.0)
    assert empty.tokens(0.0) == 0
