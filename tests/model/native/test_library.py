"""Compiling the native library: several processes may ask at once, and there is a reason if it is not available."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from elastic_moe.model.native import structs
from elastic_moe.model.native.structs import MIRRORED, mismatch
from tests.paths import ROOT

PROGRAM = """
from importlib import import_module
from elastic_moe.model.native import library, unavailable
module = import_module("elastic_moe.model.native.library")
module._FLAGS = tuple(flag.replace("-O3", "-O0") for flag in module._FLAGS)
print(library() is not None, unavailable())
"""
"""A build that is not optimised takes a third of the time; the fixture `lib` is one that is."""


def start(**environment: str) -> subprocess.Popen[str]:
    # a process of its own: the library is loaded once per process
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM],
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )


def test_processes_that_ask_at_once_get_one_build(lib: ctypes.CDLL, tmp_path: Path) -> None:
    answers = [job.communicate(timeout=200)[0] for job in [start(XDG_CACHE_HOME=str(tmp_path)) for _ in range(3)]]
    assert answers == ["True None\n"] * 3
    assert len(list(tmp_path.glob("elastic-moe/native-*.so"))) == 1
    assert not [path for path in tmp_path.glob("elastic-moe/*") if path.is_dir()]


def test_what_a_killed_build_leaves_goes_with_the_next_one(lib: ctypes.CDLL, tmp_path: Path) -> None:
    compiler, cache = tmp_path / "bin" / "c++", tmp_path / "cache"
    compiler.parent.mkdir()

    def begin(does: str) -> subprocess.Popen[str]:
        compiler.write_text(f'#!/bin/sh\n[ "$1" = --version ] || {does}\n')
        compiler.chmod(0o700)
        return start(XDG_CACHE_HOME=str(cache), PATH=f"{compiler.parent}:{os.environ['PATH']}")

    def directories() -> list[Path]:
        return [path for path in cache.glob("elastic-moe/*") if path.is_dir()]

    killed = begin("exec sleep 20")
    while killed.poll() is None and not directories():
        time.sleep(0.01)
    killed.kill()
    killed.communicate()
    assert directories()
    assert begin("exit 1").communicate(timeout=60)[0].startswith("False c++ failed")
    assert not directories()


@pytest.mark.parametrize(
    ("environment", "reason"),
    [({"EMOE_NATIVE": "0"}, "EMOE_NATIVE=0"), ({"PATH": "/nonexistent"}, "no C++ compiler on the PATH")],
)
def test_the_reason_is_reported(lib: ctypes.CDLL, environment: dict[str, str], reason: str) -> None:
    assert start(**environment).communicate(timeout=60)[0] == f"False {reason}\n"


def test_a_cache_that_cannot_be_written_is_a_reason(lib: ctypes.CDLL, tmp_path: Path) -> None:
    (tmp_path / "elastic-moe").write_text("in the way")
    answer = start(XDG_CACHE_HOME=str(tmp_path)).communicate(timeout=60)[0]
    assert answer.startswith("False ")
    assert "elastic-moe" in answer


def test_structures_that_differ_are_a_reason(lib: ctypes.CDLL) -> None:
    class Norm(ctypes.Structure):
        _fields_ = (("weight", ctypes.c_void_p), ("size", ctypes.c_int64))

    assert mismatch(lib, MIRRORED) is None
    _, *others = MIRRORED["emoe_block_sizes"]
    size = ctypes.sizeof(structs.Norm)
    assert size > 16
    why = mismatch(lib, MIRRORED | {"emoe_block_sizes": (Norm, *others)})
    assert why == f"Norm takes {size} bytes in the library and 16 in model/native/structs.py"


def test_every_structure_is_compared() -> None:
    types = [value for value in vars(structs).values() if isinstance(value, type)]
    declared = {value for value in types if issubclass(value, ctypes.Structure)}
    assert len(declared) == 14
    assert {structure for group in MIRRORED.values() for structure in group} == declared
