"""Snapshots and changes of what the page is fed with."""

from __future__ import annotations

import asyncio
import base64
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastic_moe.cluster.messages.epochs import Epoch
from elastic_moe.cluster.messages.views import EngineStatus, PlacementView
from elastic_moe.cluster.placement import Move, WorkerId
from elastic_moe.deploy.page.feed import (
    MAX_MOVES,
    State,
    Totals,
    change,
    load_rows,
    marks,
    placement_sections,
    sample,
    worker_rows,
)
from tests.deploy.fakes import FakeBackend
from tests.deploy.moving_cluster import MovingCluster

VALUES = st.one_of(st.integers(), st.text(max_size=3), st.booleans(), st.lists(st.integers(), max_size=3))
SECTIONS = st.dictionaries(st.text(max_size=2), VALUES, min_size=1, max_size=4)
STATES = st.dictionaries(st.sampled_from(["workers", "map", "load"]), SECTIONS, max_size=3)


def apply(state: State, changes: State) -> State:
    """The state after `changes`, as the page computes it."""
    result = {name: dict(section) for name, section in state.items()}
    for name, keys in changes.items():
        section = result.setdefault(name, {})
        section |= {key: value for key, value in keys.items() if value is not None}
        for key in [key for key, value in keys.items() if value is None]:
            section.pop(key, None)
    return {name: section for name, section in result.items() if section}


@given(STATES, STATES)
def test_a_delta_turns_one_state_into_the_next(before: State, after: State) -> None:
    assert apply(before, change(before, after)) == after
    assert change(after, after) == {}


def test_a_delta_has_only_what_changed() -> None:
    before: State = {"workers": {"w0": {"state": "serving"}, "w1": {"state": "serving"}}, "scale": {"target": 2}}
    after: State = {"workers": {"w0": {"state": "dead"}, "w2": {"state": "starting"}}, "scale": {"target": 2}}
    assert change(before, after) == {"workers": {"w0": {"state": "dead"}, "w1": None, "w2": {"state": "starting"}}}


def test_loads_are_bytes_relative_to_the_mean_of_their_layer() -> None:
    rows = load_rows(np.array([[10, 10, 10, 10], [0, 4, 4, 0], [0, 0, 0, 0], [1, 0, 0, 0]]))
    decoded = [list(base64.b64decode(rows[str(layer)])) for layer in range(4)]
    assert decoded == [[16, 16, 16, 16], [0, 32, 32, 0], [0, 0, 0, 0], [64, 0, 0, 0]]
    assert max(base64.b64decode(load_rows(np.eye(1, 64, dtype=np.int64))["0"])) == 255


def test_a_large_cluster_is_small_on_the_wire() -> None:
    """58 layers of 256 experts on 64 workers: what a page loads first, and what one exchange of experts sends."""
    cluster = MovingCluster(layers=58, experts=256, size=64, spare=1)
    view = PlacementView(epoch=Epoch(1), placement=cluster.current)
    before: State = {**placement_sections(view), "load": load_rows(cluster.load)}
    assert len(json.dumps(before)) < 140_000
    table = cluster.current.physical_to_logical_map.copy()
    table[3, [0, -1]] = table[3, [-1, 0]]
    after = {**before, "map": {**before["map"], "3": table[3].tolist()}}
    assert set(change(before, after)["map"]) == {"3"}
    assert len(json.dumps(change(before, after))) < 2_000


def test_moves_are_listed_up_to_a_number() -> None:
    placement = MovingCluster().current
    move = Move(layer=1, expert=2, source=WorkerId("w0"), target=WorkerId("w1"))
    one = placement_sections(PlacementView(epoch=Epoch(1), placement=placement, moves=(move,)))
    assert one["moves"] == {"list": [[1, 2, "w0", "w1"]], "count": 1}
    many = placement_sections(PlacementView(epoch=Epoch(1), placement=placement, moves=(move,) * (MAX_MOVES + 1)))
    assert (len(many["moves"]["list"]), many["moves"]["count"]) == (MAX_MOVES, MAX_MOVES + 1)
    assert placement_sections(PlacementView(epoch=Epoch(1), placement=placement))["moves"] == {}


def test_marks_are_of_operations_that_have_begun_since() -> None:
    old: State = {"operations": {"recover-1": {"kind": "recover", "reason": "w1 is lost"}}}
    new: State = {"operations": {**old["operations"], "scale-2": {"kind": "scale", "reason": "requested"}}}
    assert marks(old, new) == [["scale", "requested"]]
    # what a first look finds has begun nobody knows when
    assert marks({}, new) == []


def totals(at_s: float, **counts: float) -> Totals:
    fields = dict.fromkeys(("generation_tokens", "prompt_tokens", "steps", "first_tokens", "next_tokens"), 0)
    return Totals(at_s=at_s, **{"first_tokens_s": 0.0, "next_tokens_s": 0.0, **fields, **counts})  # type: ignore[arg-type]


def test_a_point_has_rates_and_mean_waits() -> None:
    status = EngineStatus(running={WorkerId("w0"): 2, WorkerId("w1"): 1}, waiting=4, kv_usage={WorkerId("w0"): 0.5})
    before = totals(10.0, generation_tokens=100, first_tokens=1, first_tokens_s=0.2, next_tokens=50, next_tokens_s=1.0)
    after = totals(12.0, generation_tokens=140, first_tokens=3, first_tokens_s=0.8, next_tokens=90, next_tokens_s=2.0)
    point = sample(before, after, status, 1000.0)
    assert (point["running"], point["waiting"]) == (3, 4)
    assert point["kv"] == 0.5
    assert point["generation_tokens_per_s"] == 20.0
    assert point["ttft_s"] == pytest.approx(0.3)
    assert point["itl_s"] == pytest.approx(0.025)


def test_a_successor_that_counts_from_zero_makes_no_negative_rate() -> None:
    point = sample(totals(1.0, generation_tokens=500), totals(2.0), EngineStatus(), 1.0)
    assert point["generation_tokens_per_s"] == 0
    assert "ttft_s" not in point
    assert "generation_tokens_per_s" not in sample(None, totals(1.0), EngineStatus(), 1.0)


def test_workers_have_the_code_that_serves_them() -> None:
    (row,) = worker_rows(asyncio.run(FakeBackend().workers())).values()
    assert (row["id"], row["state"], row["rank"]) == ("w0", "serving", 0)
    assert row["fit"][1] == {"part": "norms", "modules": "LayerNorm", "count": 3, "path": "transformers",
                             "reason": "it has a bias"}  # fmt: skip
