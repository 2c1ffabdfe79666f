"""Reading, cutting, counting and generating traces; metrics against a token-by-token replay."""

import functools
import io
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from elastic_moe.cluster.facts.routing import RoutingWindow
from elastic_moe.cluster.placement import Placement, contiguous
from elastic_moe.optimizer.core.problem import Semantics
from elastic_moe.optimizer.study.generate import generate_trace
from elastic_moe.optimizer.study.metrics import measure, serving_ranks
from elastic_moe.optimizer.study.scenario import make_workers
from elastic_moe.optimizer.study.simulate import count_routing
from elastic_moe.optimizer.study.traces import Trace, TraceError, concatenate, count, load_trace, part_loads, save_trace


def small(tokens: int = 40, experts: int = 6) -> Trace:
    return generate_trace(
        num_layers=3, num_experts=experts, top_k=2, num_tokens=tokens, tokens_per_request=7, num_themes=4
    )


def test_a_trace_survives_the_disk(tmp_path: Path) -> None:
    trace = small()
    save_trace(tmp_path / "t.npz", trace)
    read = load_trace(tmp_path / "t.npz")
    assert np.array_equal(read.topk_ids, trace.topk_ids)
    assert read.request_lengths.tolist() == trace.request_lengths.tolist()
    assert read.num_experts == 6


GOOD = {"topk_ids": np.array([[[0, 1]], [[2, 1]]], dtype=np.uint8), "request_lengths": np.array([2])}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"topk_ids": None}, "the key topk_ids is missing"),
        ({"request_lengths": None}, "the key request_lengths is missing"),
        ({"topk_ids": np.zeros((2, 2), dtype=np.uint8)}, "topk_ids must be integers"),
        ({"topk_ids": np.zeros((2, 1, 2))}, "topk_ids must be integers"),
        ({"topk_ids": np.zeros((0, 1, 2), dtype=np.uint8)}, "topk_ids is empty"),
        ({"topk_ids": np.array([[[0, -1]], [[2, 1]]])}, "topk_ids holds -1"),
        ({"topk_ids": np.array([[[0, 70000]], [[2, 1]]])}, "topk_ids holds 70000"),
        ({"topk_ids": np.array([[[0, 1]], [[1, 1]]])}, "names an expert twice for token 1 in layer 0"),
        ({"topk_ids": np.array([[[0, 9]], [[2, 1]]])}, "topk_ids holds expert 9, the model has 4"),
        ({"request_lengths": np.array([1])}, "request_lengths sum to 1, topk_ids has 2 tokens"),
        ({"request_lengths": np.array([2, 0])}, "request_lengths must be positive"),
        ({"topk_weights": np.array([[[1, np.nan]], [[1, 1]]])}, "topk_weights holds a value that is not finite"),
        ({"topk_weights": np.ones((2, 1))}, "topk_weights must be floats of the shape"),
        (
            {"request_lengths": np.array([2**63, 2**63 + 2], dtype=np.uint64)},
            "request_lengths sum to 18446744073709551618",
        ),
        ({"num_logical_experts": np.int64(10**12)}, "expected 1 to 32768 experts per layer, got 1000000000000"),
        ({"num_logical_experts": np.float64("nan")}, "num_logical_experts must be one integer"),
    ],
)
def test_bad_traces_are_refused_in_one_line(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    path = tmp_path / "bad.npz"
    np.savez(path, **{k: v for k, v in (GOOD | changes).items() if v is not None})
    with pytest.raises(TraceError, match=message) as caught:
        load_trace(path, None if "num_logical_experts" in changes else 4)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


@functools.cache
def archive(compressed: bool) -> bytes:
    sink = io.BytesIO()
    (np.savez_compressed if compressed else np.savez)(sink, **GOOD)  # type: ignore[operator]
    return sink.getvalue()


@settings(deadline=None, max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    compressed=st.booleans(),
    changes=st.lists(st.tuples(st.integers(0, 700), st.integers(0, 255)), min_size=1, max_size=6),
)
# a header that announces 10^16 tokens
@example(compressed=False, changes=[])
def test_a_damaged_archive_is_refused_in_one_line(
    tmp_path: Path, compressed: bool, changes: list[tuple[int, int]]
) -> None:
    data = bytearray(archive(compressed))
    for at, byte in changes:
        data[at % len(data)] = byte
    if not changes:
        data = bytearray(bytes(data).replace(b"(2, 1, 2), }" + b" " * 15, b"(" + b"9" * 16 + b", 1, 2), }"))
    path = tmp_path / "bad.npz"
    path.write_bytes(data)
    told = ""
    try:
        load_trace(path)
    except TraceError as error:
        told = str(error)
    assert not told or told.startswith(str(path))
    assert "\n" not in told


def test_files_that_are_no_archives_are_refused(tmp_path: Path) -> None:
    (tmp_path / "text.npz").write_text("no archive")
    np.save(tmp_path / "array.npy", np.zeros(3))
    (tmp_path / "cut.npz").write_bytes(b"PK\x03\x04 cut short")
    for name in ("text.npz", "array.npy", "cut.npz", "absent.npz"):
        with pytest.raises(TraceError, match=name):
            load_trace(tmp_path / name)


def test_halves_and_windows() -> None:
    trace = small()
    first, second = trace.halves()
    assert np.array_equal(concatenate([first, second]).topk_ids, trace.topk_ids)
    with pytest.raises(TraceError, match="single request"):
        trace.requests(0, 1).halves()
    with pytest.raises(TraceError, match="no token"):
        count(trace.requests(0, 0))
    with pytest.raises(TraceError, match="different models"):
        concatenate([trace, generate_trace(num_layers=2, num_experts=6, top_k=2, num_tokens=9)])


def test_counts_are_those_of_a_loop() -> None:
    trace = small()
    counted = count(trace)
    loads, transitions, together = np.zeros((3, 6)), np.zeros((2, 6, 6)), np.zeros((3, 6, 6))
    for token in trace.topk_ids:
        for layer in range(3):
            loads[layer, token[layer]] += 1
            together[np.ix_([layer], token[layer], token[layer])] += 1
            if layer < 2:
                transitions[np.ix_([layer], token[layer], token[layer + 1])] += 1
    assert np.array_equal(counted.loads, loads)
    assert np.array_equal(counted.transitions, transitions)
    assert np.array_equal(counted.coactivation, together)
    assert np.array_equal(part_loads(trace).sum(axis=0), loads)
    report = count_routing(trace)
    assert np.array_equal(report.load, loads)
    window = RoutingWindow(3, 6, window_s=60.0)
    window.add(report, 0.0)
    assert np.array_equal(window.sample(0.0).transitions(), transitions)


@pytest.mark.parametrize("redundant", [0, 6])
def test_metrics_are_those_of_a_replay(redundant: int) -> None:
    trace = small()
    workers = make_workers(3, nodes=2, num_experts=6, redundant=redundant)
    table = contiguous(3, 6, workers).physical_to_logical_map.copy()
    if redundant:
        table[:, 2] = 5
        table[0, 6] = 1
    placement = Placement(num_logical_experts=6, workers=workers, physical_to_logical_map=table)
    ranks = serving_ranks(placement)
    homes = np.repeat(np.arange(len(trace.request_lengths)) % 3, trace.request_lengths)
    load, fan, same, far, sends = np.zeros((3, 3)), 0, 0, 0, 0
    for token, home in zip(trace.topk_ids, homes, strict=True):
        served = [[int(ranks[layer, home, e]) for e in token[layer]] for layer in range(3)]
        for layer in range(3):
            for rank, expert in zip(served[layer], token[layer], strict=True):
                assert workers[rank].id in placement.holders(layer, int(expert))
                assert workers[home].id not in placement.holders(layer, int(expert)) or rank == home
                load[layer, rank] += 1
            fan += len(set(served[layer]))
            sends += len(set(served[layer]))
            far += sum(workers[rank].node != workers[home].node for rank in set(served[layer]))
        same += sum(a == b for layer in range(2) for a in served[layer] for b in served[layer + 1])
    metrics = measure(trace, placement)
    tokens = trace.num_tokens
    assert metrics.load_imbalance == pytest.approx((load.max(1) / load.mean(1)).mean())
    assert metrics.fan_out == pytest.approx(fan / (tokens * 3))
    assert metrics.same_worker_transitions == pytest.approx(same / (tokens * 2 * 4))
    assert metrics.cross_node_fraction == pytest.approx(far / sends)
    assert 0 <= measure(trace, placement, Semantics.FOLLOW).cross_node_fraction <= 1


def test_a_placement_of_another_model_is_refused() -> None:
    with pytest.raises(TraceError, match="the placement is for 3 layers x 8 experts, the trace has 3 x 6"):
        measure(small(), contiguous(3, 8, make_workers(2, nodes=1, num_experts=8)))


def test_generated_traces_look_like_real_ones() -> None:
    """Uneven loads, adjacent layers that know of one another, and a task of its own per seed."""
    trace = generate_trace(num_layers=4, num_experts=64, top_k=6, num_tokens=4000)
    counted = count(trace)
    assert 2 < (counted.loads.max(1) / counted.loads.mean(1)).mean() < 6
    joint = counted.transitions[1] / counted.transitions[1].sum()
    independent = joint.sum(1, keepdims=True) * joint.sum(0, keepdims=True)
    seen = joint > 0
    assert 0.2 < float((joint[seen] * np.log2(joint[seen] / independent[seen])).sum()) < 1.2
    other = count(generate_trace(num_layers=4, num_experts=64, top_k=6, num_tokens=4000, task_seed=1))
    assert np.corrcoef(counted.loads[0], other.loads[0])[0, 1] < 0.9
    again = generate_trace(num_layers=4, num_experts=64, top_k=6, num_tokens=4000)
    assert np.array_equal(again.topk_ids, trace.topk_ids)


@pytest.mark.parametrize("number", [0, 3])
def test_impossible_clusters_are_refused(number: int) -> None:
    from elastic_moe.cluster.errors import PlacementError

    with pytest.raises(PlacementError, match="workers" if number == 0 else "nodes"):
        make_workers(number, nodes=4, num_experts=8)
