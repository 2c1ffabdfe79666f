"""Gives memory that was freed back to the operating system.

Loading allocates what it keeps and what it does not in turns, and glibc's heap keeps the holes: they are just too small
for the next aligned tensor of the same size, and add up to half of what is kept.
"""

from __future__ import annotations

import ctypes
from typing import Final

_malloc_trim: Final = getattr(ctypes.CDLL(None), "malloc_trim", None)
"""Of glibc; other C libraries have none, and need none."""


def return_freed_memory() -> None:
    """Return whole free pages of the heap to the system. Takes about a millisecond."""
    if _malloc_trim is not None:
        _malloc_trim(0)
