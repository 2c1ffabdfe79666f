"""The model that is served when none is given: a small random checkpoint, made once and kept in the user's cache."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from cluster.errors import ConfigError

NOTICE = "The built-in model has random weights: its text is noise. Give a model directory to serve a real one."
"""What a user of the built-in model must be told."""

_NAME = "random-qwen3-moe-1"
"""The number changes with what is made, so that an older one is not taken for it."""


def builtin_model_dir(cache_dir: Path | None = None) -> Path:
    """Directory of the built-in checkpoint, which is made on the first call (a few seconds).

    `cache_dir` defaults to elastic-moe under $XDG_CACHE_HOME or ~/.cache. Processes that call it at the same time all
    get a complete checkpoint. Raises ConfigError where nothing can be written there.
    """
    base = _default_cache_dir() if cache_dir is None else cache_dir
    target = base / _NAME
    if (target / "config.json").is_file():
        return target
    try:
        base.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix=f".{_NAME}-", dir=base))
    except OSError as error:
        raise ConfigError(f"{base}: the built-in model cannot be written there ({error.strerror})") from error
    try:
        _make(draft)
        _publish(draft, target)
    except OSError as error:
        raise ConfigError(f"{base}: the built-in model cannot be written there ({error.strerror})") from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return target


def _default_cache_dir() -> Path:
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "elastic-moe"


def _make(out: Path) -> None:
    # torch and transformers take seconds to import: not before they are needed
    from model.random_checkpoint import make_random_checkpoint

    make_random_checkpoint(
        out, "qwen3_moe", hidden=256, layers=6, experts=16, top_k=4, ff=256, vocab=8192, dtype="bfloat16"
    )


def _publish(draft: Path, target: Path) -> None:
    """Rename the finished draft. Where another process was faster, its copy stays: both are the same."""
    draft.chmod(0o755)
    try:
        draft.rename(target)
    except OSError:
        if not (target / "config.json").is_file():
            raise
