"""What a replica knows of groups' coordinators, and for how long."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from elastic_moe.cluster.config import ServeConfig
from elastic_moe.deploy.backend import directory
from elastic_moe.deploy.backend.directory import RayDirectory


def test_a_group_that_was_left_is_asked_for_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its coordinator has ended in the meantime."""
    started: list[object] = []

    def start(known: Sequence[Any], config: ServeConfig, model_dir: str, number: int) -> list[Any]:
        made = [object() for _ in range(len(known), number)]
        started.extend(made)
        return [*known, *made]

    monkeypatch.setattr(directory, "start_further_groups", start)
    monkeypatch.setattr(directory.generations, "drop_other_numbers", lambda *_: None)
    first: Any = object()
    known = RayDirectory(ServeConfig(), "model", [first], joined=False)
    known.find(3)
    assert known.coordinators == [first, *started]
    known.leave(1)
    known.find(2)
    assert len(started) == 3
    assert known.coordinators == [first, started[2]]
