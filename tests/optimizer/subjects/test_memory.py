"""The memory of subjects: what is alike is one, it is bounded, it ages, and it survives being saved."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic_moe.optimizer.subjects.likeness import UNLIKE, mixes, tells_subject, unlikeness
from elastic_moe.optimizer.subjects.memory import (
    DIRECTIONS,
    HALF_LIFE_S,
    MOST_BYTES,
    MOST_PRICED,
    MOST_SUBJECTS,
    PRESENT_SHARE,
    Remembered,
    SubjectMemory,
    scenarios,
)

LAYERS, EXPERTS = 3, 16


def subject(seed: int) -> np.ndarray:
    """[L, E] shares of a subject of its own."""
    return np.random.default_rng(seed).dirichlet(np.full(EXPERTS, 0.3), size=LAYERS)


def stretch(seed: int, rng: np.random.Generator, choices: int = 4000) -> np.ndarray:
    return np.stack([rng.multinomial(choices, shares) for shares in subject(seed)])


@settings(max_examples=30, deadline=None)
@given(seeds=st.lists(st.integers(0, 5), min_size=1, max_size=40), noise=st.integers(0, 10**6))
def test_stretches_of_one_subject_are_one_whatever_their_order(seeds: list[int], noise: int) -> None:
    memory, rng = SubjectMemory(LAYERS, EXPERTS), np.random.default_rng(noise)
    for number, seed in enumerate(seeds):
        memory.add(stretch(seed, rng), float(number))
    assert len(memory) == len(set(seeds))
    others = memory.others(stretch(seeds[-1], rng), float(len(seeds)))
    assert len(others) == len(set(seeds)) - 1, "the present subject is not another one"
    assert sum(other.weight for other in others) == pytest.approx(sum(seed != seeds[-1] for seed in seeds), rel=0.02)


def test_a_mix_is_known_the_better_the_longer_it_was_seen() -> None:
    memory, rng = SubjectMemory(LAYERS, EXPERTS), np.random.default_rng(0)
    for number in range(30):
        memory.add(stretch(1, rng, choices=1500), float(number))
    (seen,) = memory.others(stretch(2, rng), 30.0)
    single = mixes(stretch(1, rng, choices=1500))
    assert np.abs(seen.mix - subject(1)).sum() < 0.5 * np.abs(single - subject(1)).sum()


def test_what_was_long_ago_weighs_less_and_the_lightest_is_forgotten() -> None:
    memory, rng = SubjectMemory(LAYERS, EXPERTS), np.random.default_rng(0)
    memory.add(stretch(0, rng), 0.0)
    memory.add(stretch(1, rng), HALF_LIFE_S)
    by_age = memory.others(stretch(9, rng), HALF_LIFE_S)
    assert [(other.age_s, pytest.approx(other.weight)) for other in by_age] == [(0.0, 1.0), (HALF_LIFE_S, 0.5)]
    for seed in range(2, MOST_SUBJECTS + 1):
        memory.add(stretch(seed, rng), HALF_LIFE_S + 1)
    assert len(memory) == MOST_SUBJECTS
    kept = memory.others(stretch(99, rng), HALF_LIFE_S + 1)
    assert max(other.age_s for other in kept) == 1.0, "the one from long ago is gone"


def test_short_and_empty_stretches_are_passed_over() -> None:
    memory, rng = SubjectMemory(LAYERS, EXPERTS), np.random.default_rng(0)
    memory.add(np.zeros((LAYERS, EXPERTS)), 0.0)
    memory.add(stretch(0, rng, choices=20), 0.0)
    assert len(memory) == 0
    assert not tells_subject(stretch(0, rng, choices=20))
    assert memory.variation(0.0) is None


@settings(max_examples=30, deadline=None)
@given(seeds=st.tuples(st.integers(0, 50), st.integers(0, 50)), noise=st.integers(0, 10**6))
def test_unlikeness_tells_subjects_and_not_chance(seeds: tuple[int, int], noise: int) -> None:
    rng = np.random.default_rng(noise)
    first, second = (stretch(seed, rng, choices=1000) for seed in seeds)
    apart = unlikeness(first, second)
    assert apart == pytest.approx(unlikeness(second, first))
    assert (apart > UNLIKE) == (seeds[0] != seeds[1])
    assert 0 <= apart <= 1


def test_variation_has_the_directions_in_which_stretches_differ() -> None:
    """Two experts that rise together, and one that falls: the covariance has their signs and about their size."""
    memory, rng = SubjectMemory(1, 8), np.random.default_rng(0)
    drift = np.zeros(8)
    drift[[0, 1, 2]] = (0.01, 0.01, -0.02)
    for number in range(200):
        mix = np.full(8, 1 / 8) + drift * rng.choice([-1, 1])
        memory.add(rng.multinomial(10**6, mix)[None], float(number))
    variation = memory.variation(200.0)
    assert variation is not None
    assert variation.covariance[0, 0, 1] == pytest.approx(1e-4, rel=0.4)
    assert variation.covariance[0, 0, 2] == pytest.approx(-2e-4, rel=0.4)
    assert abs(variation.covariance[0, 5, 6]) < 1e-6
    assert variation.of_window(np.full((1, 8), 100.0), 4)[0, 0, 1] == pytest.approx(1e-4 * 800**2 / 4, rel=0.4)


def test_a_memory_that_was_saved_is_the_same_later() -> None:
    memory, rng = SubjectMemory(LAYERS, EXPERTS), np.random.default_rng(0)
    for number in range(12):
        memory.add(stretch(number % 3, rng), float(number))
    again = SubjectMemory(LAYERS, EXPERTS)
    again.restore(memory.to_bytes(100.0), 5.0)
    present = stretch(7, rng)
    for one, other in zip(memory.others(present, 100.0), again.others(present, 5.0), strict=True):
        assert other.weight == pytest.approx(one.weight)
        assert other.age_s == pytest.approx(one.age_s)
        assert np.allclose(other.mix, one.mix, atol=1e-3)
    empty = SubjectMemory(LAYERS, EXPERTS)
    empty.restore(SubjectMemory(LAYERS, EXPERTS).to_bytes(0.0), 0.0)
    assert len(empty) == 0


@pytest.mark.parametrize("saved", [b"", b"PK\x03\x04 damaged", SubjectMemory(LAYERS, EXPERTS + 1).to_bytes(0.0)])
def test_what_is_damaged_or_of_another_model_is_ignored(saved: bytes) -> None:
    memory = SubjectMemory(LAYERS, EXPERTS)
    memory.restore(saved, 0.0)
    assert len(memory) == 0


def test_a_memory_of_a_large_model_stays_within_its_bytes() -> None:
    memory, rng = SubjectMemory(58, 256), np.random.default_rng(0)
    for number in range(20):
        shares = rng.dirichlet(np.full(256, 0.3), size=58)
        memory.add(shares * 1e5, float(number))
    assert len(memory) >= 8
    assert len(memory.to_bytes(20.0)) <= MOST_BYTES * 1.01
    assert DIRECTIONS >= 1


def test_the_present_has_half_and_the_heaviest_of_the_rest_share_the_other_half() -> None:
    others = [Remembered(mix=subject(n), weight=float(n + 1), age_s=0.0) for n in range(MOST_PRICED + 2)]
    present = np.full((LAYERS, EXPERTS), 50.0)
    mean, each, weights = scenarios(present, others)
    assert each is not None
    assert len(each) == len(weights) == MOST_PRICED + 1
    assert weights[0] == PRESENT_SHARE
    assert sum(weights) == pytest.approx(1.0)
    assert np.array_equal(each[0], present)
    assert np.allclose(each[1], subject(MOST_PRICED + 1))
    assert mean.sum(axis=1) == pytest.approx(present.sum(axis=1))
    assert scenarios(present, [])[1:] == (None, ())


def test_the_lightest_subject_is_forgotten_where_there_are_too_many() -> None:
    """Each subject uses experts of its own; the first one was seen for longest, the second one least."""
    memory = SubjectMemory(2, 2 * MOST_SUBJECTS)
    for subject, stretches in enumerate([3, 1, *[2] * (MOST_SUBJECTS - 2), 1]):
        loads = np.ones((2, 2 * MOST_SUBJECTS))
        loads[:, subject] = 10_000.0
        for _ in range(stretches):
            memory.add(loads, now=0.0)
    assert len(memory) == MOST_SUBJECTS
    known = [int(other.mix[0].argmax()) for other in memory.others(np.ones((2, 2 * MOST_SUBJECTS)) * 1e4, now=0.0)]
    assert sorted(known) == [0, *range(2, MOST_SUBJECTS + 1)]
