"""Measures the most that this machine can do, and computes the least time that a model's steps can take on it."""

from __future__ import annotations

import itertools
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import nn

from elastic_moe.cluster.expert_forms import weight_bytes
from elastic_moe.model.checkpoints.checkpoint import open_checkpoint
from elastic_moe.model.native import library
from elastic_moe.model.native.linear import Packed, linear
from elastic_moe.model.native.memory import allocate
from elastic_moe.model.trunk.linear import NARROW_OUTPUTS

MOST_S = 2.0
"""For the tries of one operation: PyTorch multiplies bfloat16 very slowly where the CPU has no instruction for it."""
BF16 = 2
"""Bytes of a number."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    read_gb_per_s: float
    gemm_gflop_per_s: float


def measure_machine(*, read_bytes: int = 1 << 29, tries: int = 8) -> Machine:
    """Best of a few tries, on all cores: a read of so many bytes, and a product.

    A last-level cache of some hundred MB holds a small model, so its floor is a read of as many bytes as it has. Reads
    are torch's sum, or a native product with one row if that is faster: it fetches ahead, and reads huge pages.
    Products are of bfloat16 or float32 numbers, whichever is faster: CPUs without instructions for bfloat16 multiply in
    float32.
    """
    read_s = min(_best(read, 2 * tries) for read in _reads(read_bytes))
    gflop_per_s = 0.0
    for rows, dtype in itertools.product((512, 1024, 2048), (torch.bfloat16, torch.float32)):
        a, b = torch.randn(rows, 1024, dtype=dtype), torch.randn(1024, 1024, dtype=dtype)
        seconds = _best(lambda a=a, b=b: a @ b, 4 * tries)  # type: ignore[misc]
        gflop_per_s = max(gflop_per_s, 2e-9 * rows * 1024 * 1024 / seconds)
    return Machine(read_gb_per_s=read_bytes / read_s / 1e9, gemm_gflop_per_s=gflop_per_s)


def _reads(size_bytes: int) -> Iterator[Callable[[], Any]]:
    """Ways to read about so many bytes once. The memory of one is released before the next begins."""
    source = torch.zeros(size_bytes // 4)
    yield source.sum
    del source
    if (lib := library()) is not None:
        depth = 1024
        columns = size_bytes // BF16 // depth // 64 * 64  # whole panels
        data, release = allocate(columns * depth * BF16)
        packed = Packed(lib, data.zero_(), columns, depth)
        row = torch.zeros(1, depth, dtype=torch.bfloat16)
        yield lambda: linear(row, packed, None)
        release()


def _best(run: Callable[[], Any], tries: int) -> float:
    run()
    best, end = float("inf"), time.perf_counter() + MOST_S
    for _ in range(tries):
        begin = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - begin)
        if time.perf_counter() > end:
            break
    return best


@dataclass(frozen=True, slots=True, kw_only=True)
class Floor:
    """A model whose weights are read once a step, at most, in the bytes that they are kept in, and whose routing is
    uniform.

    Parameters are counted by what is run: `trunk` for every token, of `layers` x `experts` experts `top_k` per layer
    and token. Embeddings are looked up, not multiplied, and not counted.
    """

    layers: int
    experts: int
    top_k: int
    expert_parameters: int
    trunk_parameters: int
    kv_numbers_per_token: int
    expert_weight_bytes: float = BF16
    """Of a weight of an expert, with its share of scales and zero points."""
    trunk_weight_bytes: float = BF16
    """Of a weight of the trunk: the mean."""

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights that are multiplied."""
        return round(self._bytes(self.experts))

    def _bytes(self, hit: float) -> float:
        """Bytes of the trunk and of `hit` experts in each layer."""
        experts = self.layers * hit * self.expert_parameters * self.expert_weight_bytes
        return self.trunk_parameters * self.trunk_weight_bytes + experts

    @property
    def flop_per_token(self) -> float:
        """Of the products with weights; attention over a short context comes on top."""
        return 2.0 * (self.trunk_parameters + self.layers * self.top_k * self.expert_parameters)

    def step_bytes(self, batch: int, context: int) -> float:
        """Bytes that a decode step of `batch` sequences of `context` tokens reads at least."""
        hit = self.experts * (1 - (1 - self.top_k / self.experts) ** batch)
        return self._bytes(hit) + BF16 * batch * context * self.kv_numbers_per_token

    def decode_step_ms(self, batch: int, context: int, machine: Machine) -> float:
        """The larger of the time to read and the time to multiply."""
        read_s = self.step_bytes(batch, context) / machine.read_gb_per_s / 1e9
        return 1e3 * max(read_s, batch * self.flop_per_token / machine.gemm_gflop_per_s / 1e9)

    def prefill_tokens_per_s(self, machine: Machine) -> float:
        return machine.gemm_gflop_per_s * 1e9 / self.flop_per_token


def floor_of(model: Path, expert_dtype: str = "bfloat16", trunk_dtype: str = "bfloat16") -> Floor:
    """Of any checkpoint that can be served, from the model that transformers builds of its configuration.

    Matrices alone are counted: vectors, such as those of norms and biases, are next to nothing.
    """
    checkpoint = open_checkpoint(model)
    shape, skeleton, info = checkpoint.shape, checkpoint.skeleton, checkpoint.info
    experts = {id(p) for name in shape.expert_modules for p in skeleton.get_submodule(name).parameters()}
    looked_up = skeleton.get_input_embeddings().weight
    output: Any = skeleton.get_output_embeddings()
    skipped = experts if output.weight is looked_up else experts | {id(looked_up)}
    matrices = [p for p in skeleton.parameters() if p.dim() > 1]
    layers = len(shape.expert_modules)
    of_experts = sum(p.numel() for p in matrices if id(p) in experts and p.dim() > 2)
    of_trunk = {id(p): p.numel() for p in matrices if id(p) not in skipped}
    narrow = info.trunk_form(trunk_dtype, "bfloat16", "cpu")
    linears = (m.weight for m in skeleton.modules() if isinstance(m, nn.Linear) and m.out_features >= NARROW_OUTPUTS)
    rounded = sum(of_trunk[key] for key in {id(weight) for weight in linears} if key in of_trunk)
    trunk = sum(of_trunk.values())
    return Floor(
        layers=layers,
        experts=shape.num_experts,
        top_k=shape.top_k,
        expert_parameters=of_experts // (layers * shape.num_experts),
        trunk_parameters=trunk,
        kv_numbers_per_token=shape.kv_numbers,
        expert_weight_bytes=weight_bytes(info.form(expert_dtype, "bfloat16", "cpu"), BF16),
        trunk_weight_bytes=BF16 - (BF16 - weight_bytes(narrow, BF16)) * rounded / trunk,
    )


def where_and_when() -> dict[str, str]:
    """The machine, the versions and the date that every table of figures must name."""

    def git(*arguments: str) -> str:
        if shutil.which("git") is None:
            return "unknown"
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, check=False)
        return done.stdout.strip()

    cpu = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.machine(),
    )
    changed = " with changes" if git("status", "--porcelain", "--untracked-files=no") else ""
    return {
        "date": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        "commit": git("rev-parse", "--short", "HEAD") + changed,
        "machine": f"{os.cpu_count()} cores of {cpu}, {_memory_gb():.0f} GB",
        "torch": torch.__version__,
    }


def _memory_gb() -> float:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
