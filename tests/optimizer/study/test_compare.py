"""What a comparison of planners says about subjects that none of them has seen."""

from __future__ import annotations

import pytest

from elastic_moe.optimizer.study.compare import Row, behind_on_unseen


def row(planner: str, **costs_s: float) -> Row:
    return Row(
        planner=planner, status="feasible", termination="completed", load_imbalance=1.0, fan_out=1.0,
        same_worker_transitions=0.5, cross_node_fraction=0.0, step_cost=1.0, test_step_cost=1.0,
        load_imbalance_profiled=1.0, replayed_miss_rate=0.0, replayed_waits=0.0, gap=0.0, moves=0, bytes=0,
        seconds=1.0, reason="", subject_costs=costs_s,
    )  # fmt: skip


def test_who_is_cheaper_on_a_subject_that_nobody_has_seen_is_named() -> None:
    rows = [row("greedy", bible=1.2, code=0.9), row("auto", bible=1.0, code=1.0), row("eplb", bible=2.0, code=1.5)]
    text = behind_on_unseen(rows, ["bible"])
    assert text.startswith("On code, which no planner has seen, greedy is 10.0% cheaper than auto")
    assert "--scenarios" in text


@pytest.mark.parametrize(
    ("rows", "seen"),
    [
        ([row("greedy", bible=0.9, code=1.1), row("auto", bible=1.0, code=1.0)], ["bible"]),
        ([row("greedy", bible=0.9), row("auto", bible=1.0)], ["bible"]),
        ([row("greedy", code=0.9)], []),
    ],
)
def test_nothing_is_said_where_auto_is_not_behind_on_one(rows: list[Row], seen: list[str]) -> None:
    assert behind_on_unseen(rows, seen) == ""
