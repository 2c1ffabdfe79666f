"""Every family's steps with all tensors on a GPU, on a machine that has none (tests/model/pretended_tensors.py)."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.attention import varlen

import elastic_moe.model.states.batch
from elastic_moe.cluster.errors import ConfigError
from elastic_moe.cluster.expert_forms import ExpertForm
from elastic_moe.cluster.fit import CodePath, Part
from elastic_moe.cluster.messages.steps import StepPlan, StepResult
from elastic_moe.cluster.placement import Tier
from elastic_moe.model.worker.data_plane import DataPlane
from tests.model import pretended_cuda
from tests.model.families import FAMILIES, HYBRIDS, MORE_FAMILIES, WINDOWED, tiny_checkpoint
from tests.model.kernels import KERNELS
from tests.model.lockstep import Lockstep, request
from tests.model.packing import CASES, pack_checkpoint
from tests.model.pretended_cuda import recorders
from tests.model.pretended_tensors import OnDevice, counted_waits, entered, on_values
from tests.model.random_checkpoint import make_random_checkpoint
from tests.model.test_parity import greedy

ALL = [*FAMILIES, *HYBRIDS, *WINDOWED, *MORE_FAMILIES]
MASK = "transformers asks whether a mask hides anything, before the first layer"
WAITS = {
    "phimoe-longrope": "which frequencies to take is a question to the positions",
    **dict.fromkeys([*HYBRIDS, "granitemoehybrid"], MASK),
}
"""Families whose steps wait for the device before they wait for their tokens."""
MAYBE_RECORDED = [name for name in ALL if name not in {*HYBRIDS, "phimoe-longrope", "minimax_m3_vl_text"}]
PROMPTS = [list(range(5, 35)), [7], list(range(40, 46))]


@pytest.fixture(autouse=True)
def device(monkeypatch: pytest.MonkeyPatch) -> None:
    pretended_cuda.pretend(monkeypatch)
    monkeypatch.setattr(varlen, "varlen_attn", on_values(KERNELS["any pages"]))


class Watched(DataPlane):
    waits: Counter[str]
    """Of the last step that had tokens."""

    def step(self, plan: StepPlan) -> StepResult:
        with counted_waits() as found:
            result = super().step(plan)
        # a graph's inputs are written when the copy of the last step's is done, which it is by then
        del found["event.synchronize"]
        if any(plan.tokens_per_rank):
            self.waits = found
        return result


def served(path: Path, slots: tuple[int, ...] = (8,), **settings: Any) -> Lockstep:
    given = {"dtype": "bfloat16", "block_size": 16, "max_num_batched_tokens": 40} | settings
    return Lockstep(path, slots, device="cuda", transport="tcp", plane=Watched, **given)


@pytest.mark.parametrize("family", ALL)
def test_steps_of_a_family(family: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    """A prompt and single tokens. They wait for the device once, and their layers can be recorded."""
    cluster = served(tiny_checkpoint(family, tmp_path_factory))
    cluster.run([request(f"r{n}", prompt, max_tokens=2) for n, prompt in enumerate(PROMPTS[:2])])
    [worker] = cluster.workers.values()
    assert not {CodePath.NATIVE, CodePath.PACKED, CodePath.JOINED, CodePath.ONEDNN} & {
        row.path for row in worker.report.rows
    }
    assert worker.waits["tolist"] == 1
    assert (sum(worker.waits.values()) > 1) == (family in WAITS), worker.waits
    if family in MAYBE_RECORDED:
        assert recorders[worker._runner].recorded
        assert worker._runner._graphs


def tokens_across_replacements(cluster: Lockstep) -> list[int]:
    """Nine tokens after the first prompt, by two workers of four slots, between which experts move twice."""
    cluster.scheduler.add(request("one", PROMPTS[0], max_tokens=9))
    tokens: list[int] = []
    for step in range(12):
        if step in (3, 6):
            with entered():
                assert cluster.replace(cluster.shuffled(step), [4, 4]) > 0
        for output in cluster.step():
            tokens += output.token_ids
    return tokens


@pytest.mark.parametrize("family", ["gpt_oss", "qwen3_next"])
def test_tokens_of_two_workers_across_replacements(family: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Float32, against transformers. States, windows and sinks; copies of experts between devices."""
    path = tiny_checkpoint(family, tmp_path_factory)
    cluster = served(path, (4, 4), dtype="float32", block_size=4)
    tokens = tokens_across_replacements(cluster)
    assert tokens == greedy(path, PROMPTS[0], 9, claimed=tokens)


@pytest.mark.parametrize("family", ["qwen3_next", "lfm2_moe"])
def test_snapshots_of_states_need_no_answer_of_the_device(
    family: str, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sequence goes over a border at which its states are kept, and another begins there."""
    cluster = served(tiny_checkpoint(family, tmp_path_factory), block_size=4)
    [worker] = cluster.workers.values()
    saved: list[int] = []
    build = elastic_moe.model.states.batch.StateBatch.build
    monkeypatch.setattr(
        elastic_moe.model.states.batch.StateBatch,
        "build",
        lambda chunks, store, device: (
            saved.append(len([move for n, move in chunks if n == 1 and move.snapshots])) or build(chunks, store, device)
        ),
    )
    tokens: list[int] = []
    cluster.scheduler.add(request("one", PROMPTS[0], max_tokens=9))
    while len(tokens) < 9:
        for output in cluster.step():
            tokens += output.token_ids
        assert sum(worker.waits.values()) <= 2, worker.waits
    assert cluster.run([request("two", [*PROMPTS[0], *tokens[:4]], max_tokens=5)])["two"] == tokens[4:]
    assert any(saved)


@pytest.mark.parametrize(
    ("family", "name"),
    [("deepseek_v3", "fp8-blocks"), ("gpt_oss", "awq"), ("qwen3_moe", "nvfp4"), ("mixtral", "mxfp4")],
)
def test_a_packed_checkpoint_is_unpacked(family: str, name: str, tmp_path: Path) -> None:
    sizes = {"hidden": 64, "layers": 2, "experts": 8, "top_k": 2, "ff": 32, "vocab": 300}
    packed, meant = pack_checkpoint(make_random_checkpoint(tmp_path / "m", family, **sizes), tmp_path, CASES[name])
    cluster = served(packed, dtype="float32")
    tokens = cluster.run([request("one", PROMPTS[2], max_tokens=4)])["one"]
    assert tokens == greedy(meant, PROMPTS[2], 4, claimed=tokens)
    [worker] = cluster.workers.values()
    with entered():
        copy = worker.export_experts([(0, 0)])[0]
    assert set(copy.dtypes.values()) == {"float32"}


def test_all_settings_of_sampling_give_the_tokens_of_a_cpu(tmp_path_factory: pytest.TempPathFactory) -> None:
    """The device has ways of its own to draw. All rows wait for it once, together."""
    settings: list[dict[str, Any]] = [
        {"temperature": 0.9, "top_k": 5, "seed": 1, "logprobs": 3},
        {"temperature": 1.2, "top_p": 0.8, "seed": 2, "min_p": 0.02},
        {"logit_bias": ((7, 3.0), (9, -5.0)), "presence_penalty": 0.7, "repetition_penalty": 1.3},
        {"allowed_token_ids": (3, 4, 5, 6)},
        {"bad_words": ((3,), (1, 2))},
        {"prompt_logprobs": 2, "logprobs": 0},
        {"temperature": 0.7, "seed": 4, "frequency_penalty": 0.4, "top_k": 50, "top_p": 0.9},
        {"logprob_token_ids": (4, 5), "logprobs": 2},
    ]
    path = tiny_checkpoint("qwen3_moe", tmp_path_factory)
    requests = [request(f"r{n}", PROMPTS[0][n:20], max_tokens=4, **given) for n, given in enumerate(settings)]
    cluster = served(path, dtype="float32", enforce_eager=True)
    [worker] = cluster.workers.values()
    assert cluster.run(requests) == Lockstep(path, [8]).run(requests)
    assert worker.waits == {"tolist": 1}


@pytest.mark.parametrize(("pinned", "hosted"), [(2, 2), (0, 8)])
def test_experts_that_come_from_pinned_memory_and_from_the_disk(
    pinned: int, hosted: int, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tiny_checkpoint("gpt_oss", tmp_path_factory)
    cluster = served(path, pinned=pinned, hosted=hosted, cache_dir=tmp_path, dtype="float32")
    [worker] = cluster.workers.values()
    tokens = cluster.run([request("one", PROMPTS[0], max_tokens=6)])["one"]
    assert tokens == greedy(path, PROMPTS[0], 6, claimed=tokens)
    assert worker.tier_counts().accesses[Tier.HOST] > 0


@pytest.mark.parametrize(
    ("family", "name", "form"),
    [
        ("deepseek_v3", "fp8-ue8m0", ExpertForm.FP8),
        ("glm4_moe", "mxfp4", ExpertForm.MXFP4),
        ("minimax_m2", "mxfp8", ExpertForm.MXFP8),
        ("qwen3_moe", "nvfp4", ExpertForm.NVFP4),
        ("olmoe", "nvfp4-compressed", ExpertForm.NVFP4),
        ("qwen3_moe", "int4-symmetric", ExpertForm.INT4),
        ("olmoe", "int4-asymmetric", ExpertForm.INT4_HALF),
        ("qwen3_moe", "int8-channel", ExpertForm.INT8),
    ],
)
def test_packed_experts_stay_packed_and_compute_as_unpacked_ones(
    family: str, name: str, form: ExpertForm, tmp_path: Path
) -> None:
    """Across re-placements, in steps of one token and of many, which wait for the device as other steps do."""
    sizes = {"hidden": 128, "layers": 2, "experts": 8, "top_k": 2, "ff": 128, "vocab": 300}
    packed, _ = pack_checkpoint(make_random_checkpoint(tmp_path / "m", family, **sizes), tmp_path, CASES[name])
    found = []
    for expert_dtype in ("auto", "bfloat16"):
        cluster = served(packed, (4, 4), expert_dtype=expert_dtype)
        tokens = tokens_across_replacements(cluster)
        workers = cluster.workers.values()
        with entered():
            layer, expert = 0, min(next(iter(workers)).loaded.store.held(0))
            copy = next(iter(workers)).export_experts([(layer, expert)])[0]
        found.append(
            (
                tokens,
                [worker.waits for worker in workers],
                sum(worker.loaded.store.nbytes for worker in workers),
                set(copy.dtypes.values()),
            )
        )
        labels = [row.modules for worker in workers for row in worker.report.rows if row.part is Part.EXPERTS]
        assert labels == [f"MoE layers in {form}" if expert_dtype == "auto" else "MoE layers"] * len(labels) != []
    (kept, kept_waits, kept_bytes, kept_dtypes), (plain, waits, plain_bytes, dtypes) = found
    assert kept == plain
    assert len(kept) == 9
    assert kept_waits == waits
    # the scales of outputs count in matrices as small as these
    most = {ExpertForm.FP8: 0.52, ExpertForm.MXFP8: 0.52, ExpertForm.INT8: 0.52, ExpertForm.NVFP4: 0.3}.get(form, 0.29)
    assert kept_bytes / plain_bytes < most
    assert kept_dtypes & {"int8", "uint8"}
    assert dtypes == {"bfloat16"}


@pytest.mark.parametrize("expert_dtype", ["int8", "int4"])
def test_experts_are_rounded_by_the_host(expert_dtype: str, tmp_path: Path) -> None:
    sizes = {"hidden": 128, "layers": 2, "experts": 8, "top_k": 2, "ff": 128, "vocab": 300}
    path = make_random_checkpoint(tmp_path / "m", "gpt_oss", **sizes)
    cluster = served(path, expert_dtype=expert_dtype)
    [worker] = cluster.workers.values()
    with entered():
        copy = worker.export_experts([(0, 0)])[0]
        size = worker.loaded.memory.expert_bytes
    # biases stay as they are
    assert sum(tensor.nbytes for tensor in copy.tensors.values()) == pytest.approx(size, rel=0.02)
    assert len(cluster.run([request("one", PROMPTS[0], max_tokens=6)])["one"]) == 6
    assert worker.waits["tolist"] == 1


@pytest.mark.parametrize("expert_dtype", ["int8", "int4"])
@pytest.mark.parametrize(("pinned", "hosted"), [(2, 2), (0, 8)])
def test_packed_experts_that_come_from_pinned_memory_and_from_the_disk(
    pinned: int, hosted: int, expert_dtype: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tiny_checkpoint("gpt_oss", tmp_path_factory)
    found = []
    for tiers in ({}, {"pinned": pinned, "hosted": hosted, "cache_dir": tmp_path}):
        cluster = served(path, expert_dtype=expert_dtype, **tiers)
        found.append(cluster.run([request("one", PROMPTS[0], max_tokens=6)])["one"])
    [worker] = cluster.workers.values()
    assert found[0] == found[1]
    assert worker.tier_counts().accesses[Tier.HOST] > 0


def test_what_cpus_alone_compute_is_refused(tmp_path_factory: pytest.TempPathFactory) -> None:
    with pytest.raises(ConfigError, match="trunk_dtype: int8 is for CPUs, and the device is cuda"):
        served(tiny_checkpoint("olmoe", tmp_path_factory), trunk_dtype="int8")


# --- The device itself ------------------------------------------------------------------------------------------------


@pytest.fixture
def here() -> Iterator[None]:
    with entered():
        yield


@pytest.mark.usefixtures("here")
def test_the_device_refuses_what_a_gpu_refuses() -> None:
    x = OnDevice(torch.ones(3))
    for wrong in (
        lambda: x + torch.ones(3),
        lambda: nn.functional.linear(x, torch.ones(3, 3)),
        lambda: torch.ones(3).index_select(0, OnDevice(torch.zeros(1, dtype=torch.int64))),
        lambda: OnDevice(torch.ones(3).to(torch.float8_e4m3fn)) + OnDevice(torch.ones(3)),
    ):
        with pytest.raises(RuntimeError, match=r"same device|float8"):
            wrong()
    for name in ("numpy", "data_ptr"):
        with pytest.raises(TypeError, match=f"{name} of a tensor on cuda:0"):
            getattr(x, name)()
    assert x.device == torch.device("cuda:0")
    assert (x + torch.tensor(2.0)).tolist() == [3.0] * 3


@pytest.mark.usefixtures("here")
def test_the_device_counts_waits() -> None:
    x, number = OnDevice(torch.arange(4)), OnDevice(torch.tensor(2))
    with counted_waits() as waits:
        x[1:], x * 2, x.clone()[number[None]], torch.where(x > 1, x, 0)
    assert not waits
    for wait in (
        lambda: x[number],
        lambda: x[x > 1],
        lambda: bool(x[0]),
        lambda: x.sum().item(),
        lambda: x.nonzero(),
        lambda: x.cpu(),
        lambda: x[torch.tensor([1])],
        lambda: x.copy_(torch.ones(4)),
    ):
        with counted_waits() as waits:
            wait()
        assert sum(waits.values()) == 1, waits


@pytest.mark.parametrize("fault", ["a table is left on the CPU", "a layer asks its input"])
def test_a_fault_in_a_step_is_found(
    fault: str, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster = served(tiny_checkpoint("qwen3_moe", tmp_path_factory))
    [worker] = cluster.workers.values()
    if fault == "a layer asks its input":
        norm = next(m for m in worker._runner._trunk.modules() if re.search("RMSNorm", type(m).__name__))
        forward = norm.forward
        monkeypatch.setattr(norm, "forward", lambda x: forward(x) if x.isfinite().all() else x, raising=False)
        cluster.run([request("one", PROMPTS[1], max_tokens=2)])
        assert sum(worker.waits.values()) > 1
        assert not worker._runner._graphs
        return
    monkeypatch.setattr(
        "elastic_moe.model.trunk.flash.to_device", lambda arrays, device: [torch.from_numpy(a) for a in arrays]
    )
    with pytest.raises(RuntimeError, match="same device"):
        cluster.run([request("one", PROMPTS[1], max_tokens=2)])
