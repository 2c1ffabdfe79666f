"""What holds for the whole suite."""

from __future__ import annotations

import pytest

from tests.properties import limit


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if isinstance(item, pytest.Function):
            limit(item.obj)
