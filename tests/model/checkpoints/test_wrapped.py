"""The text model inside a checkpoint of a model that takes images: its tensors are found, and no others are read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from elastic_moe.cluster.errors import CheckpointError
from elastic_moe.model.checkpoints.checkpoint import open_checkpoint
from elastic_moe.model.checkpoints.loading import load_trunk
from elastic_moe.model.checkpoints.quiet import quiet_transformers
from elastic_moe.model.checkpoints.stored import StoredTensor, stored_tensors
from elastic_moe.model.checkpoints.wrapped import text_part, text_tensors
from elastic_moe.model.transformers_private import multimodal_class
from tests.model.families import WRAPPED, tiny_checkpoint


@pytest.fixture
def copy(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    return lambda name: Path(shutil.copytree(tiny_checkpoint(name, tmp_path_factory), tmp_path / name))


@pytest.mark.parametrize("name", WRAPPED)
def test_the_text_part_alone_is_read(
    name: str, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tiny_checkpoint(name, tmp_path_factory)
    text = open_checkpoint(tiny_checkpoint(WRAPPED[name][0], tmp_path_factory))
    found = open_checkpoint(path)
    assert found.info == text.info
    assert found.tensors.keys() == text.tensors.keys()
    others = {tensor.start for tensor in stored_tensors(path).values()} - {t.start for t in found.tensors.values()}
    assert bool(others) == (name != "gemma4")  # that one has no other part here
    read = StoredTensor.read

    def watched(tensor: StoredTensor, first: int | None = None) -> torch.Tensor:
        assert tensor.start not in others, "a tensor of another part was read"
        return read(tensor, first)

    monkeypatch.setattr(StoredTensor, "read", watched)
    # our own implementations are registered only where somebody has imported them
    eager = {"attn_implementation": "eager", "experts_implementation": "eager"}
    trunk = load_trunk(found, dtype=torch.float32, device=torch.device("cpu"), **eager)
    assert type(trunk).__name__ == found.info.architecture == text.info.architecture


def test_what_is_missing_in_the_text_part_is_named(copy: Callable[[str], Path]) -> None:
    path = copy("mistral3")
    config = json.loads((path / "config.json").read_text())
    config["text_config"]["num_hidden_layers"] += 1
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"no tensor for model\.layers\.3\."):
        open_checkpoint(path)


def test_quantized_weights_of_the_text_part_are_refused(copy: Callable[[str], Path]) -> None:
    path = copy("mistral3")
    config = json.loads((path / "config.json").read_text())
    config["text_config"]["quantization_config"] = {"quant_method": "quark"}
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="quantized by 'quark'"):
        open_checkpoint(path)


def test_a_hybrid_model_with_images() -> None:
    """Qwen3.5-MoE: the names of its tensors are those that its text model expects, whether or not it can be served."""
    fields = {"num_hidden_layers": 2, "hidden_size": 32, "num_experts": 4, "moe_intermediate_size": 16}
    config = AutoConfig.for_model("qwen3_5_moe", text_config=fields, vision_config={"depth": 1, "hidden_size": 32})
    kind = multimodal_class(config)
    assert kind is not None
    with torch.device("meta"), quiet_transformers():
        whole = kind._from_config(config)  # type: ignore[attr-defined]
        text = AutoModelForCausalLM.from_config(text_part(config))  # type: ignore[no-untyped-call]
    somewhere = StoredTensor(file=Path("x"), dtype=torch.float32, shape=(), start=0, end=0)
    assert text_tensors(whole, text, dict.fromkeys(whole.state_dict(), somewhere)).keys() == text.state_dict().keys()
