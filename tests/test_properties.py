"""The quick profile holds for every property, whatever its decorator says."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.properties import QUICK, limit, most


@pytest.fixture
def profile(request: pytest.FixtureRequest) -> Iterator[None]:
    before = settings.get_current_profile_name()
    settings.load_profile(request.param)
    yield
    settings.load_profile(before)


@pytest.mark.usefixtures("profile")
@pytest.mark.parametrize(
    ("profile", "asked", "tried"), [(QUICK, 60, 10), (QUICK, 4, 4), ("default", 60, 60)], indirect=["profile"]
)
def test_as_many_examples_are_tried_as_the_profile_allows(asked: int, tried: int) -> None:
    seen = []

    @settings(max_examples=asked, database=None)
    @given(st.integers(0, 10**9))
    def property_of(number: int) -> None:
        seen.append(number)

    limit(property_of)
    property_of()
    assert len(seen) == tried
    assert most(asked) == tried
