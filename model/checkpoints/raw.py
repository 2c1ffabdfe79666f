"""Reads a checkpoint's JSON files as they are written. It imports no torch, so that a wrong path is named at once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from elastic_moe.cluster.errors import CheckpointError


def read_configuration(path: Path) -> dict[str, Any]:
    """The model directory's config.json. Raises CheckpointError where there is none, or it names no type of model."""
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such directory")
    file = path / "config.json"
    if not file.is_file():
        raise CheckpointError(f"{path}: has no config.json")
    raw = read_json(file)
    if not isinstance(raw.get("model_type"), str):
        raise CheckpointError(f"{file}: model_type is missing")
    return raw


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object. Raises CheckpointError if the file is unreadable or holds something else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise CheckpointError(f"{path}: not valid JSON ({error})") from error
    except RecursionError as error:
        raise CheckpointError(f"{path}: not valid JSON (nested too deeply)") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: must hold a JSON object, found {type(value).__name__}")
    return value
