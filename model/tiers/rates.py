"""Measures how fast a worker reads experts from the disk."""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from elastic_moe.model.record_layout import PAGE

_MOST_BYTES = 48 << 20
_MOST_S = 0.25
_PIECE = 4 << 20


ASSUMED_BYTES_PER_S = 1e9
"""Where no file can be read past the page cache, such as in a file system in memory."""


def read_rate(files: Sequence[Path]) -> float | None:
    """Bytes per second of direct reads from the largest of these files. It reads some 48 MB, for a quarter of a second
    at most. None if no file can be read past the page cache.
    """
    sized = []
    for file in files:
        with suppress(OSError):
            sized.append((file.stat().st_size, file))
    if not sized:
        return None
    size, largest = max(sized)
    try:
        number = os.open(largest, os.O_RDONLY | os.O_DIRECT)
    except OSError:
        return None
    try:
        return _measure(number, size // PAGE * PAGE)
    except OSError:
        return None
    finally:
        os.close(number)


def _measure(number: int, size: int) -> float | None:
    memory = mmap.mmap(-1, _PIECE)
    done, begin = 0, time.perf_counter()
    while done < min(size, _MOST_BYTES) and time.perf_counter() - begin < _MOST_S:
        count = os.preadv(number, [memory], done)
        if not count:
            break
        done += count
    passed_s = time.perf_counter() - begin
    return done / passed_s if done else None
