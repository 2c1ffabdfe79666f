"""Finds ranges of numbers that llguidance 1.9 gets wrong, so that they are refused and no answer is invalid.

Where both bounds are within one unit, an excluded bound that is a whole number is allowed all the same: -4 for numbers
from -4.5 up to, and without, -4.
"""

from __future__ import annotations

from typing import Any


def check_ranges(schema: Any) -> None:
    """Raises ValueError, which names the bounds, where `schema` has such a range anywhere."""
    level = [schema]
    while level:
        below: list[Any] = []
        for part in level:
            if isinstance(part, dict):
                _check(part)
                below += part.values()
            elif isinstance(part, list):
                below += part
        level = below


def _check(schema: dict[str, Any]) -> None:
    above, below = _first(schema.get("exclusiveMinimum")), _first(schema.get("exclusiveMaximum"))
    low, high = _first(above, schema.get("minimum")), _first(below, schema.get("maximum"))
    whole = any(bound is not None and float(bound).is_integer() for bound in (above, below))
    if whole and low is not None and high is not None and high - low <= 1 and schema.get("type") != "integer":
        raise ValueError(f"numbers between {low} and {high} without a bound that is a whole number are not supported")


def _first(*values: Any) -> float | None:
    return next((value for value in values if _is_number(value)), None)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
