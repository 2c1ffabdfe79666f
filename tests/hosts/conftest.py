"""One laboratory for all tests of this folder, and a Ray cluster on it for each test that asks for one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.conftest import checkpoint, reference
from tests.hosts.cluster import HostCluster
from tests.hosts.lab import Lab, LabUnavailable

__all__ = ["checkpoint", "reference"]


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """Three hosts."""
    base = tmp_path_factory.getbasetemp()
    lab = Lab(base / "lab", shared=[base])
    try:
        lab.up(3)
    except LabUnavailable as why:
        pytest.skip(str(why))
    yield lab
    lab.down()


@pytest.fixture
def cluster(lab: Lab, tmp_path: Path) -> Iterator[HostCluster]:
    """Hosts without Ray. A test starts the head and joins what it wants; afterwards the hosts are empty again."""
    cluster = HostCluster(lab, tmp_path)
    yield cluster
    cluster.down()
