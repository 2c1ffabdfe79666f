"""Prompts beside decodes take the time that they may, whatever the machine."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic_moe.actors.scheduler.prefill_pace import FEWEST_TOKENS, ROOM_S, SHARE, PrefillPace
from tests.properties import most


def learned(alone_s: float, token_s: float, *, decodes: int = 4, prompts: int = 48) -> PrefillPace:
    pace = PrefillPace(48)
    for _ in range(5):
        pace.met(decodes, 0, alone_s)
        pace.met(decodes, prompts, alone_s + prompts * token_s)
    return pace


def test_what_is_not_known_yet_is_as_given() -> None:
    pace = PrefillPace(48)
    assert pace.tokens(4) == 48
    pace.met(4, 0, 0.06)
    assert pace.tokens(4) == 48
    pace.met(1, 48, 0.2)
    assert pace.tokens(4) == 48


def test_while_prompts_wait_all_the_time_steps_with_them_tell_what_decodes_take() -> None:
    pace = PrefillPace(48)
    pace.met(0, 512, 0.512)
    for _ in range(3):
        pace.met(4, 48, 0.4 + 48 * 0.001)
    assert pace.tokens(4) == pytest.approx(SHARE * 0.4 / 0.001, abs=1)
    # what is seen counts more than what is guessed
    pace.met(4, 0, 0.1)
    assert pace.tokens(4) == pytest.approx(SHARE * 0.1 / 0.001, abs=1)


@given(st.floats(0.001, 2.0), st.floats(1e-6, 0.01), st.integers(1, 512))
@settings(deadline=None, max_examples=most(100))
def test_prompts_take_their_share_of_the_time(alone_s: float, token_s: float, prompts: int) -> None:
    tokens = learned(alone_s, token_s, prompts=prompts).tokens(4)
    expected = max(ROOM_S, SHARE * alone_s) / token_s
    assert tokens == pytest.approx(max(FEWEST_TOKENS, expected), abs=1.5, rel=1e-3)


def test_prompts_take_more_where_many_wait_beside_few() -> None:
    pace = learned(0.1, 0.001)
    assert [pace.tokens(4, crowd) for crowd in (0, 1, 2, 100)] == pytest.approx([75, 150, 225, 300], abs=1)


def test_each_number_of_decodes_has_its_own_time() -> None:
    pace = learned(0.1, 0.001, decodes=4)
    pace.met(32, 0, 0.4)
    assert [pace.tokens(decodes) for decodes in (4, 5, 32)] == pytest.approx([75, 75, 300], abs=1)


def test_a_machine_that_slows_down_is_followed_and_one_stall_is_not() -> None:
    pace = learned(0.1, 0.001)
    pace.met(4, 0, 20.0)
    pace.met(4, 48, 20.0)
    stalled = pace.tokens(4)
    assert 0.3 * 75 < stalled <= 1.4 * 75
    for _ in range(60):
        pace.met(4, 0, 0.1)
        pace.met(4, 48, 0.1 + 48 * 0.002)
    assert pace.tokens(4) == pytest.approx(37, abs=2)
