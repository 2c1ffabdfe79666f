"""Where recorded traces are, if they are there."""

from pathlib import Path

import pytest

TRACES = Path(__file__).parents[3] / "shared" / "traces"


@pytest.fixture
def traces() -> Path:
    if not TRACES.is_dir():
        pytest.skip(f"no recorded traces at {TRACES}")
    return TRACES
