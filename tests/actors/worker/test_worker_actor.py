"""What only the process around a worker can do: end, where it is of no use any more."""

from __future__ import annotations

import errno
import os
from typing import Any

import pytest

from elastic_moe.actors.worker.worker_actor import WorkerActor


class Ended(BaseException):
    pass


class Worker:
    def __init__(self, error: OSError) -> None:
        self._error = error

    def prepare(self, spec: Any) -> None:
        raise self._error


@pytest.mark.parametrize(
    ("number", "expected"), [(errno.EMFILE, Ended), (errno.ENFILE, Ended), (errno.ECONNREFUSED, OSError)]
)
def test_a_worker_that_can_open_nothing_ends(
    number: int, expected: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    def end(code: int) -> None:
        raise Ended

    monkeypatch.setattr(os, "_exit", end)
    actor: Any = WorkerActor()
    actor._worker = Worker(OSError(number, "no"))
    with pytest.raises(expected):
        actor.prepare(None)
