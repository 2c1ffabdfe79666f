"""What `emoe calibrate` advises where its constants predict little, and what it leaves behind where it is killed."""

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from elastic_moe.deploy.calibrating.calibrate import advice

JOINS = """
import os, signal, sys
from elastic_moe.deploy.calibrating import cluster_group

def join(*_, **__):
    assert os.listdir() == [], "Ray's workers look for modules here"
    if sys.argv[1] == "killed":
        os.kill(os.getpid(), signal.SIGKILL)

cluster_group.join_ray = join
cluster_group.nodes = lambda: ()
try:
    with cluster_group.joined("192.0.2.1:6379"):
        pass
except cluster_group.UserError:
    pass
"""


@pytest.mark.parametrize(
    ("steps", "load", "says"),
    [
        (18, 1.0, "run it again while nothing else runs, and give a model whose experts take most of a step"),
        (2, 1.0, "measure each placement in more steps than 2 (--steps, --turns), and give a model whose"),
        (18, 3.2, "run it while nothing else runs, since the machine was busy: 3.2 processes per core, and give"),
        (2, 3.2, "more steps than 2 (--steps, --turns), and run it while nothing else runs, since"),
    ],
)
def test_the_likely_reason_comes_first(steps: int, load: float, says: str) -> None:
    assert says in advice(steps, load)


def test_a_directory_that_a_killed_one_leaves_goes_with_the_next() -> None:
    # a short path, as of a server's directory
    with tempfile.TemporaryDirectory(prefix="t", dir="/tmp") as parent:
        for fate, code, left in (("killed", -signal.SIGKILL, 1), ("", 0, 0)):
            command = [sys.executable, "-c", JOINS, fate]
            ended = subprocess.run(command, env=os.environ | {"TMPDIR": parent}, check=False)
            assert ended.returncode == code
            assert len([*Path(parent).iterdir()]) == left
