"""One expert of one layer in one file: a header of a page, and then the bytes of a slot (model/record_layout.py).

The header names the model, the layer, the expert and the layout, and ends with a digest of header and bytes. So a
record that is damaged, short, or of another model is told from a good one whenever it is read. A record is written
under another name and then renamed, so that nobody reads half a record, also if two workers write it at the same time.

Records are read past the page cache (O_DIRECT) where the file system can: experts are far larger than the memory that
is left, and a page cache would only take memory from the cache area.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import mmap
import os
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from elastic_moe.model.native import library
from elastic_moe.model.record_layout import PAGE, RecordLayout

_MAGIC = b"EMOEXPRT"
_VERSION = 1
_DIGEST = 32
_COLUMNS = 512
"""64-bit words in a page."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordName:
    """What a record holds: `model` is the digest of the checkpoint that it was made from."""

    model: str
    layer: int
    expert: int

    def path(self, directory: Path) -> Path:
        return directory / f"{self.layer}-{self.expert}.expert"


class BadRecord(Exception):
    """A record is damaged, short or of another model. The message says which."""


def header(name: RecordName, layout: RecordLayout) -> bytes:
    """The header's bytes before the digest."""
    about = {"model": name.model, "layer": name.layer, "expert": name.expert, "layout": json.loads(layout.text())}
    text = json.dumps(about, sort_keys=True).encode()
    begin = _MAGIC + _VERSION.to_bytes(4, "little") + len(text).to_bytes(4, "little") + text
    room = PAGE - _DIGEST
    if len(begin) > room:
        # a layer with very many tensors: the digest of its description stands for it
        begin = _MAGIC + _VERSION.to_bytes(4, "little") + hashlib.sha256(text).digest()
    return begin.ljust(room, b"\0")


def column_sums(payload: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint64]:
    """[512] a checksum of a whole number of pages: the sums of their words in each column, modulo 2^64.

    A word is multiplied by an odd number of its own row first. So a change of any one word changes a sum, and so does
    an exchange of two pages.
    """
    rows = len(payload) // PAGE
    sums = np.zeros(_COLUMNS, dtype=np.uint64)
    if (lib := library()) is not None:
        lib.emoe_column_sums(payload.ctypes.data_as(ctypes.c_void_p), rows, sums.ctypes.data_as(ctypes.c_void_p))
        return sums
    words = payload.view(np.uint64).reshape(rows, _COLUMNS)
    odd = 2 * np.arange(rows, dtype=np.uint64) + np.uint64(1)
    for first in range(0, rows, 64):
        sums += (words[first : first + 64] * odd[first : first + 64, None]).sum(axis=0, dtype=np.uint64)
    return sums


def column_sums_there(payload: Tensor) -> Tensor:
    """[..., 512] int64 the same of rows of bytes [..., B], on their device: a GPU reads them in a hundredth of the
    time."""
    if not payload.shape[-1]:
        return payload.new_zeros((*payload.shape[:-1], _COLUMNS), dtype=torch.int64)
    words = payload.view(torch.int64)
    rows = words.view(*words.shape[:-1], words.shape[-1] // _COLUMNS, _COLUMNS)
    odd = 2 * torch.arange(rows.shape[-2], device=payload.device) + 1
    return (rows * odd[:, None]).sum(-2)


def digest(head: bytes, payload: npt.NDArray[np.uint8]) -> bytes:
    """Of a header and a slot's bytes."""
    return hashlib.sha256(head + column_sums(payload).tobytes()).digest()


def read_record(path: Path, head: bytes, slot: Tensor, page: mmap.mmap) -> None:
    """Read a record into a slot, which begins at a multiple of PAGE, and check it. Blocks on the disk.

    `page` is memory for the header. Raises FileNotFoundError if there is none, BadRecord, and OSError.
    """
    payload = slot.numpy()
    whole = PAGE + len(payload)
    with _opened(path) as file:
        if os.fstat(file.number).st_size != whole:
            raise BadRecord("it is not of its layout's size")
        _read_all(file.number, [memoryview(page), payload.data], whole)
        if not file.direct:
            os.posix_fadvise(file.number, 0, whole, os.POSIX_FADV_DONTNEED)
    if page[: len(head)] != head:
        raise BadRecord("it is a record of something else")
    if page[len(head) : PAGE] != digest(head, payload):
        raise BadRecord("its digest does not match")


def write_record(path: Path, head: bytes, slot: Tensor) -> None:
    """Write a slot's bytes as a record. Blocks on the disk. Raises OSError, and leaves no file then."""
    payload = slot.numpy()
    number, name = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    try:
        with os.fdopen(number, "wb", buffering=0) as file:
            for piece in (memoryview(head + digest(head, payload)), payload.data):
                done = 0
                while done < len(piece):
                    done += file.write(piece[done:]) or 0
            # dirty pages would be written anyway; now they do not pile up in the page cache
            os.fdatasync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        os.replace(name, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(name)
        raise


def remove_unfinished(directory: Path, *, older_than: float) -> None:
    """Remove files that became no record, because the process that wrote them died, and that nobody has written to
    since the time `older_than`. Another worker may remove them at the same time. Raises OSError."""
    for path in directory.glob(".*.expert-*"):
        with suppress(FileNotFoundError):
            if path.stat().st_mtime < older_than:
                path.unlink()


class _opened:
    """A file for reading, past the page cache if `direct`."""

    def __init__(self, path: Path) -> None:
        self.direct = True
        try:
            self.number = os.open(path, os.O_RDONLY | os.O_DIRECT)
        except FileNotFoundError:
            raise
        except OSError:
            # this file system cannot read past the page cache
            self.number = os.open(path, os.O_RDONLY)
            self.direct = False

    def __enter__(self) -> _opened:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.number)


def _read_all(number: int, pieces: list[memoryview], whole: int) -> None:
    done = 0
    while done < whole:
        count = os.preadv(number, pieces, done)
        done += count
        # a direct read that ends early ends at the end of the file, or between two pages
        if not count or count % PAGE:
            break
        while pieces and count >= len(pieces[0]):
            count -= len(pieces.pop(0))
        if count:
            pieces[0] = pieces[0][count:]
    if done != whole:
        raise BadRecord("it ends early")
