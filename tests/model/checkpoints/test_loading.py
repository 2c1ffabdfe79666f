"""Trunk and experts, loaded apart, are bit for bit what transformers loads in one go, and no more bytes are read."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Mxfp4Config, PreTrainedModel
from transformers.utils import logging

from elastic_moe.cluster.errors import CheckpointError
from elastic_moe.model.checkpoints.checkpoint import Checkpoint, open_checkpoint
from elastic_moe.model.checkpoints.loading import Progress, expert_modules, iter_experts, load_trunk
from elastic_moe.model.checkpoints.quiet import quiet_transformers
from elastic_moe.model.checkpoints.stored import StoredTensor
from tests.model.checkpoints.loading_peaks import status_bytes
from tests.model.families import FAMILIES, HYBRIDS, MORE_FAMILIES, tiny_checkpoint
from tests.model.processes import processes
from tests.model.random_checkpoint import make_random_checkpoint

CPU = torch.device("cpu")
EAGER = {"attn_implementation": "eager", "experts_implementation": "eager"}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Tiny tensors gain nothing from threads, and threads make them much slower on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def trunk_of(checkpoint: Checkpoint, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    return load_trunk(checkpoint, dtype=dtype, device=CPU, **EAGER)


def reference(path: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    with quiet_transformers():
        return AutoModelForCausalLM.from_pretrained(path, dtype=dtype, **EAGER).eval()


def load_experts(
    checkpoint: Checkpoint, layer: int, experts: Sequence[int], dtype: torch.dtype
) -> dict[int, dict[str, torch.Tensor]]:
    """Expert -> its tensors by parameter name."""
    pairs = [(layer, expert) for expert in experts]
    loaded = {expert: tensors for _, expert, tensors in iter_experts(checkpoint, pairs, dtype=dtype, device=CPU)}
    return {expert: loaded[expert] for expert in experts}


def plug_in(checkpoint: Checkpoint, model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Put all experts back into the trunk."""
    for layer, module in enumerate(expert_modules(model)):
        experts = load_experts(checkpoint, layer, range(8), dtype)
        for name in experts[0]:
            delattr(module, name)
            whole = torch.stack([experts[expert][name] for expert in range(8)])
            setattr(module, name, torch.nn.Parameter(whole, requires_grad=False))


def assert_same_tensors(ours: PreTrainedModel, theirs: PreTrainedModel) -> None:
    """Parameters, and buffers that are in no checkpoint, such as rotary frequencies."""
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    want = theirs.state_dict() | dict(theirs.named_buffers())
    found = ours.state_dict() | dict(ours.named_buffers())
    for name, tensor in want.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", [*FAMILIES, *MORE_FAMILIES, *HYBRIDS])
def test_parts_make_the_whole(name: str, dtype: torch.dtype, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tiny_checkpoint(name, tmp_path_factory)
    checkpoint = open_checkpoint(path)
    model, whole = trunk_of(checkpoint, dtype), reference(path, dtype)
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert all(parameter.device == CPU for parameter in model.parameters())
    plug_in(checkpoint, model, dtype)
    assert_same_tensors(model, whole)
    ids = torch.arange(20, 60)[None]
    with torch.no_grad():
        # the tensors have the same bits. Where they lie decides how some CPUs add up
        torch.testing.assert_close(model(ids).logits, whole(ids).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["gpt_oss", "deepseek_v3", "ernie4_5_moe"])
def test_float16_keeps_what_must_stay_float32(name: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tiny_checkpoint(name, tmp_path_factory)
    checkpoint = open_checkpoint(path)
    model = trunk_of(checkpoint, torch.float16)
    plug_in(checkpoint, model, torch.float16)
    assert_same_tensors(model, reference(path, torch.float16))
    assert {p.dtype for p in model.parameters()} | {b.dtype for b in model.buffers()} == {torch.float16, torch.float32}


def test_the_trunk_has_expert_modules_without_weights(tmp_path_factory: pytest.TempPathFactory) -> None:
    checkpoint = open_checkpoint(tiny_checkpoint("gpt_oss", tmp_path_factory))
    model = trunk_of(checkpoint)
    modules = expert_modules(model)
    assert [dict(model.named_modules())[name] for name in checkpoint.shape.expert_modules] == modules
    for module in modules:
        assert (module.is_transposed, module.has_bias, module.has_gate, module.is_concatenated) == (
            *(True, True, True),
            False,
        )
        assert module._apply_gate(torch.ones(1, 8)).shape == (1, 4)
        assert all(buffer.numel() == 0 for buffer in module.buffers())
        assert not list(module.parameters())
    assert model.config._attn_implementation == model.config._experts_implementation == "eager"
    assert sum(p.nbytes for p in model.parameters()) == checkpoint.info.trunk_bytes


def test_tied_embeddings_are_one_tensor(tmp_path_factory: pytest.TempPathFactory) -> None:
    model = trunk_of(open_checkpoint(tiny_checkpoint("ernie4_5_moe", tmp_path_factory)))
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_loading_does_not_change_the_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> None:
    checkpoint = open_checkpoint(tiny_checkpoint("qwen2_moe-sliding", tmp_path_factory))
    before = checkpoint.config.to_dict(), checkpoint.skeleton.state_dict().keys()
    first = trunk_of(checkpoint, torch.bfloat16)
    second = trunk_of(checkpoint)
    assert (checkpoint.config.to_dict(), checkpoint.skeleton.state_dict().keys()) == before
    assert next(first.parameters()).dtype == torch.bfloat16
    assert next(second.parameters()).dtype == torch.float32


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    """gpt-oss as it is published: experts in MXFP4."""
    path = make_random_checkpoint(tmp_path / "packed", "gpt_oss", layers=2, ff=32, dtype="bfloat16")
    file, random = path / "model.safetensors", torch.Generator().manual_seed(0)
    tensors = load_file(file)
    for name in [name for name in tensors if name.endswith("_proj") and ".experts." in name]:
        experts, width, rows = tensors.pop(name).shape
        shape = (experts, rows, width // 32)
        tensors[f"{name}_blocks"] = torch.randint(256, (*shape, 16), generator=random, dtype=torch.uint8)
        tensors[f"{name}_scales"] = torch.randint(118, 126, shape, generator=random, dtype=torch.uint8)
    save_file(tensors, file, {"format": "pt"})
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    (path / "config.json").write_text(json.dumps(config))
    return path


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_packed_experts(packed: Path, dtype: torch.dtype) -> None:
    checkpoint = open_checkpoint(packed)
    assert checkpoint.info.dtype == "bfloat16"
    model = trunk_of(checkpoint, dtype)
    plug_in(checkpoint, model, dtype)
    with quiet_transformers():
        whole = AutoModelForCausalLM.from_pretrained(
            packed, dtype=dtype, quantization_config=Mxfp4Config(dequantize=True), **EAGER
        ).eval()
    if dtype == torch.float32:
        whole.to(dtype)  # older transformers unpack to bfloat16 whatever is asked for; the values are the same
    assert_same_tensors(model, whole)


# --- Only some experts --------------------------------------------------------------------------------------------


class Reads:
    """Counts bytes that are read, and notes of which tensors."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.nbytes = 0
        self.starts: set[int] = set()
        original = StoredTensor.read

        def read(stored: StoredTensor, first: int | None = None) -> torch.Tensor:
            tensor = original(stored, first)
            self.nbytes += tensor.nbytes
            self.starts.add(stored.start)
            return tensor

        monkeypatch.setattr(StoredTensor, "read", read)


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "gpt_oss", "granitemoe", "deepseek_v3"])
def test_chosen_experts(name: str, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tiny_checkpoint(name, tmp_path_factory)
    checkpoint, whole = open_checkpoint(path), reference(path)
    reads = Reads(monkeypatch)
    for layer, chosen in ((0, [7]), (1, [5, 0, 3]), (0, []), (1, range(8))):
        reads.nbytes = 0
        experts = load_experts(checkpoint, layer, chosen, torch.float32)
        assert list(experts) == list(chosen)
        assert reads.nbytes == len(chosen) * checkpoint.info.expert_bytes
        parameters = dict(expert_modules(whole)[layer].named_parameters())
        for expert, tensors in experts.items():
            assert tensors.keys() == parameters.keys()
            for key, tensor in tensors.items():
                assert torch.equal(tensor, parameters[key][expert])
                assert tensor.is_contiguous()
                assert tensor.untyped_storage().nbytes() == tensor.nbytes


def test_the_trunk_reads_no_expert(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = open_checkpoint(tiny_checkpoint("granitemoe", tmp_path_factory))
    reads = Reads(monkeypatch)
    told: list[tuple[int, int]] = []
    load_trunk(checkpoint, dtype=torch.float32, device=CPU, progress=lambda *done: told.append(done), **EAGER)
    assert reads.nbytes == checkpoint.info.trunk_bytes
    assert told[-1] == (reads.nbytes, reads.nbytes)
    experts = {
        checkpoint.tensors[n].start for parts in checkpoint.conversion.experts for p in parts for n in p.group.names
    }
    assert not experts & reads.starts


@pytest.mark.parametrize(("layer", "expert"), [(3, 0), (-1, 0), (0, 8), (0, -1)])
def test_no_such_expert(layer: int, expert: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    checkpoint = open_checkpoint(tiny_checkpoint("mixtral", tmp_path_factory))
    with pytest.raises(IndexError, match="no expert"):
        load_experts(checkpoint, layer, [expert], torch.float32)


def test_many_experts_with_progress(tmp_path: Path) -> None:
    """From shards, in another dtype, unevenly split over three workers."""
    path = make_random_checkpoint(tmp_path / "sharded", layers=2, ff=32, max_shard_size="200KB")
    checkpoint, whole = open_checkpoint(path), reference(path, torch.bfloat16)
    parameters = [dict(module.named_parameters()) for module in expert_modules(whole)]
    split = [[(0, 0), (1, 7), (0, 5)], [(1, e) for e in range(7)], [(0, e) for e in (1, 2, 3, 4, 6, 7)]]
    for chosen in split:
        told: list[tuple[int, int]] = []
        note: Progress = lambda done, total, told=told: told.append((done, total))  # noqa: E731
        loaded = list(iter_experts(checkpoint, chosen, dtype=torch.bfloat16, device=CPU, progress=note))
        assert [(layer, expert) for layer, expert, _ in loaded] == sorted(chosen)
        for layer, expert, tensors in loaded:
            assert all(torch.equal(tensors[key], whole[expert]) for key, whole in parameters[layer].items())
        size = checkpoint.info.expert_bytes
        assert told == [(size * (i + 1), size * len(chosen)) for i in range(len(chosen))]


def test_a_file_that_shrinks_after_it_was_opened(tmp_path: Path) -> None:
    path = make_random_checkpoint(tmp_path, layers=1, ff=32)
    checkpoint = open_checkpoint(path)
    file = path / "model.safetensors"
    with file.open("r+b") as stream:
        stream.truncate(5000)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: ends at byte"):
        trunk_of(checkpoint)
    file.unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors: cannot be read"):
        load_experts(checkpoint, 0, [0], torch.float32)


# --- Quiet and frugal ---------------------------------------------------------------------------------------------


def test_nothing_is_printed(tmp_path_factory: pytest.TempPathFactory, capfd: pytest.CaptureFixture[str]) -> None:
    path = tiny_checkpoint("deepseek_v3", tmp_path_factory)
    verbosity = logging.get_verbosity()
    trunk_of(open_checkpoint(path))
    assert capfd.readouterr() == ("", "")
    assert logging.get_verbosity() == verbosity
    assert logging.is_progress_bar_enabled()


def load_share(path: str, dtype: torch.dtype, share: int) -> int:
    """Load the trunk and every `share`-th expert. Returns their bytes."""
    options: Any = {"dtype": dtype, "device": torch.device("cpu")}
    checkpoint = open_checkpoint(path)
    trunk = load_trunk(checkpoint, **options, attn_implementation="eager", experts_implementation="eager")
    info = checkpoint.info
    mine = [(layer, e) for layer in range(info.num_layers) for e in range(0, info.num_logical_experts, share)]
    experts = list(iter_experts(checkpoint, mine, **options))
    return sum(p.nbytes for p in trunk.parameters()) + sum(t.nbytes for _, _, ts in experts for t in ts.values())


def measure_peak(answer: Connection, small: str, big: str, dtype: torch.dtype, share: int) -> None:
    """Send the bytes that are kept, and the most that were in memory beyond those from before."""
    torch.set_num_threads(1)
    load_share(small, dtype, share)  # what the first load of anything imports is not weights
    before = status_bytes("VmRSS")
    kept = load_share(big, dtype, share)
    answer.send((kept, status_bytes("VmHWM") - before))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize(
    ("family", "dtype", "share"),
    [("qwen3_moe", "bfloat16", 1), ("qwen3_moe", "float32", 2), ("gpt_oss", "bfloat16", 2)],
)
def test_peak_memory(family: str, dtype: str, share: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    """While a worker loads all its experts, or every second one, it holds little more than it keeps."""
    big = tmp_path_factory.getbasetemp() / f"big-{family}"
    if not big.exists():
        sizes = {"hidden": 512, "layers": 6, "experts": 16, "ff": 768, "vocab": 8192}
        make_random_checkpoint(big, family, **sizes, dtype="bfloat16")
    small = tiny_checkpoint(family, tmp_path_factory)
    context = processes()
    ours, theirs = context.Pipe(duplex=False)
    arguments = (theirs, str(small), str(big), getattr(torch, dtype), share)
    process = context.Process(target=measure_peak, args=arguments)
    process.start()
    theirs.close()
    kept, peak = ours.recv()
    process.join()
    assert kept > 100e6
    assert peak < 1.3 * kept
