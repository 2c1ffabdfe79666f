"""Every target of the Makefile, in a small form: with the environment that runs the tests, on tiny models."""

from __future__ import annotations

import contextlib
import io
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch

from tests.model.families import FAMILIES, tiny_checkpoint
from tests.model.processes import processes
from tests.paths import ROOT
from tests.properties import QUICK

VENV = Path(sys.executable).parents[1]
RAN = {
    *("help", "serve", "test", "check", "lint", "format", "chaos", "bench", "bench-gating", "bench-gpu", "bench-tiers"),
    "bench-scale",
    *("hosts", "test-clients", "test-lm-eval", "test-schema", "clean"),
}
"""Targets that a test below runs."""


ALONE = {name: value for name, value in os.environ.items() if name not in ("ARGS", "MAKEFLAGS", "MAKELEVEL", "MFLAGS")}
"""The environment without what `make test` hands on: an inner make would tell which folders it enters and leaves."""


def make(*words: str, where: Path = ROOT, venv: Path = VENV, expected: int = 0) -> str:
    """Run make; the environment counts as set up. Returns what it printed."""
    ready = [part for stamp in (".installed", ".installed-dev") for part in ("-o", str(venv / stamp))]
    done = subprocess.run(
        ["make", f"VENV={venv}", *ready, *words],
        cwd=where,
        env=ALONE,
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    output = done.stdout + done.stderr
    assert done.returncode == expected, output[-3000:]
    return output


def program(target: str, arguments: str) -> tuple[str, int]:
    """What the target's program prints, and its exit code. Make only says how it would run the program. A process runs
    it that has imported torch already, since importing takes seconds of a core.
    """
    *_, line = make("-n", target, f"ARGS={arguments}").splitlines()
    python, flag, module, *words = shlex.split(line)
    assert (python, flag) == (f"{VENV}/bin/python", "-m")
    context = processes()
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=run_module, args=(theirs, module, words))
    process.start()
    theirs.close()
    printed = ours.recv()
    process.join()
    assert process.exitcode is not None
    return printed, process.exitcode


def run_module(answer: Connection, module: str, words: list[str]) -> None:
    """As `python -m MODULE WORDS` does. Sends what it prints."""
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT))
    sys.argv = [module, *words]
    printed = io.StringIO()
    code: int | str | None = 0
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        try:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        except SystemExit as end:
            code = end.code
    text = code if isinstance(code, str) else ""
    answer.send(printed.getvalue() + text)
    sys.exit(1 if text else code)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A folder with the Makefile and a badly formatted source."""
    for name in ("Makefile", "pyproject.toml", "setup.py"):
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "odd.py").write_text("x = [ 1,2 ]\n")
    return tmp_path


def test_help_lists_every_target() -> None:
    text = (ROOT / "Makefile").read_text()
    phony = re.search(r"^\.PHONY: (.*)$", text, flags=re.M)
    assert phony is not None
    targets = set(phony[1].split())
    assert targets == RAN, "a target that no test runs"
    listed = {line.split()[0] for line in make("help").splitlines()}
    assert listed == targets
    assert make() == make("help")


def test_a_fresh_checkout_is_set_up_first(copy: Path) -> None:
    """What would be done is printed: it takes minutes, and the network."""
    done = subprocess.run(["make", "-n", "bench"], cwd=copy, env=ALONE, capture_output=True, text=True, check=True)
    steps = done.stdout.splitlines()
    order = [next(n for n, step in enumerate(steps) if what in step) for what in ("-m venv", '".[dev]"', "tests.bench")]
    assert order == sorted(order)


def test_serve() -> None:
    assert "--max-num-seqs" in make("serve", "ARGS=--help")


def test_test() -> None:
    assert " passed" in make("test", "ARGS=tests/test_layers.py -o addopts=--import-mode=importlib")


def test_pytest_alone_finds_the_tests_modules_in_processes_that_they_start(tmp_path: Path) -> None:
    """It does not put the current folder on its search path, as `python -m pytest` does."""
    test = f"{ROOT}/tests/actors/forkserver/test_forks.py::test_a_fork_is_as_a_new_process"
    command = [f"{VENV}/bin/pytest", "-p", "no:cacheprovider", "-n", "0", test]
    done = subprocess.run(command, cwd=tmp_path, env=ALONE, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stdout[-3000:]


def test_check_lints_and_then_tests(copy: Path) -> None:
    """What it tests is looked up only: all of it runs in this suite."""
    assert "would be reformatted" in make("check", where=copy, expected=2)
    commands = [shlex.split(line) for line in make("-n", "check").replace("\\\n", " ").splitlines() if "pytest" in line]
    assert len(commands) == 1
    [command] = commands
    assert all((ROOT / word).exists() for word in command if word.startswith("tests/"))
    assert f"--hypothesis-profile={QUICK}" in command
    assert command[command.index("-k") + 1].split()[-1] in FAMILIES


def test_lint_and_format(copy: Path) -> None:
    assert "would be reformatted" in make("lint", where=copy, expected=2)
    make("format", where=copy)
    assert (copy / "odd.py").read_text() == "x = [1, 2]\n"


def test_clean(copy: Path) -> None:
    removed = [copy / name for name in (".venv", ".pytest_cache", ".mypy_cache", ".ruff_cache", "a.egg-info")]
    for folder in removed:
        folder.mkdir()
    make("clean", where=copy, venv=copy / ".venv")
    assert not any(folder.exists() for folder in removed)
    assert (copy / "odd.py").exists()


@pytest.mark.timeout(300)
def test_bench_gating(tmp_path: Path) -> None:
    small = "--policies adaptive --tokens 4 --workers 1 --experts 4 --top-k 2 --hidden 64 --ff 64"
    assert "elastic-moe, dynamic" in make("bench-gating", f"ARGS={small} --out {tmp_path}")
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".md", ".png"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU it would measure")
def test_bench_gpu_says_that_there_is_no_gpu() -> None:
    printed, code = program("bench-gpu", "")
    assert "this benchmark needs a CUDA GPU" in printed
    assert code


@pytest.mark.ray
@pytest.mark.timeout(300)
def test_bench(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    model = tiny_checkpoint("mixtral", tmp_path_factory)
    small = "--workers 1 --concurrency 1 --serve-args=--no-standby"
    text = make("bench", f"ARGS={small} --model {model} --out {tmp_path}")
    assert "Share of the machine's floor" in text
    assert "first tokens are transformers'" in text
    assert (tmp_path / "results.json").exists()


def test_clients() -> None:
    """That it starts: the clients come from the network."""
    assert "--no-install" in program("test-clients", "--help")[0]


def test_chaos() -> None:
    """That it starts; tests/chaos runs some of its scenarios."""
    assert "--only" in program("chaos", "--help")[0]


def test_hosts() -> None:
    """That it finds its cases, which take minutes."""
    assert "tests/hosts/" in make("hosts", "ARGS=--collect-only")


@pytest.mark.parametrize(
    ("target", "flag"),
    [("test-lm-eval", "--keep"), ("test-schema", "--examples"), ("bench-tiers", "--share"), ("bench-scale", "--quick")],
)
def test_checks_by_other_programs(target: str, flag: str) -> None:
    """That they start; each needs an environment of its own to run."""
    assert flag in program(target, "--help")[0]
