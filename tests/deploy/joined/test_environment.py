"""The environment of `ray start`: printed, in the image, and known to Ray."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from elastic_moe.deploy.cli.main import main
from elastic_moe.deploy.joined.environment import cluster_environment, exports
from elastic_moe.deploy.launch.ray_private import ENVIRONMENT, HAPROXY_VARIABLE
from tests.paths import ROOT


def test_a_shell_takes_over_what_is_printed() -> None:
    wanted = cluster_environment("/a path/emoe-haproxy")
    command = exports(wanted) + "env -0"
    done = subprocess.run(["sh", "-ec", command], env={"PATH": os.environ["PATH"]}, capture_output=True, check=True)
    printed = dict(line.split("=", 1) for line in done.stdout.decode().split("\0") if line)
    assert wanted.items() <= printed.items()


def test_the_command_names_a_script_that_is_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cluster-env"]) == 0
    (path,) = re.findall(rf"^export {HAPROXY_VARIABLE}=(.*)$", capsys.readouterr().out, re.MULTILINE)
    assert os.access(path, os.X_OK)
    assert Path(path).is_absolute()


def test_the_image_has_it() -> None:
    """KubeRay's own command starts Ray there, and nobody could set it before."""
    (block,) = re.findall(r"^ENV ((?:.*\\\n)*.*)$", (ROOT / "deploy" / "Dockerfile").read_text(), re.MULTILINE)
    written = dict(word.split("=", 1) for word in shlex.split(block.replace("\\\n", " ")))
    assert written == cluster_environment(written[HAPROXY_VARIABLE])


def test_ray_reads_each() -> None:
    """ENVIRONMENT is compared with the installed Ray elsewhere (test_ray_private.py). One name is
    uvicorn's, and one Python's."""
    assert cluster_environment("").keys() - ENVIRONMENT.keys() == {"FORWARDED_ALLOW_IPS", "PYTHONUTF8"}
