from __future__ import annotations

import ctypes

import pytest

from elastic_moe.model.native import library, unavailable


@pytest.fixture(scope="session")
def lib() -> ctypes.CDLL:
    """The native library; a test that takes it is skipped, with the reason, if the library is not available."""
    loaded = library()
    if loaded is None:
        pytest.skip(f"no native library: {unavailable()}")
    return loaded
