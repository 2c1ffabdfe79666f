"""Real actors of Ray whose processes are forked."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile

import pytest

from tests.actors.forkserver.harness import gone
from tests.paths import ROOT

pytestmark = pytest.mark.ray


@pytest.mark.timeout(280)
def test_two_sessions_side_by_side_in_which_everything_dies() -> None:
    """What the driver waits for (deaths are seen, and nothing is left), and that no session has the other's server."""
    with tempfile.TemporaryDirectory(prefix="fork-") as one, tempfile.TemporaryDirectory(prefix="fork-") as other:
        drivers = [
            subprocess.Popen(
                [sys.executable, "-m", "tests.actors.forkserver.driver", directory],
                cwd=ROOT,
                stdout=subprocess.PIPE,
                text=True,
            )
            for directory in (one, other)
        ]
        said = [driver.communicate(timeout=250)[0].strip().splitlines()[-1:] for driver in drivers]
    assert [driver.returncode for driver in drivers] == [0, 0]
    seen = [json.loads(line) for (line,) in said]
    servers = set()
    for session in seen:
        first, second, again = session["first"], session["second"], session["again"]
        for worker in [*first, *second, again]:
            assert worker["origin"] == [f"forked from process {worker['origin'][0].split()[-1]}", True]
            assert worker["product"] == 300.0**3
            assert worker["threads"] == 1
            assert worker["title"].startswith("ray::Worker")
        assert again["pid"] == first[2]["pid"]
        # seen by its connection, and not by a time limit
        assert session["death_seen_s"] < 5
        assert f"a line of {again['pid']}" in session["lines"]
        servers |= {first[0]["parent"], second[0]["parent"]}
    assert len(servers) == 4
    assert all(gone(server) for server in servers)


@pytest.mark.timeout(200)
def test_what_is_killed_before_it_registers_is_started_again() -> None:
    """In each of the ways in which a process starts, both are killed that this Ray starts at a time."""
    with tempfile.TemporaryDirectory(prefix="fork-") as directory:
        driver = subprocess.run(
            [sys.executable, "-m", "tests.actors.forkserver.early_deaths", directory],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
            timeout=190,
            check=True,
        )
    seen = json.loads(driver.stdout.strip().splitlines()[-1])
    # killed, and actors that answer
    assert seen == {"plain": [2, 6], "preparing": [2, 2], "forked": [2, 2], "watchers": 0}
