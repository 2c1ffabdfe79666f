"""A packed checkpoint loads as the plain one of the weights that it stands for; what contradicts itself is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from elastic_moe.cluster.errors import CheckpointError, ConfigError
from elastic_moe.cluster.expert_forms import ExpertForm
from elastic_moe.cluster.placement import WorkerId
from elastic_moe.model.checkpoints.checkpoint import Checkpoint, open_checkpoint
from elastic_moe.model.checkpoints.loading import iter_experts, load_trunk
from elastic_moe.model.trunk.step_batch import SequenceSlice
from tests.model.lockstep import Lockstep, request
from tests.model.packing import CASES, E2M1, pack_checkpoint
from tests.model.random_checkpoint import make_random_checkpoint
from tests.model.test_parity import reference

CPU = torch.device("cpu")
SIZES = {"hidden": 64, "layers": 2, "experts": 4, "top_k": 2, "ff": 32, "vocab": 300}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_random_checkpoint(tmp_path_factory.mktemp("plain") / "qwen", "qwen3_moe", **SIZES)


def trunk_of(checkpoint: Checkpoint, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    eager = {"attn_implementation": "eager", "experts_implementation": "eager"}
    return dict(load_trunk(checkpoint, dtype=dtype, device=CPU, **eager).state_dict())


def experts_of(
    checkpoint: Checkpoint, dtype: torch.dtype = torch.float32, form: ExpertForm = ExpertForm.PLAIN
) -> dict[str, torch.Tensor]:
    pairs = [(layer, e) for layer in range(checkpoint.info.num_layers) for e in range(4)]
    loaded = iter_experts(checkpoint, pairs, dtype=dtype, device=CPU, form=form)
    return {f"{layer}.{e}.{key}": tensor for layer, e, tensors in loaded for key, tensor in tensors.items()}


def same(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, tensor in got.items():
        torch.testing.assert_close(tensor, expected[name], rtol=2e-7, atol=0, msg=name)


@pytest.mark.parametrize("name", CASES)
def test_trunk_and_experts_are_unpacked(name: str, plain: Path, tmp_path: Path) -> None:
    packed, meant = map(open_checkpoint, pack_checkpoint(plain, tmp_path, CASES[name]))
    as_meant = replace(packed.info, kept=meant.info.kept, packed_as=meant.info.packed_as, trunk_packed_as=None)
    assert as_meant == meant.info
    assert sum(t.nbytes for t in packed.tensors.values()) < 0.7 * sum(t.nbytes for t in meant.tensors.values())
    same(trunk_of(packed), trunk_of(meant))
    same(experts_of(packed), experts_of(meant))


def test_a_weight_is_rounded_to_the_served_dtype_once(plain: Path, tmp_path: Path) -> None:
    packed = open_checkpoint(pack_checkpoint(plain, tmp_path, CASES["nvfp4"])[0])
    same(trunk_of(packed, torch.bfloat16), {n: t.bfloat16() for n, t in trunk_of(packed).items()})
    same(experts_of(packed, torch.bfloat16), {n: t.bfloat16() for n, t in experts_of(packed).items()})


FORMS = {
    "fp8-ue8m0": ExpertForm.FP8,
    "fp8-tensor": ExpertForm.FP8,
    "fp8-channel": ExpertForm.FP8,
    "fp8-modelopt": ExpertForm.FP8,
    "mxfp8": ExpertForm.MXFP8,
    "mxfp8-wide": ExpertForm.MXFP8,
    "int8-channel": ExpertForm.INT8,
    "int4-symmetric": ExpertForm.INT4,
    "int4-asymmetric": ExpertForm.INT4_HALF,
    "awq": ExpertForm.INT4_HALF,
    "gptq": ExpertForm.INT4_HALF,
    "gptq-v2": ExpertForm.INT4_HALF,
    "mxfp4": ExpertForm.MXFP4,
    "nvfp4": ExpertForm.NVFP4,
    "nvfp4-compressed": ExpertForm.NVFP4,
}
"""Formats that are kept as they come; the others are unpacked."""


@pytest.mark.parametrize("name", CASES)
def test_experts_are_kept_in_the_form_in_which_they_come(name: str, plain: Path, tmp_path: Path) -> None:
    packed, meant = map(open_checkpoint, pack_checkpoint(plain, tmp_path, CASES[name]))
    form = FORMS.get(name, ExpertForm.PLAIN)
    assert (packed.info.kept, meant.info.kept, meant.info.packed_as) == (form, ExpertForm.PLAIN, None)
    assert packed.info.packed_as is not None
    if form is not ExpertForm.PLAIN:
        kept = experts_of(packed, form=form)
        same({key: dequantized(form, kept, key) for key in kept if key.endswith("_proj")}, experts_of(meant))


@pytest.mark.parametrize("name", FORMS)
def test_kept_experts_are_computed(name: str, plain: Path, tmp_path: Path, lib: object) -> None:
    """By every worker in the same way, wherever the experts are; and as the unpacked ones, but for rounding."""
    path, _ = pack_checkpoint(plain, tmp_path, CASES[name])
    prompt, slots = list(range(5, 45)), [2, 2]
    cluster = Lockstep(path, slots, dtype="bfloat16")
    store = cluster.workers[WorkerId("w0")]._experts._store
    served = cluster.info.served_in("bfloat16", FORMS[name])
    assert store.nbytes == pytest.approx(4 * served.expert_bytes, rel=0.3)  # their groups are not whole
    assert store.nbytes < 0.7 * 4 * cluster.info.served_in("bfloat16").expert_bytes
    tokens = cluster.run([request("a", prompt, max_tokens=8)])
    before = [worker.export_experts([(0, 2 * n)])[0] for n, worker in enumerate(cluster.workers.values())]
    assert cluster.replace(cluster.shuffled(2), slots) > 0
    after = [worker.export_experts([(0, 2 * (1 - n))])[0] for n, worker in enumerate(cluster.workers.values())]
    assert [copy.digest for copy in after] == [copy.digest for copy in reversed(before)]
    assert cluster.run([request("b", prompt, max_tokens=8)])["b"] == tokens["a"]
    kept, unpacked = (
        logits_of(Lockstep(path, [4], dtype="bfloat16", expert_dtype=d), prompt) for d in ("auto", "bfloat16")
    )
    if FORMS[name] is ExpertForm.MXFP8:
        assert torch.equal(kept, unpacked)
    assert (kept - unpacked).abs().max() < 0.03 * unpacked.abs().max()


def logits_of(cluster: Lockstep, prompt: list[int]) -> torch.Tensor:
    piece = SequenceSlice(
        token_ids=prompt, start=0, block_ids=list(range(16)), prompt_length=len(prompt), wants_logits=True
    )
    [logits] = cluster.workers_runner().run([piece], [len(prompt)])
    return logits.float()


def dequantized(form: ExpertForm, tensors: dict[str, torch.Tensor], key: str) -> torch.Tensor:
    """[N, K] of the codes, scales and zero points of a matrix."""
    values, scales = tensors[key], tensors[f"{key}_scale"]
    if form is ExpertForm.MXFP8:
        powers = (scales.double() - 127).exp2().float().repeat_interleave(32, 1)
        return values.view(torch.float8_e4m3fn).float() * powers[:, : values.shape[1]]
    if form is ExpertForm.NVFP4:
        codes = torch.stack([values & 15, values >> 4], dim=-1).flatten(1)
        factors = (scales.view(torch.float8_e4m3fn).float() * tensors[f"{key}_each"]).repeat_interleave(16, 1)
        return torch.from_numpy(E2M1).float()[codes.int()] * factors
    scales = scales.float()
    if form.value.endswith("8"):
        numbers = values.view(torch.float8_e4m3fn).float() if form is ExpertForm.FP8 else values.float()
        return numbers * scales.repeat_interleave(128, 1)[:, : numbers.shape[1]]
    codes = torch.stack([values & 15, values >> 4], dim=-1).flatten(1)
    scales = scales.repeat_interleave(32, 1)
    if form is ExpertForm.MXFP4:
        return torch.from_numpy(E2M1).float()[codes.int()] * 2 * scales
    return (codes.float() - tensors[f"{key}_zero"].repeat_interleave(32, 1)) * scales


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ("int8", "in INT4 in groups of 32, and int8 would round them a second time"),
        ("bfloat16", "needs dtype bfloat16"),
        ("int4", "int4 needs dtype bfloat16, and float32 is served"),
    ],
)
def test_nothing_is_rounded_twice(asked: str, expected: str, plain: Path, tmp_path: Path) -> None:
    info = open_checkpoint(pack_checkpoint(plain, tmp_path, CASES["int4-symmetric"])[0]).info
    with pytest.raises(ConfigError, match=expected):
        info.form(asked, "float32", "cpu")
    assert info.form("int4", "bfloat16", "cpu") is info.form("auto", "bfloat16", "cpu") is ExpertForm.INT4
    # GPUs unpack them in each step, to any dtype of 16 bits, without the native library
    assert (
        info.form("auto", "bfloat16", "cuda", native=False) is info.form("int4", "float16", "cuda") is ExpertForm.INT4
    )
    assert info.form("auto", "float32", "cuda") is info.form("auto", "float32", "cpu") is ExpertForm.PLAIN
    assert info.form("auto", "bfloat16", "cpu", native=False) is info.form("auto", "float16", "cpu") is ExpertForm.PLAIN


@pytest.mark.parametrize(("family", "name"), [("deepseek_v3", "fp8-blocks"), ("gpt_oss", "awq"), ("mixtral", "gptq")])
def test_a_packed_checkpoint_is_served(family: str, name: str, tmp_path: Path) -> None:
    """The logits and tokens of transformers with the weights that numpy has unpacked."""
    source = make_random_checkpoint(tmp_path / "source", family, **SIZES | {"experts": 8})
    packed, meant = pack_checkpoint(source, tmp_path, CASES[name])
    prompt = list(range(5, 25))
    with torch.no_grad():
        expected = reference(meant)(torch.tensor([prompt])).logits[0, -1]
        tokens = reference(meant).generate(
            torch.tensor([prompt]), max_new_tokens=12, do_sample=False, eos_token_id=None
        )
    cluster = Lockstep(packed, [4, 4])
    assert cluster.run([request("a", prompt, max_tokens=12)])["a"] == tokens[0, len(prompt) :].tolist()
    logits = logits_of(Lockstep(packed, [8]), prompt)
    assert (logits - expected).abs().max() < 1e-4


# --- Contradictions ---------------------------------------------------------------------------------------------------

W = "model.layers.1.mlp.experts.3.up_proj"


def config(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    content = json.loads((path / "config.json").read_text())
    change(content)
    (path / "config.json").write_text(json.dumps(content))


def rewrite(path: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors", {"format": "pt"})


def refusal(path: Path, read: Callable[[Checkpoint], Any] = lambda _: None) -> str:
    with pytest.raises(CheckpointError) as caught:
        read(open_checkpoint(path))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "change", "expected"),
    [
        ("fp8-blocks", lambda t: t.pop(f"{W}.weight_scale_inv"), f"its scales, {W}.weight_scale_inv, are missing"),
        (
            "fp8-blocks",
            lambda t: t.update({f"{W}.weight_scale_inv": torch.ones(2, 9)}),
            f"{W}.weight_scale_inv has the",
        ),
        (
            "fp8-blocks",
            lambda t: t.update({f"{W}.weight": torch.ones(32, 64)}),
            f"{W}.weight_scale_inv has scales, but",
        ),
        ("fp8-blocks", lambda t: t.update({f"{W}.weight": torch.ones(8, 8).to(torch.float8_e4m3fn)}), "has the shape"),
        ("fp8-tensor", lambda t: t.pop(f"{W}.weight_scale_inv"), f"{W}.weight is packed as FP8"),
        ("int4-symmetric", lambda t: t.pop(f"{W}.weight_scale"), f"its scales, {W}.weight_scale, are missing"),
        ("int4-asymmetric", lambda t: t.pop(f"{W}.weight_zero_point"), f"{W}.weight_zero_point, are missing"),
        ("awq", lambda t: t.pop(f"{W}.qzeros"), f"its zero points, {W}.qzeros, are missing"),
        ("gptq-act-order", lambda t: t.pop(f"{W}.g_idx"), f"{W}.g_idx, are missing"),
        ("nvfp4", lambda t: t.pop(f"{W}.weight_scale_2"), f"{W}.weight_scale_2, are missing"),
        ("mxfp4", lambda t: t.pop(f"{W}.weight_scale"), "are missing"),
    ],
)
def test_tensors_that_do_not_fit_together(name: str, change: Any, expected: str, plain: Path, tmp_path: Path) -> None:
    path, _ = pack_checkpoint(plain, tmp_path, CASES[name])
    rewrite(path, change)
    message = refusal(path)
    assert expected in message
    assert "model.safetensors" in message


@pytest.mark.parametrize(
    ("name", "change", "expected"),
    [
        ("fp8-blocks", {"weight_block_size": [16, 16]}, "with blocks of 16 x 16, as weight_block_size says"),
        ("fp8-blocks", {"weight_block_size": None}, "as weight_block_size says (quantization_config of config.json)"),
        ("fp8-blocks", {"modules_to_not_convert": ["up_proj"]}, "leaves 'up_proj' unpacked"),
        ("fp8-blocks", {"quant_method": "awq", "bits": 4}, "'awq' says that weights are packed as AWQ"),
        ("awq", {"quant_method": "fp8"}, "'fp8' says that weights are packed as FP8"),
        ("awq", {"group_size": 16}, "for group_size 16"),
        ("awq", {"group_size": 48}, "group_size 48 does not divide its"),
        ("gptq", {"bits": 8}, "group_size 32 does not divide its 16 inputs"),
        ("int4-symmetric", {"ignore": ["re:.*experts[.]3[.].*"]}, "leaves 're:.*experts[.]3[.].*' unpacked"),
    ],
)
def test_a_configuration_that_contradicts_the_tensors(
    name: str, change: Any, expected: str, plain: Path, tmp_path: Path
) -> None:
    path, _ = pack_checkpoint(plain, tmp_path, CASES[name])
    config(path, lambda c: c["quantization_config"].update(change))
    message = refusal(path)
    assert expected in message
    assert "config.json" in message


@pytest.mark.parametrize("name", ["fp8-blocks", "awq", "int4-symmetric", "fp8-channel"])
def test_packed_tensors_need_a_configuration(name: str, plain: Path, tmp_path: Path) -> None:
    path, _ = pack_checkpoint(plain, tmp_path, CASES[name])
    config(path, lambda c: c.pop("quantization_config"))
    assert "config.json has no quantization_config" in refusal(path)


@pytest.mark.parametrize("where", [experts_of, trunk_of])
def test_impossible_values_are_named_when_they_are_read(where: Any, plain: Path, tmp_path: Path) -> None:
    path, _ = pack_checkpoint(plain, tmp_path, CASES["fp8-blocks"])
    name = f"{W}.weight_scale_inv" if where is experts_of else "model.layers.0.self_attn.q_proj.weight_scale_inv"
    rewrite(path, lambda t: t[name].view(-1)[0].fill_(torch.nan))
    message = refusal(path, where)
    assert f"model.safetensors: {name} has a scale that is infinite or not a number" in message
