"""A model's description comes from another process, and says what the checkpoint's reader says."""

from __future__ import annotations

from pathlib import Path

import pytest

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
