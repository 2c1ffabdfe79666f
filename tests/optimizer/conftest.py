"""Where the recorded traces are."""

from pathlib import Path

import pytest


@pytest.fixture
def traces() -> Path:
    return Path(__file__).parent / "traces"
