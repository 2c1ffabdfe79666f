from hypothesis import given
from hypothesis import strategies as st

from actors.step_deadline import FLOOR_S, StepDeadline


def test_it_comes_down_as_steps_are_quick_and_never_below_its_floor() -> None:
    deadline = StepDeadline(60.0)
    assert deadline.seconds == 60.0
    for _ in range(400):
        deadline.met(0.02)
    assert deadline.seconds == FLOOR_S


def test_a_slow_step_is_remembered_for_a_while() -> None:
    deadline = StepDeadline(60.0)
    for _ in range(400):
        deadline.met(0.02)
    deadline.met(4.0)
    assert deadline.seconds == 40.0


@given(st.floats(1.0, 600.0), st.lists(st.floats(0.0, 700.0), max_size=50))
def test_a_step_that_is_slow_and_does_not_hang_gets_through(limit_s: float, steps_s: list[float]) -> None:
    """Whatever came before, a step that the limit allows is not given up for ever."""
    deadline = StepDeadline(limit_s)
    for step_s in steps_s:
        deadline.met(step_s)
        assert 0 < deadline.seconds <= limit_s
    for _ in range(4):
        deadline.missed()
    assert deadline.seconds == limit_s
