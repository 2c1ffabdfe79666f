"""The disk's rate as it is while others leave it alone."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import pytest

from elastic_moe.model.tiers import rates


def test_pieces_that_others_delay_do_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "weights").write_bytes(bytes(32 << 20))
    now = 0.0
    delays = iter([0.004, 0.03, 0.004, 0.05, 0.03, 0.004, 0.05, 0.05])

    def read(number: int, into: Sequence[object], at: int) -> int:
        nonlocal now
        now += next(delays)
        return 4 << 20

    monkeypatch.setattr(os, "preadv", read)
    monkeypatch.setattr(rates.time, "perf_counter", lambda: now)
    found = rates.read_rate([tmp_path / "weights"])
    if found is None:
        pytest.skip("the file system reads nothing past the page cache")
    assert found == pytest.approx((4 << 20) / 0.004)
