"""The wheel holds what git knows of the five folders; the server imports nothing from the current directory."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
import zipfile
from fnmatch import fnmatch
from pathlib import Path

import pytest

from elastic_moe.deploy.launch.local_ray import ServerProcesses
from tests.paths import ROOT
from tests.rooms import FOLDERS, PACKAGE

NOT_INSTALLED = ("deploy/Dockerfile", "deploy/*.yaml", "deploy/grafana/*")
"""What operators take from the repository, and the server does not read."""
BUILD = "import sys, setuptools.build_meta as b; print(b.build_{kind}(sys.argv[1]))"
BESIDE = ("pyproject.toml", "setup.py", "README.md", "LICENSE")
"""What a build reads besides the five folders."""
HOSTILE = ("numpy", "safetensors", "ray", "yaml", "model", "cluster", "optimizer", "actors", "deploy", "tests")
"""Names of modules that lie where the server is started."""


pytestmark = pytest.mark.skipif(not (ROOT / ".git").exists(), reason="git says which files are sources")


def tracked() -> list[str]:
    """Paths of the five folders' files in the repository, those included that are not committed yet."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "--", *FOLDERS]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return [path for path in done.stdout.splitlines() if (ROOT / path).exists()]


def installed(path: str) -> bool:
    return not any(fnmatch(path, pattern) for pattern in NOT_INSTALLED)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tracked files only, linked: a build writes into its source, and must not find what git ignores."""
    source = tmp_path_factory.mktemp("source")
    for path in [*tracked(), *BESIDE]:
        target = source / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.symlink_to(ROOT / path)
    return source


def build(kind: str, source: Path, out: Path) -> Path:
    """As pip does it, without its environment: nothing is downloaded."""
    command = [sys.executable, "-c", BUILD.format(kind=kind), str(out)]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return out / done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def sdist(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("sdist", source, tmp_path_factory.mktemp("sdist"))


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from the source distribution, as users without a wheel do: a file that the former lacks, both lack."""
    unpacked = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(sdist) as archive:
        archive.extractall(unpacked, filter="data")
    return build("wheel", next(unpacked.iterdir()), tmp_path_factory.mktemp("wheel"))


@pytest.fixture
def hostile(tmp_path: Path) -> Path:
    """A directory with modules that end whoever imports them."""
    for name in HOSTILE:
        (tmp_path / f"{name}.py").write_text(f"raise SystemExit('imported {name} of the current directory')\n")
    for name in ("actors", "deploy", "tests"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise SystemExit('imported a folder of the current directory')\n")
    return tmp_path


def test_the_wheel_holds_every_source_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        (scripts,) = (archive.read(name).decode() for name in archive.namelist() if name.endswith("entry_points.txt"))
    assert names == {f"{PACKAGE}/{path}" for path in tracked() if installed(path)}
    assert "emoe = elastic_moe.deploy.cli.entry:main" in scripts
    assert "emoe-haproxy = elastic_moe.deploy.joined.haproxy:main" in scripts


def test_the_wheel_is_used_where_modules_of_the_same_names_lie(wheel: Path, hostile: Path, tmp_path: Path) -> None:
    """The command by its module, and data files, from a directory that is full of traps."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    code = f"""
import sys
sys.path.insert(0, {str(tmp_path / "site")!r})
sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in getattr(finder, "__module__", "")]
import elastic_moe.deploy
assert elastic_moe.deploy.__file__.startswith({str(tmp_path / "site")!r}), elastic_moe.deploy.__file__
from runpy import run_module
sys.argv = ["emoe", "plan", "builtin:bible", "--workers", "2", "--planner", "greedy", "--out", "plan.json"]
run_module("elastic_moe.deploy.cli", run_name="__main__")
"""
    command = [sys.executable, "-I", "-c", code]
    done = subprocess.run(command, cwd=hostile, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "step cost" in done.stdout
    assert (hostile / "plan.json").exists()


def test_the_image_is_built_from_what_the_wheel_is_built_from() -> None:
    """`.dockerignore` leaves everything out, and names what comes in."""
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    assert "*" in lines
    assert {line[1:] for line in lines if line.startswith("!")} == {*FOLDERS, *BESIDE}


def test_files_that_contributing_names_are_there() -> None:
    named = re.findall(r"`((?:tests|{})/[^` ]*)`".format("|".join(FOLDERS)), (ROOT / "CONTRIBUTING.md").read_text())
    assert named
    assert [path for path in named if not (ROOT / path).exists()] == []


@pytest.mark.parametrize("address", [None, "192.0.2.1:6379"])
def test_workers_do_not_import_from_the_current_directory(
    address: str | None, hostile: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray puts the directory in which it is started on its workers' search path, before all others."""
    import ray

    from elastic_moe.cluster.config import ServeConfig
    from elastic_moe.deploy.launch.run_directory import RunDirectory

    seen: list[list[str]] = []
    monkeypatch.chdir(hostile)
    monkeypatch.setattr(os, "environ", os.environ.copy())
    monkeypatch.setattr(ray, "init", lambda **_: seen.append(os.listdir()))
    directory = RunDirectory.create()
    try:
        with monkeypatch.context() as patched:
            for name in (
                "redirect_worker_output",
                "without_onlookers",
                "lengthen_waits",
                "choose_agents_ports",
                "report_processes",
            ):
                patched.setattr(f"elastic_moe.deploy.launch.ray_private.{name}", lambda *_: None)
            patched.setattr("elastic_moe.deploy.launch.local_ray.check_answers", lambda _: None)
            ServerProcesses(ServeConfig(address=address), directory).start_ray()
    finally:
        directory.remove()
    assert seen == [[]]
    assert Path.cwd() == hostile
