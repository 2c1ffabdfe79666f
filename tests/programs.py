"""Runs commands in processes that have imported torch already, since importing it takes seconds of a core."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.model.processes import processes
from tests.paths import ROOT


def emoe_forked(*words: str, into: Path) -> subprocess.CompletedProcess[str]:
    """The command `emoe` from its entry point on, with all that its processes print. `into` is an empty folder."""
    printed = [into / name for name in ("stdout", "stderr")]
    process = processes().Process(target=_run, args=(words, printed))
    process.start()
    process.join()
    assert process.exitcode is not None
    return subprocess.CompletedProcess(words, process.exitcode, *(path.read_text() for path in printed))


def _run(words: Sequence[str], printed: Sequence[Path]) -> None:
    from elastic_moe.deploy.cli import entry

    os.chdir(ROOT)
    os.environ["HF_HUB_OFFLINE"] = "1"
    for descriptor, path in enumerate(printed, 1):
        file = os.open(path, os.O_WRONLY | os.O_CREAT)
        os.dup2(file, descriptor)
        os.close(file)
    sys.stdout, sys.stderr = (os.fdopen(os.dup(n), "w", buffering=1) for n in (1, 2))
    sys.argv = ["emoe", *words]
    sys.exit(entry.main())
