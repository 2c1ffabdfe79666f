"""The prior for a change of subject: a covariance, the stronger the less was seen, and of the size of real changes."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic_moe.optimizer.core.estimate import PRIOR, PRIOR_REQUESTS, expected_covariance, prior_covariance
from elastic_moe.optimizer.subjects.memory import Variation


def runs(seed: int, number: int = 40, experts: int = 12) -> np.ndarray:
    """[Q, 2, E] loads of short runs; experts 0 and 1 rise together, and 2 when they fall."""
    rng = np.random.default_rng(seed)
    mix = np.ones((number, experts))
    theme = rng.random(number) < 0.5
    mix[:, :2] += np.where(theme, 6.0, 0.0)[:, None]
    mix[:, 2] += np.where(theme, 0.0, 6.0)
    mix /= mix.sum(axis=1, keepdims=True)
    return np.stack([np.stack([rng.multinomial(64, row) for row in mix]) for _ in range(2)], axis=1)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), requests=st.integers(1, 200))
def test_it_is_a_covariance_that_grows_as_evidence_shrinks(seed: int, requests: int) -> None:
    seen = runs(seed)
    loads = seen.sum(axis=0).astype(float)
    prior = prior_covariance(loads, seen, requests)
    assert np.allclose(prior, prior.transpose(0, 2, 1))
    assert np.linalg.eigvalsh(prior).min() > -1e-6 * np.abs(prior).max(), "risk must not be negative"
    more = prior_covariance(loads, seen, requests + 1)
    assert (np.einsum("lee->le", more) < np.einsum("lee->le", prior)).all()
    # of all deviations, squared and over the expected loads
    total = (np.einsum("lee->le", prior) / loads).sum(axis=1) / loads.sum(axis=1)
    assert total == pytest.approx(np.full(2, PRIOR * (1 + PRIOR_REQUESTS / requests)))


def test_experts_that_rise_together_in_short_runs_do_so_between_subjects() -> None:
    seen = runs(1)
    prior = prior_covariance(seen.sum(axis=0).astype(float), seen, 8)
    assert (prior[:, 0, 1] > 0.5 * np.sqrt(prior[:, 0, 0] * prior[:, 1, 1])).all()
    assert (prior[:, 0, 2] < 0).all()
    assert (np.abs(prior[:, 5, 6]) < prior[:, 0, 1]).all()


def test_one_short_run_gives_no_correlation_to_believe() -> None:
    seen = runs(1, number=1)
    prior = prior_covariance(seen.sum(axis=0).astype(float), seen, 1)
    assert np.isfinite(prior).all()


def test_what_was_remembered_joins_what_the_window_shows_by_its_stretches() -> None:
    parts = np.random.default_rng(0).integers(1, 50, size=(6, 2, 5))
    loads = parts.sum(axis=0)
    shown = expected_covariance(loads, parts, None)
    assert shown is not None
    known = Variation(covariance=np.broadcast_to(1e-3 * np.eye(5), (2, 5, 5)), stretches=6.0)
    both = expected_covariance(loads, parts, known)
    assert both is not None
    assert np.allclose(both, 0.5 * shown + 0.5 * known.of_window(loads, 6))
    alone = expected_covariance(loads, parts[:2], known)
    assert alone is not None
    assert np.allclose(alone, known.of_window(loads, 2))
    assert expected_covariance(loads, None, None) is None


def test_the_window_reckons_with_a_change_of_subject_where_runs_are_given() -> None:
    seen = runs(1)
    loads, parts = seen.sum(axis=0), np.array_split(seen, 5)
    known = expected_covariance(loads, [part.sum(axis=0) for part in parts], None)
    assert known is not None
    more = expected_covariance(loads, [part.sum(axis=0) for part in parts], None, seen, 16)
    assert more is not None
    assert np.allclose(more - known, prior_covariance(loads.astype(float), seen, 16))
    alone = expected_covariance(loads, None, None, seen, 16)
    assert alone is not None
    assert np.allclose(alone, more - known)
    assert expected_covariance(loads, None, None, seen[:2], 16) is None, "too few runs tell nothing"
