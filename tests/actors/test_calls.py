"""What an error of a remote call says of the process that was called."""

from __future__ import annotations

import pytest
from ray.exceptions import (
    ActorDiedError,
    ActorUnavailableError,
    NodeDiedError,
    OutOfMemoryError,
    RayError,
    RayTaskError,
    WorkerCrashedError,
)

from actors.calls import is_death, one_line
from cluster.errors import NotReadyError

MEMORY = "Ray ended its process, since the memory of its machine was nearly full"


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (ActorDiedError(), "its process died"),
        (ActorUnavailableError("away", b"0" * 16), "its process died"),
        (NodeDiedError("node"), "its process died"),
        (WorkerCrashedError(), "its process died"),
        # of its memory monitor; not an actor's error to Ray
        (OutOfMemoryError("Task was killed due to the node running low on memory.\nMemory on the node ..."), MEMORY),
    ],
)
def test_a_process_that_is_gone(error: RayError, told: str) -> None:
    assert is_death(error)
    assert one_line(error) == told


@pytest.mark.parametrize("error", [NotReadyError("wait"), TimeoutError(), OSError("no")])
def test_a_process_that_is_there(error: Exception) -> None:
    assert not is_death(error)
    assert not is_death(RayTaskError("f", "traceback", error))
