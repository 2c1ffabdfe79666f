"""The disk tier gives the experts of the checkpoint, whatever becomes of its directory."""

from __future__ import annotations

import errno
import logging
import os
import tempfile
import threading
from pathlib import Path

import pytest
import torch

from elastic_moe.cluster.errors import CheckpointError
from elastic_moe.cluster.messages.epochs import FetchSource
from elastic_moe.model.experts.interface import Tensors
from elastic_moe.model.experts.tiered_stacks import TieredStacks
from elastic_moe.model.tiers.disk import UNFINISHED_S, Disk
from elastic_moe.model.tiers.slots import Slot
from tests.model.groups import ToyExperts, run_group

MODULE = ToyExperts(4, 64, 32, 0)


class Reader:
    """A disk tier of one layer. `loads` counts reads of the checkpoint."""

    def __init__(self, directory: Path, model: str = "m" * 64) -> None:
        self.loads = 0
        self.layer = TieredStacks(MODULE)
        layout = self.layer.layout(MODULE.weights[0])
        self.slot = Slot(layout.nbytes)
        self.disk = Disk(directory, model, [self.layer], [layout], self._load)

    def _load(self, layer: int, expert: int) -> Tensors:
        self.loads += 1
        return MODULE.weights[expert]

    def read(self, expert: int) -> FetchSource:
        self.slot.data.fill_(255)
        source = self.disk.read(0, expert, self.slot)
        for name, tensor in self.layer.read(self.slot.data).items():
            assert torch.equal(tensor, MODULE.weights[expert][name])
        return source


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def test_an_expert_is_read_from_the_checkpoint_once(tmp_path: Path) -> None:
    reader = Reader(tmp_path)
    assert [reader.read(e) for e in (0, 1, 0)] == [FetchSource.CHECKPOINT, FetchSource.CHECKPOINT, FetchSource.DISK]
    assert Reader(tmp_path).read(1) is FetchSource.DISK


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EDQUOT])
def test_a_directory_that_cannot_be_written_is_told_of_once(
    number: int, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Full: the write of the data fails. Read-only: no file can be made."""
    reader = Reader(tmp_path)
    tries = []

    def fail(*_: object, **__: object) -> int:
        tries.append(1)
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(*((os, "fdatasync") if number == errno.ENOSPC else (tempfile, "mkstemp")), fail)
    assert [reader.read(e) for e in (0, 1, 0)] == [FetchSource.CHECKPOINT] * 3
    assert len(tries) == 1, "it is not tried again"
    [said] = warnings(caplog)
    assert said == (
        "experts are read from the checkpoint: no records of them can be written to --expert-cache-dir"
        f" {reader.disk.directory}: {os.strerror(number)}"
    )
    assert not list(reader.disk.directory.iterdir())


def test_readers_that_fail_at_the_same_time_say_so_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader, together = Reader(tmp_path), threading.Barrier(3)
    size = reader.slot.data.numel()

    def fail(**_: object) -> int:
        together.wait(20)
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(tempfile, "mkstemp", fail)
    run_group(3, lambda expert: reader.disk.read(0, expert, Slot(size)))
    assert len(warnings(caplog)) == 1


def test_records_that_are_there_are_read_from_a_directory_that_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Reader(tmp_path).read(2)
    monkeypatch.setattr(tempfile, "mkstemp", lambda **_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
    reader = Reader(tmp_path)
    assert [reader.read(e) for e in (0, 2)] == [FetchSource.CHECKPOINT, FetchSource.DISK]


def test_another_model_s_records_are_not_taken(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Each model has a folder of its own; a record that was put into the wrong one is told by its header."""
    mine, other = Reader(tmp_path), Reader(tmp_path, model="n" * 64)
    assert mine.disk.directory != other.disk.directory
    other.read(0)
    os.replace(other.disk.directory / "0-0.expert", mine.disk.directory / "0-0.expert")
    assert mine.read(0) is FetchSource.CHECKPOINT
    [said] = warnings(caplog)
    assert "0-0.expert is read again from the checkpoint: it is a record of something else" in said
    assert mine.read(0) is FetchSource.DISK


def test_a_file_in_the_place_of_the_directory_is_told_of_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("{}")
    reader = Reader(tmp_path / "file")
    assert [reader.read(e) for e in (0, 1, 0)] == [FetchSource.CHECKPOINT] * 3
    [said] = warnings(caplog)
    assert said.endswith("Not a directory")


def test_a_damaged_record_that_cannot_be_replaced_is_reported_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    reader = Reader(tmp_path)
    reader.read(0)
    (reader.disk.directory / "0-0.expert").write_bytes(b"short")
    monkeypatch.setattr(tempfile, "mkstemp", lambda **_: (_ for _ in ()).throw(OSError(errno.EROFS, "read-only")))
    assert [reader.read(0) for _ in range(3)] == [FetchSource.CHECKPOINT] * 3
    assert len(warnings(caplog)) == 2, "of the record, and of the directory"


def test_where_the_checkpoint_cannot_be_read_either_the_step_fails(tmp_path: Path) -> None:
    reader = Reader(tmp_path)

    def damaged(layer: int, expert: int) -> Tensors:
        raise CheckpointError("shard 3 is damaged")

    reader.disk._load = damaged
    with pytest.raises(CheckpointError, match="shard 3 is damaged"):
        reader.read(0)


def test_what_a_process_left_that_died_while_it_wrote_is_removed(tmp_path: Path) -> None:
    reader = Reader(tmp_path)
    reader.read(0)
    old, new = (reader.disk.directory / f".0-1.expert-{name}" for name in ("old", "new"))
    for path in (old, new):
        path.write_bytes(b"half")
    before = old.stat().st_mtime - 2 * UNFINISHED_S
    os.utime(old, (before, before))
    os.utime(reader.disk.directory / "0-0.expert", (before, before))
    Reader(tmp_path)
    assert sorted(path.name for path in reader.disk.directory.iterdir()) == [".0-1.expert-new", "0-0.expert"]
