"""A trunk's report says which path serves each part, and gives a reason if the path is not the fastest one."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest
import torch

from elastic_moe.cluster.fit import CodePath, FitReport, Part
from elastic_moe.model.checkpoints.checkpoint import open_checkpoint
from elastic_moe.model.checkpoints.loading import expert_modules, load_trunk
from elastic_moe.model.fitting import fit as fitting
from tests.model.families import FAMILIES, HYBRIDS, tiny_checkpoint
from tests.model.lockstep import Lockstep

BEST = {
    Part.LAYERS: CodePath.JOINED,
    Part.ATTENTION_HALF: CodePath.JOINED,
    Part.ATTENTION: CodePath.NATIVE,
    Part.STATES: CodePath.NATIVE,
    Part.ROUTER: CodePath.NATIVE,
    Part.EXPERTS: CodePath.NATIVE,
    Part.NORMS: CodePath.NATIVE,
    Part.ROTARY: CodePath.NATIVE,
    Part.LINEARS: CodePath.NATIVE,
    Part.EXCHANGE: CodePath.NATIVE,
}
"""In bfloat16 on CPU."""

WHY_APART = {
    "qwen3_moe-mixed": "1 of 4 layers are dense",
    "qwen2_moe": "a feed-forward half computes more than a router and experts, such as a shared expert",
    "minimax_m2": "a feed-forward half has no native router",
    "gpt_oss": "the trunk does more between its layers than hand on what the one before has made",
    "phimoe": "a feed-forward half has no native router",
    "gemma4_text": "a layer does more than to add its halves to its input",
    "granitemoe": "a layer does more than to add its halves to its input",
}
WHY_NO_HALF = {
    "deepseek_v2": "a trial call with the usual arguments failed with AttributeError",
    "flex_olmo": "its cosines and sines are not in bfloat16",
    "granitemoeshared": "beside attention and 2 norms it has 2 parts, where one feed-forward half is expected",
}


def report_of(path: Path, dtype: torch.dtype = torch.bfloat16, block_size: int = 16) -> FitReport:
    trunk = load_trunk(open_checkpoint(str(path)), dtype=dtype, device=torch.device("cpu"))
    return fitting.fit(trunk, expert_modules(trunk), block_size=block_size).report()


def reasons(report: FitReport, part: Part) -> list[str | None]:
    return [row.reason for row in report.of(part)]


@pytest.mark.parametrize("family", [*FAMILIES, *HYBRIDS])
def test_every_slower_path_has_a_reason(
    lib: ctypes.CDLL, family: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    report = report_of(tiny_checkpoint(family, tmp_path_factory))
    assert {row.part for row in report.rows} | {Part.ROTARY, Part.STATES} == set(Part)
    assert bool(report.of(Part.STATES)) == (family in HYBRIDS)
    for row in report.rows:
        assert (row.reason is None) == (row.path is BEST[row.part]), row
    if family in WHY_APART:
        assert reasons(report, Part.LAYERS) == [WHY_APART[family]]
    if family in WHY_NO_HALF:
        assert reasons(report, Part.ATTENTION_HALF) == [WHY_NO_HALF[family]]


@pytest.mark.parametrize(
    ("family", "native", "others"),
    [("qwen3_next", 4, 0), ("kimi_linear", 3, 1), ("nemotron_h", 2, 0), ("jamba", 0, 4), ("qwen2_moe", 3, 0)],
)
def test_layers_that_are_native_calls_one_by_one_say_so(
    lib: ctypes.CDLL, family: str, native: int, others: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    rows = report_of(tiny_checkpoint(family, tmp_path_factory)).of(Part.LAYERS)
    counts = {path: sum(row.count for row in rows if row.path is path) for path in CodePath}
    assert (counts[CodePath.NATIVE], counts[CodePath.TRANSFORMERS], sum(counts.values())) == (
        native,
        others,
        # each layer once, and by its own name, not that of what keeps its state
        native + others,
    )
    assert {row.modules.endswith(("DecoderLayer", "Block")) for row in rows} == {True}


def test_parts_without_native_code_say_so(tmp_path_factory: pytest.TempPathFactory) -> None:
    report = report_of(tiny_checkpoint("mixtral", tmp_path_factory), torch.float32)
    why = "the native library computes in bfloat16, not in float32"
    assert {row.reason for row in report.rows if row.part is not Part.EXCHANGE} == {why}
    assert reasons(report, Part.EXCHANGE) == ["the experts are not native"]
    assert {path for _, path in report.paths()} == {CodePath.TORCH, CodePath.TRANSFORMERS}


def test_blocks_that_the_library_cannot_read_keep_layers_apart(
    lib: ctypes.CDLL, tmp_path_factory: pytest.TempPathFactory
) -> None:
    report = report_of(tiny_checkpoint("mixtral", tmp_path_factory), block_size=8)
    why = "block_size 8 is not a multiple of 16"
    assert reasons(report, Part.ATTENTION) == [why]
    assert reasons(report, Part.LAYERS) == reasons(report, Part.ATTENTION_HALF) == [f"attention is not native: {why}"]
    assert reasons(report, Part.EXPERTS) == [None]


def test_a_worker_knows_its_report(lib: ctypes.CDLL, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tiny_checkpoint("qwen3_moe", tmp_path_factory)
    [worker] = Lockstep(path, [8], dtype="bfloat16", block_size=16).workers.values()
    assert worker.report == report_of(path)
    assert worker.report.shares(Part.LAYERS) == "joined"
