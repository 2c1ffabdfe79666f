"""What fork servers import: Ray's part is common to all workers, and only those that compute need the model's code."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from elastic_moe.actors.forkserver import launcher
from elastic_moe.actors.forkserver.request import Stage
from elastic_moe.cluster.config import ServeConfig

_RAY = ("ray._private.workers.default_worker",)
"""The script that a raylet has its workers run."""
MODEL = Stage("model", _RAY, True)


def may_fork(config: ServeConfig, *, alone: bool) -> bool:
    """Whether Ray's workers are forked. alone: whether the server has started Ray itself."""
    return config.fork_workers and alone and sys.platform == "linux"


def command_of_models() -> str:
    """The command of workers that compute, for Ray's `py_executable`."""
    return launcher.command([MODEL])


def command_of_others(modules: Sequence[str]) -> str:
    """The command of workers that do not compute. With their server starts that of workers which do.

    modules: what these workers import, at the most.
    """
    return launcher.command([Stage("others", (*_RAY, *modules), False), MODEL])
