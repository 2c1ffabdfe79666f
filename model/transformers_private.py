"""Every use of transformers that its documentation does not promise: the one place to look when it is upgraded.

tests/model/test_private_seams.py names each with the signature that is expected of it, so that an upgrade fails a test
instead of losing a path. Imports nothing of this project.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, ExpertsInterface

__all__ = ["ALL_EXPERTS_FUNCTIONS", "ExpertsInterface"]

_ROTARY = "apply_rotary_pos_emb"
"""The function of a modelling file that its attention modules call by this name."""


def rotary_function(file: Any) -> Callable[..., Any] | None:
    """The rotary embedding of a modelling file (a Python module); None where it has none of the usual name."""
    function: Callable[..., Any] | None = getattr(file, _ROTARY, None)
    return function


def replace_rotary_function(file: Any, function: Callable[..., Any]) -> None:
    """From now on every model of this modelling file in this process calls `function`."""
    setattr(file, _ROTARY, function)
