"""Columns of 32-bit integers as bytes, for messages that would otherwise hold an object for each sequence.

They have the byte order of the machine, which is the same on both sides.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

NO_TOKEN = -1
"""Stands in a column of tokens where a token is in another message, or where there is none."""


def integers(column: bytes) -> list[int]:
    """The numbers of a column. Raises ValueError if it is cut short."""
    numbers = array("i")
    numbers.frombytes(column)
    return numbers.tolist()


def column_of(numbers: Sequence[int]) -> bytes:
    return array("i", numbers).tobytes()
