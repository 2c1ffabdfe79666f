"""The tables and the fitted exponents of the bench of the control path."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.bench.scale import report
from tests.bench.scale.api import ApiCost
from tests.bench.scale.engine import EngineCost


def test_exponents_are_those_of_the_costs() -> None:
    sizes = [2.0, 8.0, 64.0]
    assert report.exponent(sizes, [3 * size**1.5 for size in sizes]) == pytest.approx(1.5)
    assert report.exponent(sizes, [7.0] * 3) == pytest.approx(0)
    assert report.exponent([2.0, 2.0], [1.0, 2.0]) is None


def test_the_table_of_replicas() -> None:
    cost = ApiCost(replicas=2, streams=64, tokens_per_s=6403.1, token_s=4e-5, longest_s=0.003)
    assert report.table(report.API, [cost]).splitlines()[-1] == "| 2 | 64 | 6403 | 40.0 | 25000 | 3 |"


def test_a_plot_of_some_sizes_alone(tmp_path: Path) -> None:
    cost = EngineCost(
        workers=1,
        sequences=64,
        steps=9,
        step_s=0.02,
        device_s=0.02,
        cpu_s=0.001,
        admit_s=1e-4,
        bytes_each=1,
        bytes_token=1,
        longest_s=0,
    )
    report.plot(tmp_path / "scale.svg", [cost], [])
    assert (tmp_path / "scale.svg").stat().st_size > 1000
