"""What holds for the whole suite."""

from __future__ import annotations

import os

import pytest

from tests.properties import limit

# Several workers run as threads of one process here, and on two cores their OpenMP threads would wait for one another:
# the parity tests took ten times as long. Tests that are about numbers of threads set them themselves.
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if isinstance(item, pytest.Function):
            limit(item.obj)
