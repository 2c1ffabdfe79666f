"""What holds for the whole suite."""

from __future__ import annotations

import os

import pytest

from tests.properties import limit

# Several workers run as threads of one process here, and on two cores their OpenMP threads would wait for one another:
# the parity tests took ten times as long. Tests that are about numbers of threads set them themselves.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if isinstance(item, pytest.Function):
            limit(item.obj)
        if item.get_closest_marker("ray"):
            item.add_marker(pytest.mark.xdist_group("ray"))  # one Ray cluster at a time, whatever -n says
    # the group is the longest piece of work, so it begins first
    items.sort(key=lambda item: item.get_closest_marker("ray") is None)
