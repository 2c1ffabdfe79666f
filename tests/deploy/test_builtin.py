"""The model that is served when none is given."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from cluster.errors import ConfigError
from deploy.builtin import NOTICE, builtin_model_dir
from model.checkpoint import open_checkpoint


def test_made_once_and_servable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = builtin_model_dir()
    assert path.parent == tmp_path / "elastic-moe"
    made = (path / "config.json").stat().st_mtime_ns
    assert builtin_model_dir() == path
    assert (path / "config.json").stat().st_mtime_ns == made
    assert open_checkpoint(path).info.num_logical_experts == 16
    assert "noise" in NOTICE


def test_several_at_once_and_an_abandoned_draft(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever is first wins; nobody sees half a checkpoint, and drafts do not pile up."""
    barrier = threading.Barrier(3)

    def make(out: Path) -> None:
        barrier.wait()
        (out / "config.json").write_text(out.name)

    monkeypatch.setattr("deploy.builtin._make", make)
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(builtin_model_dir(tmp_path))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 1
    assert list(tmp_path.iterdir()) == [found[0]]


def test_a_failure_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(out: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("deploy.builtin._make", full)
    with pytest.raises(ConfigError, match="No space left"):
        builtin_model_dir(tmp_path)
    assert not list(tmp_path.iterdir())


def test_cache_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("")
    with pytest.raises(ConfigError, match="cannot be written"):
        builtin_model_dir(tmp_path / "cache")
