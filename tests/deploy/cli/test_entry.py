"""What the command does before anything else."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.paths import ROOT

SHOW = """
import sys
from elastic_moe.deploy.cli.entry import prefer_utf8
prefer_utf8()
print(open(sys.argv[1]).encoding, sys.flags.dev_mode, *sys.argv[1:], flush=True)
import subprocess
subprocess.run([sys.executable, "-c", "print(open('/dev/null').encoding)"])
"""


@pytest.mark.parametrize("locale", ["C", "C.UTF-8"])
def test_files_are_in_utf8_whatever_the_locale(locale: str) -> None:
    environment = os.environ | {"LC_ALL": locale, "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    shown = subprocess.run(
        [sys.executable, "-X", "dev", "-c", SHOW, os.devnull, "café", "a b"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        encoding="utf-8",
        timeout=60,
        check=True,
    )
    ours, theirs = shown.stdout.lower().split("\n")[:2]
    assert ours == f"utf-8 true {os.devnull} café a b"
    assert theirs == "utf-8"
