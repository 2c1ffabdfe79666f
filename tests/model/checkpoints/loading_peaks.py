"""Measures the memory that loading takes at most: `python -m tests.model.checkpoints.loading_peaks TINY [DIR FORM]...`.

A worker loads each checkpoint DIR with `--expert-dtype FORM`, one after the other. It prints, one a line, the most
memory that was taken while loading and the bytes of the weights that are kept. TINY is a checkpoint of the same family:
what is imported and made once is there before the measured ones load. (In a process of its own for each, the pages of
libraries would be counted anew.)
"""

from __future__ import annotations

import gc
import sys
from pathlib import Path

import torch

from elastic_moe.cluster.messages.epochs import ModelSpec, WorkerSpec
from elastic_moe.cluster.placement import WorkerId
from elastic_moe.model.checkpoints.checkpoint import open_checkpoint
from elastic_moe.model.heap import return_freed_memory
from elastic_moe.model.worker.data_plane import DataPlane

PEAK_RESET = "5"
"""What the kernel takes in clear_refs to forget the peak (proc(5))."""


def load(path: str, form: str) -> int:
    """Load a whole checkpoint in bfloat16. Returns the bytes of its weights."""
    info = open_checkpoint(path).info
    worker = DataPlane(
        WorkerSpec(
            worker=WorkerId("w0"),
            model=ModelSpec(path=path, dtype="bfloat16", device="cpu", max_model_len=32, expert_dtype=form),
            experts=(tuple(range(info.num_logical_experts)),) * info.num_layers,
            kv_cache_bytes=1 << 20,
            block_size=16,
            max_num_seqs=1,
            max_num_batched_tokens=32,
            num_threads=1,
        )
    )
    worker.load()
    return worker.loaded.weight_bytes


def status_bytes(field: str) -> int:
    """A field of this process's status that the kernel gives in kB, such as VmRSS and VmHWM (proc(5))."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def main() -> None:
    torch.set_num_threads(1)
    tiny, *arguments = sys.argv[1:]
    load(tiny, "auto")
    for path, form in zip(arguments[::2], arguments[1::2], strict=True):
        gc.collect()
        return_freed_memory()
        Path("/proc/self/clear_refs").write_text(PEAK_RESET)
        before = status_bytes("VmRSS")
        kept = load(path, form)
        sys.stdout.write(f"{status_bytes('VmHWM') - before} {kept}\n")


if __name__ == "__main__":
    main()
