"""Compiles the native library if it is wanted and possible, and loads it once per process."""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import logging
import os
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

from elastic_moe.cluster.config import cache_directory, native_wanted
from elastic_moe.model.native.structs import MIRRORED, mismatch

log = logging.getLogger(__name__)

_SOURCES = Path(__file__).parent
_FLAGS = (
    "-std=c++17",
    "-O3",
    "-march=native",
    "-fno-math-errno",
    "-fno-trapping-math",
    # without contraction, a product and a sum round twice, as in the PyTorch path
    "-ffp-contract=off",
    "-fopenmp",
    "-fPIC",
    "-shared",
)
_NEEDED = ("avx2", "fma", "f16c")
"""CPU features that the library needs, by their names in /proc/cpuinfo. With avx512_bf16, vector.h uses AVX-512."""
_COMPILE_TIMEOUT_S = 300
_MAKING = "compiling-"
"""How the names of directories begin in which the library is made."""

_SIGNATURES = {
    "emoe_pack": "piiitp",
    "emoe_unpack": "piiitp",
    "emoe_pack8": "ppiiitp",
    "emoe_unpack8": "piiitpp",
    "emoe_round4": "piipppt",
    "emoe_pack4": "pppiiitp",
    "emoe_unpack4": "piiitppp",
    "emoe_pack_f4": "pppiiitp",
    "emoe_unpack_f4": "piiitppp",
    "emoe_linear": "piiiptippt",
    "emoe_rows8": "pipipt",
    "emoe_linear_wide": "piiipipt",
    "emoe_linear_heads": "piiiiipipiit",
    "emoe_most_likely": "ptiip",
    "emoe_rms_norm": "piipftpt",
    "emoe_layer_norm": "piippfpt",
    "emoe_gated_norm": "pipiiiipftttpt",
    "emoe_rotate": "piiiiipptp",
    "emoe_block": "ppippippipiipppt",
    "emoe_head": "pppipt>t",
    "emoe_latent_block": "ppipppipipippt",
    "emoe_route": "piippiitpppt",
    "emoe_route_scored": "piipittpiiiitfpppt",
    "emoe_attention": "ppppiiiippipipfifppt",
    "emoe_attention_write": "pppiiippipipt",
    "emoe_latent_attention": "pppiiipipiipfifppt",
    "emoe_experts": "piiiiptttffpptptipt>t",
    "emoe_column_sums": "pip",
    "emoe_delta_rule": "pipipittppiiiiitppppt",
    "emoe_selective_update": "pipipipittpppffiiiiippppt",
    "emoe_channel_update": "pppppiiippppt",
    "emoe_delta_scan": "pipipittppiiiiitpppt",
    "emoe_selective_scan": "pipipipittpppffiiiiipppt",
    "emoe_channel_scan": "pppppiiipppt",
    "emoe_convolve_tokens": "piiipptpt",
    "emoe_convolve": "piiipptppppt",
    "emoe_state_block": "ppitipppppppt",
    "emoe_exchange_bytes": "iiii>i",
    "emoe_exchange_new": "iiiiipi>p",
    "emoe_exchange_free": "p",
    "emoe_exchange_abort": "p",
    "emoe_exchange_meet": "p>t",
    "emoe_exchange_begin": "pp",
    "emoe_exchange_decline": "p",
    "emoe_exchange_waited": "pp",
    "emoe_choose_replicas": "iippp",
    "emoe_exchange_layer": "piiptttffppppppt>t",
    "emoe_layers": "ppipipippiipipiptt>t",
    "emoe_layers_idle": "ppippt>t",
    "emoe_feed_forward": "ppppipptt>t",
    "emoe_two_parts": "pppppippppptt>t",
    "emoe_tiles": "t>t",
    "emoe_attention_sizes": "p",
    "emoe_block_sizes": "p",
    "emoe_latent_block_sizes": "p",
    "emoe_layers_sizes": "p",
    "emoe_state_block_sizes": "p",
    "emoe_experts_sizes": "p",
}
"""The arguments of each function: p pointer, i int64, f float, t int. A type after `>` is that of the result."""
_TYPES = {"p": ctypes.c_void_p, "i": ctypes.c_int64, "f": ctypes.c_float, "t": ctypes.c_int}


def library() -> ctypes.CDLL | None:
    """The library, or None if it is not available. The first call may compile the library, which takes some seconds."""
    return _load()[0]


def unavailable() -> str | None:
    """Why the library is not available; None if it is."""
    return _load()[1]


@cache
def _load() -> tuple[ctypes.CDLL | None, str | None]:
    try:
        loaded = ctypes.CDLL(str(_built()))
        for name, signature in _SIGNATURES.items():
            arguments, _, result = signature.partition(">")
            function = getattr(loaded, name)
            function.argtypes = [_TYPES[kind] for kind in arguments]
            function.restype = _TYPES[result] if result else None
        if (difference := mismatch(loaded, MIRRORED)) is not None:
            raise _Unavailable(difference)
        return loaded, None
    except _Unavailable as error:
        reason = str(error)
    except (OSError, subprocess.SubprocessError) as error:
        reason = f"{type(error).__name__}: {error}"
    log.info("bfloat16 on CPU is computed by PyTorch's operators, not by the native library: %s", reason)
    return None, reason


class _Unavailable(Exception):
    """The library is not available. The message says why."""


def _built() -> Path:
    """The compiled library, which is compiled now if it is missing. If several processes call at once, one compiles."""
    if not native_wanted():
        raise _Unavailable("EMOE_NATIVE=0")
    cpu = _cpu_flags()
    missing = [flag for flag in _NEEDED if flag not in cpu]
    if missing:
        raise _Unavailable(f"this CPU lacks {', '.join(missing)}")
    compiler = next((found for name in ("c++", "g++", "clang++") if (found := shutil.which(name))), None)
    if compiler is None:
        raise _Unavailable("no C++ compiler on the PATH")
    files = sorted(path for path in _SOURCES.rglob("*") if path.suffix in (".cpp", ".h"))
    version = subprocess.run([compiler, "--version"], capture_output=True, check=True, timeout=30).stdout
    # -march=native depends on the CPU's flags, so a cache that several machines share has a build for each CPU
    parts = [version, " ".join(sorted(cpu)).encode(), " ".join(_FLAGS).encode()]
    parts += [str(path.relative_to(_SOURCES)).encode() + b"\0" + path.read_bytes() for path in files]
    key = hashlib.blake2b(b"\0".join(parts), digest_size=10).hexdigest()
    directory = cache_directory()
    directory.mkdir(parents=True, exist_ok=True)
    target = directory / f"native-{key}.so"
    if not target.exists():
        with (directory / "native.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not target.exists():
                _compile(compiler, [path for path in files if path.suffix == ".cpp"], target)
    return target


def _compile(compiler: str, sources: list[Path], target: Path) -> None:
    """Compile all sources at once, each in a process of its own, and link them. `target` is never seen incomplete."""
    # who compiles has the lock, so others have been killed meanwhile
    for left in target.parent.glob(f"{_MAKING}*"):
        shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=_MAKING, dir=target.parent) as made:
        objects = [Path(made) / f"{source.stem}.o" for source in sources]
        jobs = [
            subprocess.Popen(
                [compiler, *_FLAGS[:-1], "-I", str(_SOURCES), "-c", str(source), "-o", str(out)],
                stderr=subprocess.PIPE,
                text=True,
            )
            for source, out in zip(sources, objects, strict=True)
        ]
        errors = [job.communicate(timeout=_COMPILE_TIMEOUT_S)[1] for job in jobs]
        for source, job, error in zip(sources, jobs, errors, strict=True):
            if job.returncode:
                raise _Unavailable(f"{Path(compiler).name} failed at {source.name}: {_first_error(error)}")
        linked = Path(made) / target.name
        done = subprocess.run(
            [compiler, *_FLAGS, *map(str, objects), "-o", str(linked)], capture_output=True, text=True, timeout=60
        )
        if done.returncode:
            raise _Unavailable(f"linking failed: {_first_error(done.stderr)}")
        os.replace(linked, target)


def _first_error(text: str) -> str:
    lines = text.splitlines()
    return next((line for line in lines if "error" in line.lower()), lines[0] if lines else "no message")


def _cpu_flags() -> set[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        raise _Unavailable("only Linux on x86 is known") from None
    return set(next((line.partition(":")[2] for line in lines if line.startswith("flags")), "").split())
