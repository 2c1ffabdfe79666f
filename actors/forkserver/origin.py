"""How a worker's process came about, for its log: whoever makes the process tells it by an environment variable."""

from __future__ import annotations

from collections.abc import MutableMapping

_VARIABLE = "EMOE_PROCESS_ORIGIN"
_FORKED = "forked from process "


def note_fork(environment: MutableMapping[str, str], server: int) -> None:
    environment[_VARIABLE] = f"{_FORKED}{server}"


def note_start(environment: MutableMapping[str, str], reason: str) -> None:
    """reason: why the process was not forked."""
    environment[_VARIABLE] = f"not forked: {reason}"


def origin(environment: MutableMapping[str, str]) -> tuple[str, bool] | None:
    """What was noted, and whether the process was forked; None where nothing was."""
    noted = environment.get(_VARIABLE)
    return None if noted is None else (noted, noted.startswith(_FORKED))
