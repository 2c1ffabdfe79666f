"""What holds for the whole suite."""

from __future__ import annotations

import gc
import os
import re
from functools import cache
from pathlib import Path

import pytest
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling

from tests.paths import ROOT
from tests.properties import limit

# Several workers run as threads of one process here, and on two cores their OpenMP threads would wait for one another:
# the parity tests took ten times as long. Tests that are about numbers of threads set them themselves.
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if "hosts" not in config.option.markexpr:
        items[:] = [item for item in items if item.get_closest_marker("hosts") is None]
    for item in items:
        if isinstance(item, pytest.Function):
            limit(item.obj)
    # with `-n 2` these are the longest piece of work, so it begins first
    items.sort(key=lambda item: item.get_closest_marker("ray") is None)


def pytest_collection_finish() -> None:
    # the imported packages are most of the heap: the collector would go through them again in every long test
    gc.freeze()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> LoadScopeScheduling:
    return OneRayAtATime(config, log)


class OneRayAtATime(LoadScopeScheduling):
    """Gives all files that start Ray to one process, all tests of a model family to one, and every other test to
    whichever is free. A family's checkpoint, and transformers' answers on it, are made once in a process.

    xdist's own groups (--dist loadgroup) have no effect with pytest 9.2, which keeps names of tests elsewhere.
    """

    def _split_scope(self, nodeid: str) -> str:
        if starts_ray(ROOT / nodeid.partition("::")[0]):
            return "ray"
        family = families().search(nodeid.partition("[")[2])
        return nodeid if family is None else family[0]


@cache
def families() -> re.Pattern[str]:
    """Finds a family's name. The names are read, because importing them takes seconds of this process."""
    text = (ROOT / "tests/model/families.py").read_text()
    names = sorted(set(re.findall(r'^    "(\w+)', text, re.MULTILINE)), key=len, reverse=True)
    return re.compile(rf"\b({'|'.join(names)})\b")


@cache
def starts_ray(file: Path) -> bool:
    return "pytest.mark.ray" in file.read_text()
