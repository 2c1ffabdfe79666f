"""Measures how fast a worker reads experts from the disk, copies them to a GPU, and computes them on the host."""

from __future__ import annotations

import mmap
import os
import statistics
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from elastic_moe.model.experts.interface import Tensors
from elastic_moe.model.experts.tiered_stacks import TieredStacks
from elastic_moe.model.record_layout import PAGE
from elastic_moe.model.tiers.link import Link, Pinned

_MOST_BYTES = 48 << 20
_MOST_S = 0.25
_PIECE = 4 << 20
_COPIES = 8
"""Copies of an expert that are computed in turns, so that none is in a cache of the cores."""


ASSUMED_BYTES_PER_S = 1e9
"""Where no file can be read past the page cache, such as in a file system in memory."""


def read_rate(files: Sequence[Path]) -> float | None:
    """Bytes per second of direct reads from the largest of these files: three of four pieces of 4 MB come more slowly,
    because others read while a worker loads. It reads some 48 MB, for a quarter of a second at most. None if no file
    can be read past the page cache.
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
    rates: list[float] = []
    done, begin = 0, time.perf_counter()
    at = begin
    while done < min(size, _MOST_BYTES) and at - begin < _MOST_S:
        count = os.preadv(number, [memory], done)
        if not count:
            break
        done, before, at = done + count, at, time.perf_counter()
        rates.append(count / (at - before))
    return sorted(rates)[len(rates) * 3 // 4] if rates else None


@dataclass(frozen=True, slots=True, kw_only=True)
class HostRates:
    """What a worker's host memory is good for beside a GPU."""

    bytes_per_s: float
    """Bytes per second of copies to the GPU."""
    token_s: float
    """Seconds that the host's cores take for one row in one expert, most of it for reading weights if rows are few."""


def host_rates(device: torch.device, layer: TieredStacks, tensors: Tensors) -> HostRates:
    """Measure with the tensors of an expert of the layer, which may be anywhere. It takes some 0.1 s.

    Raises RuntimeError if no memory can be pinned.
    """
    nbytes = layer.layout(tensors).nbytes
    link, slots = Link(device), Pinned(_COPIES * nbytes, device).slots(nbytes)
    target = link.slot(nbytes)
    near = {name: tensor.cpu() for name, tensor in tensors.items()}
    for slot in slots:
        layer.write(near, slot.data)
    copies, products = [], []
    for slot in (*slots, *slots):
        begin = time.perf_counter()
        link.copy(slot, target)
        slot.wait()
        copies.append(time.perf_counter() - begin)
        begin = time.perf_counter()
        layer.run_lent(slot.data)
        products.append(time.perf_counter() - begin)
    # in the first turns threads start
    copy_s, token_s = (statistics.median(times[_COPIES:]) for times in (copies, products))
    return HostRates(bytes_per_s=nbytes / max(copy_s, 1e-9), token_s=token_s)
