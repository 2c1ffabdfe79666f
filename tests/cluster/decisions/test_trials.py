"""A re-placement is on trial for two windows, on the tokens that came after it."""

import pytest

from elastic_moe.cluster.decisions.trials import MOST_HARM, Trials
from elastic_moe.cluster.placement import Placement
from tests.cluster.stories import W0, W1, W2, placement_of

OLD, OLDER = placement_of(W0, W1), placement_of(W0, W1, W2)


def weighed(trials: Trials, harm: float, now: float, tokens: float = 100.0) -> Placement | None:
    """Weigh a window in which the placement in force makes steps longer by `harm` than each one before."""
    undo = trials.weigh(1.0 + harm, [1.0] * len(trials.placements), tokens, now)
    return None if undo is None else undo.placement


@pytest.mark.parametrize(
    ("harms", "undone_at"),
    [
        ((0.5,), 60.0),
        ((MOST_HARM / 2, MOST_HARM / 2), None),
        # the mean of both windows counts
        ((0.0, 0.05), 120.0),
        ((-0.05, 0.05), None),
        ((-0.5, -0.5), None),
    ],
)
def test_a_re_placement_is_weighed_at_the_end_of_two_windows(harms: tuple[float, ...], undone_at: float | None) -> None:
    trials = Trials(60.0)
    trials.begin("rebalance-1", OLD, 0.0)
    for number, harm in enumerate(harms):
        now = 60.0 * (number + 1)
        assert not trials.is_due(now - 0.1)
        assert trials.is_due(now)
        assert (weighed(trials, harm, now) is OLD) == (now == undone_at)
    assert not trials.placements, "it is settled or undone"
    assert not trials.is_due(1000.0)


def test_the_reason_names_the_re_placement_and_its_harm() -> None:
    trials = Trials(60.0)
    trials.begin("rebalance-7", OLD, 0.0)
    undo = trials.weigh(1.041, [1.0], 3512, 60.0)
    assert undo is not None
    assert undo.reason == (
        "rebalance-7 had made steps 4.1% longer on the 3512 tokens of the window since, and is undone"
    )


def test_each_trial_counts_only_windows_that_began_after_its_re_placement_and_the_worst_is_undone() -> None:
    trials = Trials(60.0)
    trials.begin("rebalance-1", OLD, 0.0)
    trials.begin("rebalance-2", OLDER, 30.0)
    # the second one would look far worse, but half of these tokens came before it
    assert trials.weigh(1.0, [1.0, 0.1], 100, 60.0) is None
    undo = trials.weigh(1.0, [0.9, 0.8], 100, 120.0)
    assert undo is not None
    assert undo.placement is OLDER


def test_windows_count_by_their_tokens_and_nothing_counted_is_no_harm() -> None:
    trials = Trials(60.0)
    trials.begin("rebalance-1", OLD, 0.0)
    assert weighed(trials, 0.9, 60.0, tokens=0) is None
    trials.begin("rebalance-2", OLDER, 60.0)
    assert weighed(trials, 0.019, 120.0) is None
    assert trials.placements == (OLDER,), "the first one is settled"


def test_a_restarted_clock_begins_trials_again() -> None:
    trials = Trials(60.0)
    trials.begin("rebalance-1", OLD, 1000.0)
    trials.resume(5.0)
    assert not trials.is_due(64.0)
    assert trials.is_due(65.0)
    trials.clear()
    assert not trials.is_due(65.0)
