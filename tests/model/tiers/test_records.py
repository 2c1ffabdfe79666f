"""Records: what was written is read, and anything else is refused."""

from __future__ import annotations

import mmap
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic_moe.model.record_layout import PAGE, RecordLayout, lay_out
from elastic_moe.model.tiers import records
from elastic_moe.model.tiers.records import BadRecord, RecordName, column_sums, header, read_record, write_record
from elastic_moe.model.tiers.slots import Slot

NAME = RecordName(model="m" * 64, layer=3, expert=7)


def made() -> tuple[RecordLayout, dict[str, torch.Tensor]]:
    g = torch.Generator().manual_seed(0)
    tensors = {"down": torch.randn(40, 30, generator=g), "bias": torch.randn(7, generator=g).bfloat16()}
    return lay_out("plain", tensors), tensors


def written(path: Path) -> tuple[bytes, RecordLayout, Slot]:
    layout, tensors = made()
    slot = Slot(layout.nbytes)
    slot.data.zero_()
    for name, view in layout.views(slot.data).items():
        view.copy_(tensors[name])
    head = header(NAME, layout)
    write_record(path, head, slot.data)
    return head, layout, slot


def read(path: Path, head: bytes, layout: RecordLayout) -> Slot:
    slot = Slot(layout.nbytes)
    read_record(path, head, slot.data, mmap.mmap(-1, PAGE))
    return slot


def test_a_record_has_the_bits_that_were_written(tmp_path: Path) -> None:
    path = tmp_path / "record"
    head, layout, slot = written(path)
    got = read(path, head, layout)
    assert torch.equal(got.data, slot.data)
    for name, tensor in made()[1].items():
        assert torch.equal(layout.views(got.data)[name], tensor)
    assert path.stat().st_size % PAGE == 0
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("place", [0, 20, PAGE - 1, PAGE, PAGE + 100, -1])
def test_a_changed_byte_is_seen(tmp_path: Path, place: int) -> None:
    path = tmp_path / "record"
    head, layout, _ = written(path)
    whole = bytearray(path.read_bytes())
    whole[place] ^= 64
    path.write_bytes(whole)
    with pytest.raises(BadRecord):
        read(path, head, layout)


def test_short_and_foreign_records_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "record"
    head, layout, _ = written(path)
    other = header(RecordName(model="n" * 64, layer=3, expert=7), layout)
    with pytest.raises(BadRecord, match="something else"):
        read(path, other, layout)
    path.write_bytes(path.read_bytes()[:-PAGE])
    with pytest.raises(BadRecord, match="size"):
        read(path, head, layout)
    with pytest.raises(FileNotFoundError):
        read(tmp_path / "none", head, layout)


def test_a_write_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space"):
        written(tmp_path / "record")
    assert not list(tmp_path.iterdir())


def test_file_systems_without_direct_reads_are_read_through_the_page_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "record"
    head, layout, slot = written(path)
    open_file = os.open

    def refuse(name: Path, flags: int, *more: int) -> int:
        if flags & os.O_DIRECT:
            raise OSError(22, "Invalid argument")
        return open_file(name, flags, *more)

    monkeypatch.setattr(os, "open", refuse)
    assert torch.equal(read(path, head, layout).data, slot.data)


@given(pages=st.integers(0, 130), seed=st.integers(0, 1000))
@settings(max_examples=20, deadline=None)
def test_the_checksum_is_the_same_with_and_without_the_native_library(pages: int, seed: int) -> None:
    payload = np.random.default_rng(seed).integers(0, 256, pages * PAGE).astype(np.uint8)
    native = column_sums(payload)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(records, "library", lambda: None)
        assert np.array_equal(column_sums(payload), native)
    if pages > 1:
        swapped = payload.reshape(pages, PAGE)[::-1].reshape(-1).copy()
        assert not np.array_equal(column_sums(swapped), native) or np.array_equal(swapped, payload)
