"""Activity of experts: by enumeration and by counting."""

import numpy as np
import pytest

from elastic_moe.optimizer.residency.activity import activity, activity_covariance, expected_largest


def test_activity_of_one_token_and_of_many() -> None:
    chance = np.array([0.0, 0.25, 1.0])
    assert activity(chance, 1).tolist() == chance.tolist()
    assert activity(chance, 2) == pytest.approx([0.0, 1 - 0.75**2, 1.0])


def test_covariance_is_that_of_the_steps_of_independent_tokens() -> None:
    rng = np.random.default_rng(0)
    kinds = np.array([[1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]], dtype=float)  # what a token may choose
    weight = np.array([0.5, 0.2, 0.3])
    chance, together = weight @ kinds, kinds.T @ (weight[:, None] * kinds)
    drawn = kinds[rng.choice(3, p=weight, size=(200_000, 3))].max(axis=1)
    found = activity_covariance(chance, together, 3)
    assert found == pytest.approx(np.cov(drawn.T, bias=True), abs=0.004)
    assert np.linalg.eigvalsh(found).min() > -1e-12


def test_an_impossible_estimate_becomes_a_covariance() -> None:
    found = activity_covariance(np.array([0.5, 0.5, 0.5]), np.full((3, 3), -0.5), 1)
    assert np.linalg.eigvalsh(found).min() > -1e-12


def test_the_expected_largest_of_standard_normals() -> None:
    assert expected_largest(1) == pytest.approx(0, abs=1e-6)
    assert expected_largest(2) == pytest.approx(1 / np.pi**0.5, abs=1e-5)
    assert expected_largest(4) == pytest.approx(1.02938, abs=1e-4)
