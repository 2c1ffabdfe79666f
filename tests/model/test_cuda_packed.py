"""On a CUDA GPU in bfloat16, experts that stay packed compute what their unpacked weights do."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from elastic_moe.cluster.expert_forms import ExpertForm
from elastic_moe.cluster.fit import Part
from tests.model.lockstep import Lockstep, request
from tests.model.packing import CASES, pack_checkpoint
from tests.model.random_checkpoint import make_random_checkpoint
from tests.model.test_cuda import hopper, replaced, step_logits

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU, or a torch without CUDA")

PACKED = [
    ("deepseek_v3", "fp8-ue8m0", ExpertForm.FP8),
    ("qwen3_moe", "int8-channel", ExpertForm.INT8),
    ("qwen3_moe", "int4-symmetric", ExpertForm.INT4),
    ("olmoe", "awq", ExpertForm.INT4_HALF),
    ("glm4_moe", "mxfp4", ExpertForm.MXFP4),
    ("qwen3_moe", "mxfp8", ExpertForm.MXFP8),
    ("qwen3_moe", "nvfp4", ExpertForm.NVFP4),
]


@pytest.fixture(params=PACKED, ids=lambda param: param[1])
def packed(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, str]:
    """A checkpoint whose experts stay packed, and how the report calls them."""
    family, name, form = request.param
    sizes = {"hidden": 128, "layers": 2, "experts": 8, "top_k": 2, "ff": 128, "vocab": 300}
    source = make_random_checkpoint(tmp_path / "source", family, **sizes)
    return pack_checkpoint(source, tmp_path, CASES[name])[0], f"MoE layers in {form}"


def experts_of(cluster: Lockstep) -> set[str]:
    """How the report calls the experts of all workers."""
    rows = [row for worker in cluster.workers.values() for row in worker.report.rows]
    return {row.modules for row in rows if row.part is Part.EXPERTS}


@pytest.fixture
def unpacked_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels that read packed weights add in an order of their own, which is left out."""
    pytest.importorskip("triton")
    monkeypatch.setattr("elastic_moe.model.gpu.grouped.MOST_ROWS", 0)
    monkeypatch.setattr("elastic_moe.model.gpu.few.MOST_PAIRS", 0)


@pytest.mark.usefixtures("unpacked_first")
def test_packed_experts_give_the_tokens_of_unpacked_ones_across_replacements(packed: tuple[Path, str]) -> None:
    path, label = packed
    g = torch.Generator().manual_seed(0)
    texts = [torch.randint(3, 300, (n,), generator=g).tolist() for n in (50, 9)]
    found = []
    for expert_dtype in ("auto", "bfloat16"):
        options = {"dtype": "bfloat16", "block_size": 16, "max_num_batched_tokens": 96, "expert_dtype": expert_dtype}
        cluster = Lockstep(path, [4, 4], device="cuda", transport="tcp", **options)  # type: ignore[arg-type]
        assert experts_of(cluster) == {label if expert_dtype == "auto" else "MoE layers"}
        tokens: dict[str, list[int]] = {}
        for number, text in enumerate(texts):
            cluster.scheduler.add(request(f"r{number}", text, max_tokens=24))
        for step in range(40):
            if step in (3, 6):
                assert cluster.replace(cluster.shuffled(step), [4, 4]) > 0
            for output in cluster.step():
                tokens.setdefault(output.request_id, []).extend(output.token_ids)
        assert [len(tokens[f"r{number}"]) for number in range(2)] == [24, 24]
        found.append(tokens)
    assert found[0] == found[1]


@hopper
@pytest.mark.usefixtures("unpacked_first")
def test_packed_experts_give_the_logits_of_unpacked_ones_in_graphs(packed: tuple[Path, str]) -> None:
    """The same bits, in steps of many rows and of few, and after experts have changed their slots."""
    for got, want in zip(*logits_of(*packed), strict=True):
        assert torch.equal(got, want)


@hopper
def test_kernels_that_read_packed_experts_give_nearly_the_logits_of_unpacked_ones(packed: tuple[Path, str]) -> None:
    for got, want in zip(*logits_of(*packed), strict=True):
        torch.testing.assert_close(got.float(), want.float(), rtol=0.05, atol=0.15)


def logits_of(path: Path, label: str) -> tuple[list[Tensor], list[Tensor]]:
    """Of steps with packed experts, and with unpacked ones."""
    g = torch.Generator().manual_seed(0)
    texts = [torch.randint(3, 300, (5 + 9 * n,), generator=g).tolist() for n in range(7)]
    logits = []
    for expert_dtype in ("auto", "bfloat16"):
        options = {"dtype": "bfloat16", "block_size": 16, "max_num_batched_tokens": 512, "expert_dtype": expert_dtype}
        cluster = Lockstep(path, [8], device="cuda", **options)  # type: ignore[arg-type]
        assert experts_of(cluster) == {label if expert_dtype == "auto" else "MoE layers"}
        assert cluster.workers_runner()._graphs
        found = [step_logits(cluster.workers_runner(), texts[:n], cut) for n in (1, 7) for cut in (3, -1)]
        cluster._flip(replaced(cluster, cluster.shuffled(3)))
        found += [step_logits(cluster.workers_runner(), texts, cut) for cut in (3, -1)]
        logits.append(found)
    return logits[0], logits[1]
