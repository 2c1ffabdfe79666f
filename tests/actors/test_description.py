"""A model's description comes from another process, and says what the checkpoint's reader says."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from elastic_moe.actors import stillness
from elastic_moe.actors.description import describe
from elastic_moe.cluster.errors import CheckpointError
from elastic_moe.model.checkpoints.checkpoint import open_checkpoint
from tests.model.random_checkpoint import make_random_checkpoint


def test_what_the_reader_says(tmp_path: Path) -> None:
    make_random_checkpoint(tmp_path, "qwen3_moe", hidden=32, layers=1, experts=4, top_k=2, ff=16, vocab=512)
    assert describe(str(tmp_path)) == open_checkpoint(tmp_path).info
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError) as expected:
        open_checkpoint(tmp_path)
    with pytest.raises(CheckpointError) as error:
        describe(str(tmp_path))
    assert str(error.value) == str(expected.value)


def test_a_process_that_is_stopped_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stillness, "STOPPED_S", 0.5)
    make_random_checkpoint(tmp_path, "qwen3_moe", hidden=32, layers=1, experts=4, top_k=2, ff=16, vocab=512)

    def stop() -> psutil.Process:
        # it is another Python by then: one that is stopped before is waited for by its parent
        while not (children := [c for c in psutil.Process().children() if "description" in " ".join(c.cmdline())]):
            time.sleep(0.001)
        children[0].suspend()
        return children[0]

    with ThreadPoolExecutor(1) as thread:
        stopped = thread.submit(stop)
        assert describe(str(tmp_path)) == open_checkpoint(tmp_path).info
    assert not stopped.result().is_running()
