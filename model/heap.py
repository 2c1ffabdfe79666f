"""Returns freed memory to the operating system.

Loading allocates lasting and temporary tensors in turns. glibc's heap keeps the holes that temporary tensors leave:
each is just too small for the next aligned tensor of the same size. Together they take half as much memory as the
model.
"""

from __future__ import annotations

import ctypes
from typing import Final

_malloc_trim: Final = getattr(ctypes.CDLL(None), "malloc_trim", None)
"""A function of glibc. Other C libraries do not have it, and do not need it."""


def return_freed_memory() -> None:
    """Return whole free pages of the heap to the system. Takes about a millisecond."""
    if _malloc_trim is not None:
        _malloc_trim(0)
