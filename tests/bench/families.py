"""Which path serves each family, and how near its steps come to what the machine allows.

`python -m tests.bench.families qwen3_moe gpt_oss qwen3_next` makes a random checkpoint of hidden size 1024 of each
family in bfloat16. It prints the share of the memory or compute floor that is reached on one core: by decode steps of
1, 8 and 32 sequences of 160 tokens, and by a prompt of 512 tokens. Without arguments it takes every family of the
README's table, which takes several minutes. To be run alone on the machine. With `--checkpoints DIR` checkpoints are
taken from there, and made there if they are missing; `--make` only makes them, so that this can be done at any time.

A step reads each weight that it needs once, keys and values, and the states of its sequences, which it also writes.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from elastic_moe.cluster.fit import CodePath, FitReport
from elastic_moe.model.checkpoints.checkpoint import open_checkpoint
from elastic_moe.model.worker.data_plane import DataPlane
from tests.bench.machine import Floor, Machine, floor_of, measure_machine, where_and_when
from tests.bench.report import markdown
from tests.bench.step import CONTEXT, decode_s, load_worker, prefill_s
from tests.model.families import FAMILIES, HYBRIDS
from tests.model.random_checkpoint import make_random_checkpoint

BATCHES = (1, 8, 32)
PROMPT = 512
SIZES = {"hidden": 1024, "layers": 4, "experts": 32, "top_k": 4, "ff": 512, "vocab": 4096}
_LONGROPE = FAMILIES["phimoe-longrope"]["rope_parameters"]
WIDE: Mapping[str, Mapping[str, Any]] = {
    "qwen3_next": {"linear_num_key_heads": 8, "linear_num_value_heads": 16, "linear_key_head_dim": 128}
    | {"linear_value_head_dim": 128},
    "qwen3_5_moe_text": {"linear_num_key_heads": 8, "linear_num_value_heads": 16, "linear_key_head_dim": 128}
    | {"linear_value_head_dim": 128},
    "kimi_linear": {"linear_num_heads": 8, "linear_head_dim": 128, "num_local_experts": SIZES["experts"]},
    "granitemoehybrid-mamba": {"mamba_n_heads": 32, "mamba_d_head": 64, "mamba_d_state": 128, "mamba_chunk_size": 256},
    "nemotron_h": {"mamba_num_heads": 32, "mamba_head_dim": 64, "ssm_state_size": 128, "n_groups": 8}
    | {"chunk_size": 256, "moe_latent_size": 512, "moe_shared_expert_intermediate_size": 1024},
    "gpt_oss": {"sliding_window": 128},
    "gemma4_text": {"sliding_window": 512},
    "jamba": {"mamba_d_state": 16},
    "minimax": {"intermediate_size": SIZES["ff"], "block_size": 256},
    "dots1": {"sliding_window": 4096},
    # a factor for each pair of numbers of a head
    "phimoe-longrope": {
        "rope_parameters": _LONGROPE
        | {name: [f for f in _LONGROPE[name] for _ in range(4)] for name in ("short_factor", "long_factor")}
    },
    "deepseek_v32": {"index_topk": 2048, "index_n_heads": 32, "index_head_dim": 128},
    "glm_moe_dsa": {"index_topk": 2048, "index_n_heads": 32, "index_head_dim": 128},
}
"""Case -> fields in place of those that are small for tests."""
APART = ("glm4_moe_lite", "mistral4", "axk1", "deepseek_v32", "glm_moe_dsa")
"""Families of the README's table that are cases of no other table. Kimi-K2.5 is a DeepSeek-V3."""
CASES = (*FAMILIES, *HYBRIDS, *APART)
_SLOW = (CodePath.TRANSFORMERS, CodePath.TORCH)


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """One family's steps."""

    family: str
    shares: tuple[float, ...]
    """Of the floor, 0..1: decode steps, and the prompt."""
    report: FitReport


def arguments_of(case: str) -> dict[str, Any]:
    """Arguments of `make_random_checkpoint` for a case of FAMILIES or HYBRIDS, or for a family."""
    small = (FAMILIES | HYBRIDS).get(case, {"family": case})
    return SIZES | small | WIDE.get(case, {}) | {"dtype": "bfloat16"}


def decode_floor_s(floor: Floor, batch: int, machine: Machine, state_bytes: int) -> float:
    """Least seconds of a decode step. `state_bytes`: of one sequence's states, which a step reads and writes."""
    moved_s = 2 * batch * state_bytes / machine.read_gb_per_s / 1e9
    return floor.decode_step_ms(batch, CONTEXT, machine) / 1e3 + moved_s


@contextmanager
def checkpoint_of(case: str, kept: Path | None) -> Iterator[Path]:
    """The directory of a case's checkpoint, which is made if it is not below `kept`."""
    if kept is None:
        with tempfile.TemporaryDirectory() as made:
            yield make_random_checkpoint(Path(made) / case, **arguments_of(case))
    elif (kept / case / "config.json").exists():
        yield kept / case
    else:
        making = make_random_checkpoint(kept / f"{case}.part", **arguments_of(case))
        yield making.rename(kept / case)


def measure(case: str, threads: int, kept: Path | None) -> Measured:
    with checkpoint_of(case, kept) as path:
        floor, vocabulary = floor_of(path), open_checkpoint(path).info.vocab_size
        machine = measure_machine(read_bytes=floor.weight_bytes)
        worker: DataPlane = load_worker(path, threads)
        state_bytes = worker.loaded.memory.sizes().state_bytes
        shares = [
            decode_floor_s(floor, batch, machine, state_bytes) / decode_s(worker, batch, vocabulary)
            for batch in BATCHES
        ]
        shares.append(PROMPT / floor.prefill_tokens_per_s(machine) / prefill_s(worker, PROMPT, vocabulary))
    return Measured(family=case, shares=tuple(shares), report=worker.report)


def row(one: Measured) -> list[str]:
    slow: dict[str, None] = {}
    for part in one.report.rows:
        if part.path in _SLOW:
            slow[part.part.replace("_", " ")] = None
    return [one.family, *(f"{share:.0%}" for share in one.shares), ", ".join(slow)]


HEAD = (
    "family",
    *(f"decode of {batch}" for batch in BATCHES),
    f"prompt of {PROMPT}",
    "in transformers' or PyTorch's code",
)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", help="cases of the tests, or model types of transformers")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--checkpoints", type=Path, metavar="DIR", help="where checkpoints are kept")
    parser.add_argument("--make", action="store_true", help="make the checkpoints below DIR and measure nothing")
    parser.add_argument("--reasons", action="store_true", help="print why no faster path serves a part")
    args = parser.parse_args(arguments)
    cases = args.families or list(CASES)
    if args.make:
        if args.checkpoints is None:
            parser.error("--make needs --checkpoints DIR")
        for case in cases:
            with checkpoint_of(case, args.checkpoints) as path:
                print(path)
        return
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.threads])
    torch.set_num_threads(args.threads)
    machine = measure_machine()
    print(", ".join(f"{key} {value}" for key, value in where_and_when().items()))
    speeds = f"read {machine.read_gb_per_s:.0f} GB/s, multiply {machine.gemm_gflop_per_s:.0f} GFLOP/s"
    print(f"{args.threads} threads {speeds} of 512 MB; shares are of the rate for as many bytes as a model has\n")
    measured = [measure(case, args.threads, args.checkpoints) for case in cases]
    print(markdown(HEAD, [row(one) for one in measured]))
    if args.reasons:
        for one in measured:
            print("\n  ".join((one.family, *one.report.reasons())))


if __name__ == "__main__":
    main()
