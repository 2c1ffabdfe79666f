from hypothesis import given
from hypothesis import strategies as st

from elastic_moe.actors.engine.step_deadline import FLOOR_S, LATE_FLOOR_S, StepDeadline


def known(step_s: float, *, tokens: int = 4) -> StepDeadline:
    deadline = StepDeadline(60.0)
    for _ in range(200):
        deadline.met(tokens, step_s)
    return deadline


def test_the_deadline_falls_with_quick_steps_down_to_its_floor() -> None:
    assert StepDeadline(60.0).seconds(4) == StepDeadline(60.0).late_s(4) == 60.0
    assert (known(0.02).late_s(4), known(0.02).seconds(4)) == (LATE_FLOOR_S, FLOOR_S)
    assert (known(0.5).late_s(4), known(0.5).seconds(4)) == (5.0, FLOOR_S)


def test_a_slow_step_keeps_the_deadline_long_for_a_while() -> None:
    deadline = known(0.02)
    deadline.met(4, 4.0)
    assert deadline.seconds(4) == deadline.late_s(4) == 40.0


def test_a_slow_step_is_soon_forgotten_where_it_is_only_about_a_ping() -> None:
    deadline = StepDeadline(60.0)
    deadline.met(4, 0.5)
    for _ in range(8):
        deadline.met(4, 0.02)
    assert (deadline.late_s(4), deadline.seconds(4)) == (LATE_FLOOR_S, 60.0)


def test_quick_small_steps_do_not_shorten_the_deadline_of_large_ones() -> None:
    deadline = known(0.02, tokens=4)
    assert deadline.seconds(7) == FLOOR_S
    assert deadline.seconds(8) == deadline.seconds(2048) == 60.0


@given(st.floats(1.0, 600.0), st.lists(st.tuples(st.integers(1, 4096), st.floats(0.0, 700.0)), max_size=50))
def test_a_slow_step_that_does_not_hang_is_finished(limit_s: float, steps: list[tuple[int, float]]) -> None:
    """Whatever came before, a step that the limit allows is not given up for ever."""
    deadline = StepDeadline(limit_s)
    for tokens, step_s in [*steps, (1, 0.0)]:
        deadline.met(tokens, step_s)
        assert 0 < deadline.late_s(tokens) <= deadline.seconds(tokens) <= limit_s
    for tokens in {tokens for tokens, _ in steps}:
        for _ in range(4):
            deadline.missed(tokens)
        assert deadline.seconds(tokens) == limit_s
