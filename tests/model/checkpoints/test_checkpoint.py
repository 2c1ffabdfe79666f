"""Opening a checkpoint finds what is in it, and gives one clear line for everything that can be wrong."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from elastic_moe.cluster.errors import CheckpointError
from elastic_moe.model.checkpoints.checkpoint import open_checkpoint
from elastic_moe.model.checkpoints.loading import load_trunk
from elastic_moe.model.checkpoints.quiet import quiet_transformers
from elastic_moe.model.checkpoints.stored import StoredTensor
from tests.model.families import FAMILIES, HYBRIDS, tiny_checkpoint
from tests.model.random_checkpoint import make_random_checkpoint, small_tokenizer

SMALL = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 300,
}


@pytest.fixture
def copy(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A private copy of a tiny checkpoint, to be damaged."""
    return lambda name: Path(shutil.copytree(tiny_checkpoint(name, tmp_path_factory), tmp_path / name))


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return make_random_checkpoint(tmp_path / "sharded", layers=2, ff=32, max_shard_size="200KB")


def edit(path: Path, **fields: Any) -> None:
    """Set fields of a JSON file; None removes one."""
    content = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def rewrite(directory: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    file = directory / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {"format": "pt"})


def refusal(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    message = str(caught.value)
    assert "\n" not in message
    return message


# --- What is found out --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*FAMILIES, *HYBRIDS])
def test_info(name: str, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StoredTensor, "read", lambda *_: pytest.fail("a weight was read"))
    checkpoint = open_checkpoint(tiny_checkpoint(name, tmp_path_factory))
    info = checkpoint.info
    # the experts of Nemotron-H work in a narrower space
    assert (info.num_logical_experts, info.top_k, info.hidden_size) == (8, 2, 32 if name == "nemotron_h" else 64)
    assert info.num_layers == len(checkpoint.conversion.experts) == len(checkpoint.shape.expert_modules)
    assert info.vocab_size == 512
    assert info.eos_token_ids == (0, 2)
    assert info.dtype == "float32"
    assert checkpoint.stored_dtype == torch.float32
    stored = sum(tensor.nbytes for tensor in checkpoint.tensors.values())
    counted = info.trunk_bytes + info.expert_bytes * info.num_layers * info.num_logical_experts
    assert stored - 4096 < counted <= stored  # buffers are stored but are no parameters
    half = info.served_in("bfloat16")
    assert (half.expert_bytes * 2, half.trunk_bytes * 2) == (info.expert_bytes, info.trunk_bytes)


def test_stored_dtype_is_that_of_most_bytes(tmp_path: Path) -> None:
    info = open_checkpoint(make_random_checkpoint(tmp_path, layers=1, dtype="bfloat16")).info
    assert info.dtype == "bfloat16"


@pytest.mark.parametrize(
    ("rope", "expected"),
    [
        ({"rope_type": "default"}, 4096),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}, 16384),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}, 4096),
        ({"rope_type": "linear", "factor": 2.0}, 8192),
        (
            {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 512,
            },
            4096,
        ),
    ],
)
def test_longest_sequence_minds_rope_scaling(copy: Callable[[str], Path], rope: dict[str, Any], expected: int) -> None:
    path = copy("qwen3_moe")
    edit(path / "config.json", rope_parameters=rope | {"rope_theta": 10000.0})
    assert open_checkpoint(path).info.max_model_len == expected


def test_length_dependent_rope_can_be_opened(copy: Callable[[str], Path]) -> None:
    path = copy("phimoe")
    factors = {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8, "short_mscale": 1.0, "long_mscale": 1.2}
    edit(
        path / "config.json",
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 1e4,
            "factor": 2.0,
            **factors,
            "original_max_position_embeddings": 2048,
        },
    )
    info = open_checkpoint(path).info
    assert info.max_model_len == 4096
    assert info.rope_limits == (2048,)


@pytest.mark.parametrize(("generation", "config", "expected"), [(7, 1, (7, 1)), (None, 5, (5,)), ([3, 4], 4, (3, 4))])
def test_eos(copy: Callable[[str], Path], generation: Any, config: Any, expected: tuple[int, ...]) -> None:
    path = copy("mixtral")
    edit(path / "config.json", eos_token_id=config)
    if generation is None:
        (path / "generation_config.json").unlink()
    else:
        edit(path / "generation_config.json", eos_token_id=generation)
    assert open_checkpoint(path).info.eos_token_ids == expected


def test_sharded(sharded: Path) -> None:
    checkpoint = open_checkpoint(sharded)
    assert len({tensor.file for tensor in checkpoint.tensors.values()}) > 3


def test_code_of_the_checkpoint_is_not_needed_where_transformers_has_its_own(copy: Callable[[str], Path]) -> None:
    path = copy("deepseek_v3")
    edit(path / "config.json", auto_map={"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"})
    (path / "evil.py").write_text("raise SystemExit('the code was run')")
    assert open_checkpoint(path).info.architecture == "DeepseekV3ForCausalLM"


# --- Damaged or incomplete ----------------------------------------------------------------------------------------


def test_missing_directory(tmp_path: Path) -> None:
    assert "no such directory" in refusal(tmp_path / "nowhere")


def test_no_config(tmp_path: Path) -> None:
    assert "has no config.json" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{", "not valid JSON"),
        ("[]", "must hold a JSON object"),
        ("[" * 100_000, "not valid JSON"),
        (b"\xff\xfe", "not valid JSON"),
        ("{}", "model_type is missing"),
        ('{"model_type": "gpt9"}', "'gpt9' is unknown"),
        ('{"model_type": "gpt9", "auto_map": {"AutoConfig": "a.B"}}', "never run"),
        ('{"model_type": "qwen3_moe", "hidden_size": "wide"}', "hidden_size"),
        ('{"model_type": "qwen3_moe", "num_attention_heads": 0}', "config.json"),
    ],
)
def test_bad_config(tmp_path: Path, text: str | bytes, expected: str) -> None:
    (tmp_path / "config.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    message = refusal(tmp_path)
    assert expected in message
    assert "config.json" in message


@pytest.mark.parametrize("eos", ["end", {"a": 1}, [1, "x"]])
def test_bad_eos(copy: Callable[[str], Path], eos: Any) -> None:
    path = copy("mixtral")
    edit(path / "generation_config.json", eos_token_id=eos)
    assert "generation_config.json: eos_token_id" in refusal(path)


def test_no_weights(copy: Callable[[str], Path]) -> None:
    path = copy("mixtral")
    (path / "model.safetensors").unlink()
    assert "neither model.safetensors nor" in refusal(path)


def test_pickles_are_not_read(copy: Callable[[str], Path]) -> None:
    path = copy("mixtral")
    (path / "model.safetensors").rename(path / "pytorch_model.bin")
    assert "pytorch_model.bin: a pickle" in refusal(path)


@pytest.mark.parametrize("size", [0, 4, 8, 100, -1, -100_000])
def test_truncated(copy: Callable[[str], Path], size: int) -> None:
    path = copy("mixtral")
    file = path / "model.safetensors"
    with file.open("r+b") as stream:
        stream.truncate(size if size >= 0 else file.stat().st_size + size)
    assert "model.safetensors: truncated" in refusal(path)


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        (b"not json", "header is not valid JSON"),
        (b"[1]", "header is not a JSON object"),
        (b'{"a": 3}', "describes a wrongly"),
        (b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}', "a of shape [2] in F32"),
        (b'{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, -4]}}', "a of shape [-1]"),
        (b'{"a": {"dtype": "F32", "shape": ["x"], "data_offsets": [0, 4]}}', "a "),
        (b'{"a": {"dtype": "Q4", "shape": [2], "data_offsets": [0, 4]}}', "data type Q4"),
        (b'{"a": {"dtype": [], "shape": [1], "data_offsets": [0, 4]}}', "data type []"),
    ],
)
def test_broken_header(copy: Callable[[str], Path], header: bytes, expected: str) -> None:
    path = copy("mixtral")
    (path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(64))
    message = refusal(path)
    assert "model.safetensors" in message
    assert expected in message


def test_shard_listed_but_absent(sharded: Path) -> None:
    shard = sorted(sharded.glob("*.safetensors"))[1]
    shard.unlink()
    assert f"{shard.name}: missing, though model.safetensors.index.json lists it" in refusal(sharded)


def test_tensor_listed_but_absent(sharded: Path) -> None:
    index = sharded / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    shard = sharded / weight_map["model.norm.weight"]
    tensors = load_file(shard)
    del tensors["model.norm.weight"]
    save_file(tensors, shard, {"format": "pt"})
    assert "has no tensor for model.norm.weight" in refusal(sharded)


def test_an_unneeded_tensor_may_be_listed_and_absent(sharded: Path) -> None:
    """transformers takes from the index which files there are, and from the files what they hold."""
    index = sharded / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    edit(index, weight_map=weight_map | {"model.extra": weight_map["model.norm.weight"]})
    assert open_checkpoint(sharded).info.num_layers == 2


@pytest.mark.parametrize("listed", ["first", "last"])
def test_a_tensor_in_two_shards_is_the_one_that_transformers_takes(sharded: Path, listed: str) -> None:
    index = sharded / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    shards = sorted(set(weight_map.values()))
    name = "model.norm.weight"
    for number, shard in enumerate((shards[0], shards[-1])):
        tensors = load_file(sharded / shard) | {name: torch.full((64,), 1.0 + number)}
        save_file(tensors, sharded / shard, {"format": "pt"})
    edit(index, weight_map=weight_map | {name: shards[0] if listed == "first" else shards[-1]})
    with quiet_transformers():
        theirs = AutoModelForCausalLM.from_pretrained(sharded, dtype=torch.float32)
    trunk = load_trunk(
        open_checkpoint(sharded),
        dtype=torch.float32,
        device=torch.device("cpu"),
        attn_implementation="eager",
        experts_implementation="eager",
    )
    assert torch.equal(trunk.get_parameter(name), theirs.get_parameter(name))


@pytest.mark.parametrize("weight_map", [{"a": "../other/x.safetensors"}, {"a": 3}, ["a"]])
def test_bad_index(sharded: Path, weight_map: Any) -> None:
    edit(sharded / "model.safetensors.index.json", weight_map=weight_map)
    assert "model.safetensors.index.json" in refusal(sharded)


@pytest.mark.parametrize(
    ("family", "name", "shape"),
    [
        ("qwen3_moe", "model.norm.weight", (63,)),
        ("qwen3_moe", "model.layers.1.mlp.experts.3.up_proj.weight", (32, 63)),
        ("qwen3_moe", "model.layers.1.mlp.experts.0.down_proj.weight", (64, 31)),
        ("qwen3_moe", "lm_head.weight", (511, 64)),
        ("gpt_oss", "model.layers.1.mlp.experts.gate_up_proj", (7, 64, 64)),
        ("gpt_oss", "model.layers.1.mlp.experts.down_proj_bias", (8, 63)),
    ],
)
def test_wrong_shape(copy: Callable[[str], Path], family: str, name: str, shape: tuple[int, ...]) -> None:
    path = copy(family)
    rewrite(path, lambda tensors: tensors.update({name: torch.zeros(shape)}))
    message = refusal(path)
    assert f"{name} has the shape {list(shape)}" in message
    assert "model.safetensors" in message


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.norm.weight", "no tensor for model.norm.weight"),
        ("lm_head.weight", "no tensor for lm_head.weight"),
        ("model.layers.1.mlp.experts.3.up_proj.weight", "7 tensors like"),
    ],
)
def test_missing_tensor(copy: Callable[[str], Path], name: str, expected: str) -> None:
    path = copy("qwen3_moe")
    rewrite(path, lambda tensors: tensors.__delitem__(name))
    assert expected in refusal(path)


def test_missing_layer(copy: Callable[[str], Path]) -> None:
    path = copy("olmoe")
    edit(path / "config.json", num_hidden_layers=4)
    assert "no tensor for model.layers.3" in refusal(path)


# --- Not servable -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "fields", "expected"),
    [
        ("llama", {}, "not a Mixture-of-Experts model"),
        ("dbrx", {"attn_config": {"rope_theta": 1e4, "kv_n_heads": 2}}, "experts interface"),
        ("jetmoe", {}, "experts interface"),
        ("llama4_text", {"num_local_experts": 4, "intermediate_size_mlp": 64}, "experts interface"),
        ("longcat_flash", {}, "experts interface"),
        ("zaya", {"num_experts": 4, "moe_intermediate_size": 64}, "ZayaCCAProjection keeps states and does not map"),
        ("granitemoehybrid", {"num_local_experts": 4}, "no layer of it attends to earlier tokens"),
        ("deepseek_v4", {"num_key_value_heads": 2, "moe_intermediate_size": 16}, "cannot be served: "),
        ("t5", {}, "encoder-decoder"),
        ("qwen3_vl_moe", {}, "other input than text"),
        ("bert", {"num_attention_heads": 4}, "Mixture-of-Experts"),
    ],
)
def test_unservable_architecture(tmp_path: Path, family: str, fields: dict[str, Any], expected: str) -> None:
    """The error comes before weights are searched; this directory has none."""
    dbrx = family == "dbrx"  # its configuration has names of its own
    sizes = {"d_model": 64, "n_layers": 2, "n_heads": 4, "vocab_size": 300} if dbrx else SMALL
    CONFIG_MAPPING[family](**({} if family == "qwen3_vl_moe" else sizes | fields)).save_pretrained(tmp_path)
    assert expected in refusal(tmp_path)


def test_quantized_weights_are_refused(copy: Callable[[str], Path]) -> None:
    path = copy("mixtral")
    edit(path / "config.json", quantization_config={"quant_method": "quark"})
    assert "quantized by 'quark'" in refusal(path)


def test_more_experts_per_token_than_experts(copy: Callable[[str], Path]) -> None:
    path = copy("qwen3_moe")
    edit(path / "config.json", num_experts_per_tok=9)
    assert "cannot be served: a dry run of it failed" in refusal(path)


# --- The maker ----------------------------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_bytes(tmp_path: Path) -> None:
    first, second, other = (
        (make_random_checkpoint(tmp_path / name, layers=1, seed=seed) / "model.safetensors").read_bytes()
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    )
    assert first == second != other


def test_tokenizer_keeps_every_text() -> None:
    tokenizer = small_tokenizer(512)
    text = "Größe: 5 µm — 日本語\n\t<b>é</b> 🙂"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer) == 512
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], add_generation_prompt=True, tokenize=False
    )
    assert chat == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    with pytest.raises(ValueError, match="vocab"):
        small_tokenizer(200)
