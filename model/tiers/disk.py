"""The disk tier of one worker: an expert's record, or the checkpoint where there is no good record.

An expert that was read from the checkpoint becomes a record at once, so that it is read and packed from there only
once. If the directory is full or cannot be written, the checkpoint is the disk tier, and one warning says so.
"""

from __future__ import annotations

import hashlib
import logging
import mmap
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from torch import Tensor

from elastic_moe.cluster.config import cache_directory
from elastic_moe.cluster.messages.epochs import FetchSource
from elastic_moe.model.checkpoints.checkpoint import Checkpoint
from elastic_moe.model.experts.interface import SlottedExperts, Tensors
from elastic_moe.model.record_layout import PAGE, RecordLayout
from elastic_moe.model.tiers.records import BadRecord, RecordName, header, read_record, remove_unfinished, write_record
from elastic_moe.model.tiers.slots import Slot

log = logging.getLogger(__name__)

UNFINISHED_S = 600.0
"""Seconds after which a record that is not finished was left by a process that died."""
_KEPT_NAME = 16
"""Characters of a digest in the name of a folder."""


class Disk:
    """Reads experts of a worker into slots. Several threads may call it."""

    def __init__(
        self,
        directory: Path,
        model: str,
        layers: Sequence[SlottedExperts],
        layouts: Sequence[RecordLayout],
        load: Callable[[int, int], Tensors],
    ) -> None:
        """`directory` is that of all models; `model` is the checkpoint's digest. `load(layer, expert)` reads an expert
        from the checkpoint. The directory need not exist, and need not be writable.
        """
        self._model = model
        self._layers = layers
        self._layouts = layouts
        self._load = load
        self._loading = threading.Lock()
        self._telling = threading.Lock()
        """Several readers may fail at the same time, and one of them says so."""
        self._own = threading.local()
        form = hashlib.sha256("\n".join([model, *(layout.text() for layout in layouts)]).encode()).hexdigest()
        self.directory = directory / form[:_KEPT_NAME]
        self._writable = True
        self._told_bad = False
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            remove_unfinished(self.directory, older_than=time.time() - UNFINISHED_S)
        except OSError as error:
            self._give_up_writing(error)

    def read(self, layer: int, expert: int, slot: Slot) -> FetchSource:
        """Read an expert into a slot, and make a record of it if there is no good one.

        Raises CheckpointError if neither record nor checkpoint can be read.
        """
        layout = self._layouts[layer]
        name = RecordName(model=self._model, layer=layer, expert=expert)
        path, head = name.path(self.directory), header(name, layout)
        data = slot.data[: layout.nbytes]
        try:
            read_record(path, head, data, self._page())
            return FetchSource.DISK
        except (FileNotFoundError, NotADirectoryError):
            pass
        except (BadRecord, OSError) as error:
            self._note_bad(path, error)
        with self._loading:
            tensors = self._load(layer, expert)
            # what lies between and behind the tensors is part of the digest
            data.zero_()
            self._layers[layer].write(tensors, data)
        self._keep(path, head, data)
        return FetchSource.CHECKPOINT

    def _note_bad(self, path: Path, error: Exception) -> None:
        # a damaged directory has many such records, and where none can be replaced, every step comes here
        with self._telling:
            before, self._told_bad = self._told_bad, True
        if not before:
            more = "; further such records are not reported"
            log.warning("%s is read again from the checkpoint: %s%s", path, error, more)

    def _page(self) -> mmap.mmap:
        """This thread's memory for headers."""
        page: mmap.mmap | None = getattr(self._own, "page", None)
        if page is None:
            page = self._own.page = mmap.mmap(-1, PAGE)
        return page

    def _keep(self, path: Path, head: bytes, data: Tensor) -> None:
        if not self._writable:
            return
        try:
            write_record(path, head, data)
        except OSError as error:
            self._give_up_writing(error)

    def _give_up_writing(self, error: OSError) -> None:
        with self._telling:
            before, self._writable = self._writable, False
        if before:
            log.warning(
                "experts are read from the checkpoint: no records of them can be written to --expert-cache-dir %s: %s",
                self.directory,
                error.strerror or error,
            )


def default_directory() -> Path:
    """Where records lie if no directory is given."""
    return cache_directory() / "experts"


def checkpoint_digest(checkpoint: Checkpoint, dtype: str) -> str:
    """Tells checkpoints apart: by the names, sizes and times of the files that hold weights, by what their headers say
    of each tensor, and by the dtype that is served. Reads no weight.
    """
    digest = hashlib.sha256(f"{dtype}\n{checkpoint.packing}\n{checkpoint.config.to_json_string()}\n".encode())
    for file in sorted({tensor.file for tensor in checkpoint.tensors.values()}):
        status = file.stat()
        digest.update(f"{file.name} {status.st_size} {status.st_mtime_ns}\n".encode())
    for name, tensor in sorted(checkpoint.tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tensor.shape} {tensor.file.name} {tensor.start}\n".encode())
    return digest.hexdigest()
