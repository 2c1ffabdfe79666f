"""Constants are recovered from steps that follow the cost model, and files of them are checked."""

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from elastic_moe.cluster.errors import ConfigError
from elastic_moe.optimizer.constants import (
    Constants,
    Observation,
    calibration_file,
    fit,
    load_constants,
    nearest,
    observation,
    predicted_s,
    rank_correlation,
    save_constants,
)
from elastic_moe.optimizer.core.cost import price
from elastic_moe.optimizer.core.problem import Links
from elastic_moe.optimizer.study.graded import graded
from tests.cluster.simulation import MODEL
from tests.optimizer.cases import tiny

TRUE = Constants(workers=3, step_tokens=64, base_s=2e-3, token_expert_s=3e-6, node_cores=2.0, worker_gbps=0.5)


def seen(rng: np.random.Generator, true: Constants, noise: float = 0.0) -> list[Observation]:
    """Steps that follow the cost model but for noise, under placements whose loads and links differ."""
    ranked = [(300.0, 300.0, 300.0), (450.0, 450.0, 0.0), (450.0, 225.0, 225.0), (600.0, 200.0, 100.0)]
    return steps_of([[u] for u in ranked], rng, true, noise)


def steps_of(
    ranked: Sequence[Sequence[Sequence[float]]], rng: np.random.Generator, true: Constants, noise: float = 0.0
) -> list[Observation]:
    """ranked: of each placement, the workers' tokens on each node in the only layer."""
    steps = [
        Observation(ranked_tokens=np.array([nodes]), link_bytes=b, step_s=1.0)
        for nodes in ranked
        for b in (1e5, 2e5, 4e5)
    ]
    times = [predicted_s(true, one) * (1 + noise * rng.standard_normal()) for one in steps]
    return [dataclasses.replace(one, step_s=step_s) for one, step_s in zip(steps, times, strict=True)]


def test_constants_are_recovered() -> None:
    found = fit(seen(np.random.default_rng(0), TRUE), workers=3, step_tokens=64)
    assert dataclasses.asdict(found) == pytest.approx(dataclasses.asdict(TRUE))
    noisy = fit(seen(np.random.default_rng(0), TRUE, noise=0.01), workers=3, step_tokens=64)
    assert noisy.token_expert_s == pytest.approx(TRUE.token_expert_s, rel=0.2)


def test_several_nodes_tell_even_a_single_core_each() -> None:
    true = dataclasses.replace(TRUE, workers=4, nodes=2, node_cores=1.0, worker_gbps=None, node_gbps=0.5)
    ranked = [
        [(200.0, 200.0), (200.0, 200.0)],
        [(400.0, 0.0), (300.0, 100.0)],
        [(400.0, 100.0), (300.0, 0.0)],
        [(500.0, 0.0), (150.0, 150.0)],
        [(600.0, 100.0), (100.0, 0.0)],
    ]
    found = fit(steps_of(ranked, np.random.default_rng(0), true), workers=4, step_tokens=64)
    assert dataclasses.asdict(found) == pytest.approx(dataclasses.asdict(true))


def test_traffic_that_costs_nothing_gets_no_bandwidth() -> None:
    free = dataclasses.replace(TRUE, worker_gbps=None)
    found = fit(seen(np.random.default_rng(0), free, noise=1e-4), workers=3, step_tokens=64)
    assert found.worker_gbps is None
    assert found.token_expert_s == pytest.approx(TRUE.token_expert_s, rel=0.01)


def test_steps_that_do_not_depend_on_the_slowest_worker_are_no_measure() -> None:
    flat = [dataclasses.replace(one, step_s=2e-3) for one in seen(np.random.default_rng(0), TRUE)]
    with pytest.raises(ConfigError, match="did not take longer"):
        fit(flat, workers=3, step_tokens=64)


@pytest.mark.parametrize("nodes", [1, 2])
def test_an_observation_is_what_the_cost_model_counts(nodes: int) -> None:
    """With the constants in the problem, its price and the prediction are the same."""
    problem = tiny(
        0, layers=3, experts=12, workers=3, nodes=nodes, speeds=(1.0, 2.0, 1.0), affinity=0.0, covariance=False
    )
    true = dataclasses.replace(TRUE, node_cores=1.25)
    ports = 0.5
    if nodes > 1:
        true, ports = dataclasses.replace(true, nodes=nodes, worker_gbps=None, node_gbps=0.5), 1e9
    problem = dataclasses.replace(
        problem,
        token_expert_s=true.token_expert_s,
        node_cores=true.node_cores,
        links=Links(worker_gbps=ports, node_gbps=0.5),
    )
    for placement in graded(problem, (0.0, 0.3, 1.0), np.random.default_rng(0)):
        one = observation(problem, placement, 1.0)
        assert predicted_s(true, one) == pytest.approx(true.base_s + price(problem, placement).realised_s)


def test_graded_placements_go_from_even_to_uneven() -> None:
    problem = tiny(1, layers=5, experts=24, workers=4, slots=(21,) * 4)
    parts = [0.0, 0.25, 0.25, 0.5, 0.5, 1.0]
    seen = [observation(problem, placement, 1.0) for placement in graded(problem, parts, np.random.default_rng(0))]
    ranked = [one.ranked_tokens[:, 0].sum(axis=0) for one in seen]
    busiest = [one.compute_tokens(math.inf) / tokens.sum() for one, tokens in zip(seen, ranked, strict=True)]
    assert busiest == pytest.approx([0.25, 0.4375, 0.4375, 0.625, 0.625, 1.0], abs=0.04)
    # by turns, the rest is on few workers and on all others
    assert [tokens[3] > 0.5 * tokens[1] for tokens in ranked[1:5]] == [False, True, False, True]


def test_more_workers_than_were_measured_share_only_if_those_shared() -> None:
    assert TRUE.cores_for(8) == 2.0
    alone = dataclasses.replace(TRUE, node_cores=3)
    assert (alone.cores_for(3), alone.cores_for(8)) == (3, math.inf)
    spread = dataclasses.replace(TRUE, workers=4, nodes=2, node_cores=2.0)
    assert (spread.cores_for(2), spread.cores_for(3)) == (2.0, math.inf), "two of its workers were on a node"


@pytest.mark.parametrize(
    ("one", "other", "correlation"),
    [((1, 2, 3), (10, 20, 90), 1.0), ((1, 2, 3), (3, 2, 1), -1.0), ((1, 1, 2, 2), (1, 2, 3, 4), 4 / 20**0.5)],
)
def test_rank_correlation(one: tuple[float, ...], other: tuple[float, ...], correlation: float) -> None:
    assert rank_correlation(one, other) == pytest.approx(correlation)


def test_files_keep_constants_and_the_nearest_number_of_workers_counts(tmp_path: Path) -> None:
    path, four = tmp_path / "new" / "constants.json", dataclasses.replace(TRUE, workers=6, worker_gbps=None)
    save_constants(path, [TRUE, four])
    assert load_constants(path) == (TRUE, four)
    assert nearest(load_constants(path), 4) == TRUE
    assert nearest(load_constants(path), 5) == four
    assert nearest((), 5) is None
    spread = dataclasses.replace(TRUE, workers=8, nodes=2)
    assert nearest((TRUE, spread), 3, 2) == spread
    assert nearest((TRUE, spread), 8, 1) == TRUE


def test_files_of_before_nodes_were_counted_are_of_one_node(tmp_path: Path) -> None:
    entry = {name: value for name, value in dataclasses.asdict(TRUE).items() if name not in ("nodes", "node_gbps")}
    path = tmp_path / "constants.json"
    path.write_text(json.dumps({"calibration": [entry]}))
    assert load_constants(path) == (TRUE,)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "which is JSON"),
        ("[" * 100_000, "which is JSON"),
        ("[]", "calibration: expected a list"),
        ('{"calibration": []}', "calibration: expected a list"),
        ('{"calibration": [{"workers": 2}]}', "expected the keys base_s, node_cores, step_tokens"),
        (json.dumps({"calibration": [dataclasses.asdict(TRUE) | {"base_s": "2"}]}), "base_s: expected a number"),
        (json.dumps({"calibration": [dataclasses.asdict(TRUE) | {"token_expert_s": 0}]}), "token_expert_s: expected"),
        (json.dumps({"calibration": [dataclasses.asdict(TRUE) | {"node_cores": 0.5}]}), "node_cores: expected"),
        (json.dumps({"calibration": [dataclasses.asdict(TRUE) | {"workers": None}]}), "workers: expected a number"),
        (json.dumps({"calibration": [dataclasses.asdict(TRUE) | {"worker_gbps": -1}]}), "worker_gbps: expected"),
        (json.dumps({"calibration": [dataclasses.asdict(TRUE) | {"node_gbps": "1"}]}), "node_gbps: expected a number"),
        (json.dumps({"calibration": [dataclasses.asdict(TRUE) | {"nodes": None}]}), "nodes: expected a number"),
        (json.dumps({"calibration": [dataclasses.asdict(TRUE) | {"more": 1}]}), "expected the keys"),
        (json.dumps({"calibration": [dataclasses.asdict(TRUE) | {"token_expert_s": 10**400}]}), "token_expert_s: exp"),
        (json.dumps({"calibration": [dataclasses.asdict(TRUE) | {"base_s": 10**400}]}), "base_s: expected"),
    ],
)
def test_what_is_wrong_with_a_file_is_named(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "constants.json"
    path.write_text(content)
    with pytest.raises(ConfigError, match=message) as error:
        load_constants(path)
    assert str(path) in str(error.value)


def test_each_model_dtype_and_device_has_a_file_of_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    files = {
        calibration_file(MODEL, "bfloat16", "cpu"),
        calibration_file(MODEL, "float32", "cpu"),
        calibration_file(MODEL, "bfloat16", "cuda"),
        calibration_file(dataclasses.replace(MODEL, hidden_size=8), "bfloat16", "cpu"),
    }
    assert len(files) == 4
    assert all(tmp_path in file.parents for file in files)
