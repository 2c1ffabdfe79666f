"""Bad problems: each a one-line error that names the field."""

import dataclasses
import pickle

import numpy as np
import pytest

from elastic_moe.cluster.errors import PlacementError
from elastic_moe.cluster.placement import Worker, WorkerId, contiguous
from elastic_moe.optimizer import Links, PlacementProblem
from elastic_moe.optimizer.core.estimate import (
    believable,
    blended_covariance,
    common_factors,
    covariance_between_parts,
    covariance_of_requests,
    covariance_of_window,
    estimate_coactivation,
    shrunk_covariance,
)
from elastic_moe.optimizer.core.problem import FloatArray
from tests.optimizer.cases import tiny

ONE = Worker(id=WorkerId("a"), node="n", slots=4)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"loads": np.zeros((2, 4))}, "loads: layer 0 counted no token"),
        ({"loads": np.ones(4)}, r"loads: expected \[layers, experts\]"),
        ({"loads": [[1.0, np.nan, 1.0, 1.0]] * 2}, "loads: holds a value that is not finite"),
        ({"loads": -np.ones((2, 4))}, "loads: holds a negative count"),
        ({"loads": "many"}, "loads: expected an array of numbers"),
        ({"transitions": np.ones((2, 4, 4))}, "transitions: expected shape"),
        ({"coactivation": np.triu(np.ones((2, 4, 4)))}, "coactivation: must be symmetric"),
        ({"coactivation": np.full((2, 4, 4), np.inf)}, "coactivation: holds a value that is not finite"),
        ({"load_covariance": np.ones((2, 4, 3))}, "load_covariance: expected"),
        ({"load_covariance": -np.ones((2, 4, 4))}, "load_covariance: holds"),
        ({"workers": ()}, "workers: none given"),
        ({"workers": (ONE, ONE)}, "workers: one is listed twice"),
        ({"workers": (dataclasses.replace(ONE, slots=3),)}, "every layer needs at least 1 more slot$"),
        ({"workers": (dataclasses.replace(ONE, slots=0),)}, "at least one slot"),
        ({"speeds": (1.0,)}, "speeds: expected 2"),
        ({"node_cores": 0.5}, "node_cores: expected at least 1"),
        ({"node_cores": float("nan")}, "node_cores: expected at least 1"),
        ({"speeds": (1.0, 0.0)}, "speeds: every worker's speed"),
        ({"top_k": 9}, "top_k: expected 1 to 4"),
        ({"semantics": "away"}, "semantics: expected home or follow"),
        ({"horizon_steps": float("nan")}, "horizon_steps"),
        ({"expert_bytes": -1}, "expert_bytes"),
        ({"move_budget": -1}, "move_budget"),
        ({"links": Links(worker_gbps=0)}, "links.worker_gbps"),
        ({"links": Links(ports_gbps=(1.0,))}, "links.ports_gbps: expected 2 numbers, got 1"),
        ({"links": Links(uplinks_gbps=(0.0,))}, "links.uplinks_gbps: expected positive numbers"),
        ({"current": contiguous(3, 4, (ONE,))}, "current: a placement of 3 layers x 4 experts"),
    ],
)
def test_bad_problems_are_refused_in_one_line(fields: dict[str, object], message: str) -> None:
    with pytest.raises(PlacementError, match=message) as caught:
        dataclasses.replace(tiny(0), **fields)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


def test_problems_pickle_without_what_can_be_made_again() -> None:
    problem = tiny(0)
    assert problem.owner.tolist() == [0, 0, 1, 1]
    assert problem.pairs.shape == (2, 4, 4)
    copy: PlacementProblem = pickle.loads(pickle.dumps(problem))
    assert "owner" not in copy.__dict__
    assert np.array_equal(copy.loads, problem.loads)
    assert copy.workers == problem.workers


def test_pairs_are_estimated_where_none_were_counted() -> None:
    """Themes that persist from layer to layer show in the transitions, and so in the estimate."""
    counted = tiny(3, layers=3)
    independent = tiny(3, layers=3, coactivation=None, transitions=None)
    assert independent.pairs.sum() == pytest.approx(counted.pairs.sum(), rel=0.6)
    guessed = estimate_coactivation(tiny(3, layers=3, coactivation=None))
    assert guessed.shape == counted.pairs.shape
    assert np.allclose(guessed, guessed.transpose(0, 2, 1))
    assert not guessed[:, range(4), range(4)].any()


def test_covariance_is_of_the_mix_not_of_the_length() -> None:
    """Parts of one mix vary in nothing; two opposite parts move their experts apart."""
    assert not covariance_between_parts(np.array([[[3.0, 1.0]], [[6.0, 2.0]]])).any()
    assert covariance_between_parts(np.array([[[2.0, 0.0]], [[0.0, 2.0]]]))[0].tolist() == [[2.0, -2.0], [-2.0, 2.0]]


def off_diagonal(covariance: FloatArray) -> FloatArray:
    return np.where(np.eye(covariance.shape[-1], dtype=bool), 0.0, covariance)


def test_chance_correlations_are_not_believed() -> None:
    rng = np.random.default_rng(0)
    parts = rng.poisson(50.0, size=(8, 1, 40)).astype(float)
    raw = covariance_between_parts(parts)
    shrunk = shrunk_covariance(raw, 8)
    assert np.array_equal(np.diag(shrunk[0]), np.diag(raw[0]))
    assert np.abs(off_diagonal(shrunk)).sum() < 0.2 * np.abs(off_diagonal(raw)).sum()
    together = np.repeat(rng.poisson(50.0, size=(8, 1, 20)), 2, axis=2).astype(float)
    assert believable(covariance_between_parts(together), 8)[0] > believable(raw, 8)[0]


def test_what_does_not_vary_has_no_covariance() -> None:
    assert covariance_of_window(np.ones((2, 1, 3))) is None
    even = covariance_of_window(np.ones((4, 1, 3)))
    assert even is not None
    assert not even.any()
    assert not covariance_of_requests(np.ones((4, 1, 3)), np.ones((9, 1, 3))).any()
    assert not common_factors(np.ones((1, 2, 3))).any()  # a single request
    assert not common_factors(np.stack([np.zeros((2, 3)), np.ones((2, 3)), np.ones((2, 3))])).any()  # an idle stretch


def topical(rng: np.random.Generator, layers: int, heaviness: float) -> tuple[FloatArray, FloatArray]:
    """Loads [12, layers, 16] of stretches that hold more or less of a topic, and the covariance [layers, 16, 16] that
    the topic alone gives their sum."""
    direction = rng.choice([-1.0, 1.0], size=(layers, 16))
    direction -= direction.mean(axis=1, keepdims=True)
    amount = heaviness * rng.normal(size=12)
    amount -= amount.mean()
    mean = 40.0 * (1 + np.clip(amount[:, None, None] * direction, -0.9, 0.9))
    true = 40.0**2 * (amount**2).sum() * np.einsum("le,lf->lef", direction, direction)
    return rng.poisson(mean).astype(float), true


def test_a_topic_is_seen_better_over_all_layers_than_in_one() -> None:
    for seed in range(5):
        parts, true = topical(np.random.default_rng(seed), layers=24, heaviness=0.1)
        errors = {
            name: float(np.linalg.norm(off_diagonal(found - true)))
            for name, found in (
                ("all layers", common_factors(parts)),
                ("one layer", covariance_between_parts(parts)),
                ("one layer, shrunk", shrunk_covariance(covariance_between_parts(parts), len(parts))),
            )
        }
        assert errors["all layers"] < 0.95 * min(errors["one layer"], errors["one layer, shrunk"]), errors


def test_chance_has_few_common_factors() -> None:
    parts, _ = topical(np.random.default_rng(3), layers=24, heaviness=0.0)
    kept = np.trace(common_factors(parts), axis1=1, axis2=2).sum()
    assert kept < 0.1 * np.trace(covariance_between_parts(parts), axis1=1, axis2=2).sum()


def test_common_factors_are_a_covariance_on_any_scale() -> None:
    """Counts may be tokens or shares of a window."""
    parts, _ = topical(np.random.default_rng(4), layers=3, heaviness=0.1)
    found = common_factors(parts)
    assert np.allclose(found, found.transpose(0, 2, 1))
    assert np.linalg.eigvalsh(found).min() > -1e-6 * np.abs(found).max()
    assert np.allclose(common_factors(parts / 1000), found / 1000**2)


def test_requests_and_runs_are_blended_on_the_scale_of_requests() -> None:
    rng = np.random.default_rng(1)
    runs = rng.poisson(5.0, size=(200, 1, 6)).astype(float)
    runs[:, :, 1] = runs[:, :, 0]
    requests = runs.reshape(10, 20, 1, 6).sum(axis=1)
    blended = blended_covariance(requests, runs)[0]
    whole = covariance_between_parts(requests)[0]
    assert np.array_equal(np.diag(blended), np.diag(whole))
    assert 0.5 * whole[0, 1] < blended[0, 1] < 1.1 * whole[0, 1]
