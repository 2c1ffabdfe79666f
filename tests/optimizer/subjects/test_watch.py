"""A change of subject is noticed within a few looks; chance and slow drift are no change."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic_moe.optimizer.subjects.watch import Sight, SubjectWatch
from tests.optimizer.subjects.test_memory import EXPERTS, LAYERS, stretch, subject


@settings(max_examples=25, deadline=None)
@given(
    seeds=st.tuples(st.integers(0, 20), st.integers(21, 40)),
    noise=st.integers(0, 10**6),
    choices=st.integers(100, 3000),
)
def test_one_change_is_noticed_once_and_soon(seeds: tuple[int, int], noise: int, choices: int) -> None:
    watch, rng = SubjectWatch(), np.random.default_rng(noise)
    seen = [watch.look(stretch(seeds[0], rng, choices)) for _ in range(40)]
    assert [sight for sight in seen if sight is not Sight.NOTHING_NEW] == [Sight.FIRST]
    noticed = [look for look in range(40) if watch.look(stretch(seeds[1], rng, choices)) is Sight.CHANGED]
    assert len(noticed) == 1
    # a stretch is over when its counts could tell a subject; the first may have begun before the change
    looks_of_a_stretch = 1 + 130 // choices
    assert noticed[0] < 3 * looks_of_a_stretch


def test_a_slow_drift_is_followed() -> None:
    watch, rng = SubjectWatch(), np.random.default_rng(0)
    for step in range(400):
        mix = (1 - step / 400) * subject(0) + step / 400 * subject(1)
        sight = watch.look(np.stack([rng.multinomial(2000, shares) for shares in mix]))
        assert sight is (Sight.NOTHING_NEW if step else Sight.FIRST)


def test_nothing_counted_is_nothing_new() -> None:
    watch = SubjectWatch()
    assert watch.look(np.zeros((LAYERS, EXPERTS))) is Sight.NOTHING_NEW
    counts = stretch(0, np.random.default_rng(0))
    assert watch.look(counts) is Sight.FIRST
    assert (watch.present == counts).all()


def test_requests_that_differ_among_themselves_are_one_subject() -> None:
    """Each look has the tokens of two requests, each with a mix of its own about the subject's."""
    watch, rng = SubjectWatch(), np.random.default_rng(1)
    changes = 0
    for _ in range(300):
        loads = np.zeros((LAYERS, EXPERTS))
        for _request in range(2):
            themes = rng.dirichlet((2.0, 2.0, 2.0))
            mix = sum(theme * subject(50 + number) for number, theme in enumerate(themes))
            loads += np.stack([rng.multinomial(400, shares) for shares in mix])
        changes += watch.look(loads) is Sight.CHANGED
    assert changes <= 3
