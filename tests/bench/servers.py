"""The servers that are compared: how each is started, and when it is ready."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from elastic_moe.deploy.launch.local_ray import free_port
from elastic_moe.model.checkpoints.checkpoint import open_checkpoint

MODEL_NAME = "bench"
MAX_MODEL_LEN = 2048
SLOTS = 32
READY_S = 600.0
STANDBY_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    name: str
    command: Sequence[str]
    """The command line; {port} stands for the port."""
    env: dict[str, str] = field(default_factory=dict)
    ours: bool = False
    peer: bool = False
    """Whether this server is a peer, so that ratios compare with it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Running:
    server: Server
    url: str
    pid: int


def ours(model: Path, workers: int, arguments: Sequence[str] = (), *, kv_tokens: int | None = None) -> Server:
    """`kv_tokens`: tokens for whose keys and values all workers have room together; None: the default room."""
    if kv_tokens is not None:
        info = open_checkpoint(model).info
        room = SLOTS * info.kv_bytes(info.dtype, kv_tokens // SLOTS)
        arguments = [*arguments, "--kv-cache-memory-bytes", str(room // workers)]
    emoe = str(Path(sys.executable).with_name("emoe"))
    name = f"elastic-moe, {workers} worker{'s' if workers > 1 else ''}"
    return Server(
        name=" ".join([name, *arguments]),
        command=[
            *(emoe, "serve", str(model), "--workers", str(workers), "--port", "{port}"),
            *("--max-model-len", str(MAX_MODEL_LEN), "--served-model-name", MODEL_NAME, *arguments),
        ],
        ours=True,
    )


def vllm(venv: Path, model: Path) -> Server:
    """`venv` is a virtual environment with vLLM's CPU build."""
    cores = os.cpu_count() or 1
    return Server(
        name="vLLM",
        command=[
            *(str(venv / "bin" / "vllm"), "serve", str(model), "--port", "{port}"),
            *("--max-model-len", str(MAX_MODEL_LEN), "--dtype", "bfloat16", "--served-model-name", MODEL_NAME),
        ],
        env={
            "VLLM_CPU_KVCACHE_SPACE": "2",
            "VLLM_CPU_OMP_THREADS_BIND": f"0-{cores - 1}",
            "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
            "OMP_NUM_THREADS": str(cores),
        },
        peer=True,
    )


def llama_cpp(source: Path, model: Path, out: Path, kind: str, *, sequence: int = MAX_MODEL_LEN) -> Server:
    """`source` is llama.cpp's source tree, built in its folder build. `kind` as in `gguf_of`.

    `sequence` is the number of tokens of its longest sequence. Only bf16 is a peer: the same numbers as ours.
    """
    gguf = gguf_of(source, model, out, kind)
    cores = str(os.cpu_count() or 1)
    return Server(
        name=f"llama.cpp, {kind}",
        command=[
            *(str(source / "build" / "bin" / "llama-server"), "-m", str(gguf), "--port", "{port}"),
            *("--alias", MODEL_NAME, "-t", cores, "-tb", cores, "-np", str(SLOTS)),
            # its cache of finished prompts takes time and memory, and no prompt is sent twice
            *("-c", str(SLOTS * sequence), "--cache-ram", "0"),
        ],
        peer=kind == "bf16",
    )


def gguf_of(source: Path, model: Path, out: Path, kind: str) -> Path:
    """llama.cpp's file of a checkpoint, which is written to `out` once.

    `kind` is a type of its converter (bf16, q8_0), or of its llama-quantize (q4_k_m), which reads the bf16 file.
    """
    gguf = (out / f"{model.name}-{kind}.gguf").resolve()
    if gguf.exists():
        return gguf
    if kind in CONVERTED:
        _convert(source.resolve(), model.resolve(), gguf, kind)
        return gguf
    plain, unfinished = gguf_of(source, model, out, "bf16"), gguf.with_suffix(".part")
    run_tool(source, "llama-quantize", str(plain), str(unfinished), kind.upper())
    unfinished.rename(gguf)
    return gguf


def run_tool(source: Path, tool: str, *arguments: str) -> str:
    """Run one of llama.cpp's tools. Returns what it printed."""
    command = [str(source / "build" / "bin" / tool), *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{tool} failed with {done.returncode}:\n{done.stdout[-2000:]}")
    return done.stdout


CONVERTED = ("bf16", "f16", "f32", "q8_0")
"""What llama.cpp's converter writes itself."""

_CONVERTER = """
import runpy, sys
sys.path[:0] = [{source!r}, {source!r} + "/gguf-py"]
from conversion import base
base.TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"
sys.argv = ["convert_hf_to_gguf", {model!r}, "--outtype", {kind!r}, "--outfile", {gguf!r}]
runpy.run_path({source!r} + "/convert_hf_to_gguf.py", run_name="__main__")
"""
"""llama.cpp's converter refuses tokenizers that it does not know by a hash; prompts are token ids here."""


def _convert(source: Path, model: Path, gguf: Path, kind: str) -> None:
    print(f"converting the checkpoint to {gguf.name}", flush=True)
    unfinished = gguf.with_suffix(".part")
    script = _CONVERTER.format(source=str(source), model=str(model), kind=kind, gguf=str(unfinished))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"llama.cpp's converter failed:\n{done.stderr[-2000:]}")
    unfinished.rename(gguf)


@contextmanager
def serving(server: Server, log: Path) -> Iterator[Running]:
    """Run a server until the block is left. Raises RuntimeError where it is not ready within READY_S."""
    port = free_port()
    command = [part.replace("{port}", str(port)) for part in server.command]
    with log.open("w") as sink:
        process = subprocess.Popen(
            command, stdout=sink, stderr=subprocess.STDOUT, env=os.environ | server.env, start_new_session=True
        )
    try:
        url = f"http://127.0.0.1:{port}"
        _wait_until_ready(process, url, log, ours=server.ours)
        if server.ours and "--no-standby" not in command:
            _wait_for_standby(url)
        yield Running(server=server, url=url, pid=process.pid)
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _wait_until_ready(process: subprocess.Popen[bytes], url: str, log: Path, *, ours: bool) -> None:
    deadline = time.monotonic() + READY_S
    while time.monotonic() < deadline and process.poll() is None:
        try:
            # peers have no /ready; ours may have no routes yet, and have them a moment later
            paths = ("/ready", "/health", "/v1/models")[0 if ours else 1 :]
            if all(httpx.get(url + path, timeout=5).status_code == 200 for path in paths):
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.5)
    raise RuntimeError(f"the server did not become ready; see {log}")


def _wait_for_standby(url: str) -> None:
    """The process that will be the next worker starts when the server is ready, and takes half a core meanwhile."""
    deadline = time.monotonic() + STANDBY_S
    while not any(w["state"] == "standby" for w in httpx.get(f"{url}/admin/workers").raise_for_status().json()):
        if time.monotonic() > deadline:
            raise RuntimeError(f"no process stands by after {STANDBY_S:g} s")
        time.sleep(0.2)
