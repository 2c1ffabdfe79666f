"""Every format unpacks what tests/model/packing.py has packed from the format's description, number by number."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from elastic_moe.model.formats.bytes8 import Bytes8
from elastic_moe.model.formats.configuration import BadConfiguration, read_packing
from elastic_moe.model.formats.floats4 import BlocksMxfp4
from elastic_moe.model.formats.interface import (
    ORDER,
    SCALES,
    SECOND_SCALES,
    SHAPE,
    VALUES,
    ZEROS,
    BadPart,
    Format,
    Header,
)
from elastic_moe.model.formats.small_floats import E2M1
from tests.model import packing
from tests.model.packing import CASES


def by_role(form: Format, parts: packing.Parts) -> dict[str, torch.Tensor]:
    """The parts as the format names them: of all its namings, that which finds most."""
    found = []
    for naming in form.namings:
        suffix = ".weight" if naming.makes == "" else ""
        endings = {VALUES: (suffix + naming.values,)} | {
            r: tuple(suffix + e for e in es) for r, es in naming.others.items()
        }
        found.append({r: parts[e] for r, es in endings.items() for e in es if e in parts})
    return max(found, key=len)


def unpack(form: Format, parts: dict[str, torch.Tensor]) -> torch.Tensor:
    shape = form.shape({role: Header(part.dtype, tuple(part.shape)) for role, part in parts.items()})
    weight = form.unpack(parts)
    assert (tuple(weight.shape), weight.dtype) == (shape, torch.float32)
    return weight


def form_of(quantization: Any) -> Format:
    packing_of = read_packing({"quantization_config": quantization})
    assert packing_of is not None
    return packing_of.formats[0].format


def draw(*shape: int) -> np.ndarray[Any, np.dtype[Any]]:
    # sizes of outputs and inputs differ, so that scales of the wrong row or group show
    rng = np.random.default_rng(sum(shape))
    sizes = np.logspace(-2, 0, shape[0])[:, None] * np.logspace(0, 1, shape[1])
    return np.asarray(rng.standard_normal(shape) * sizes)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("shape", [(64, 96), (40, 32), (8, 160)])
def test_a_weight_is_what_its_format_says(name: str, shape: tuple[int, int]) -> None:
    case = CASES[name]
    parts, weight = case.pack(draw(*shape))
    form = form_of(case.quantization)
    got = unpack(form, by_role(form, parts)).double().numpy()
    np.testing.assert_allclose(got, weight, rtol=2e-7, atol=0)


def test_short_blocks_have_scales_of_their_own() -> None:
    """DeepSeek's kv_a_proj_with_mqa: the last block of outputs has 64 of 128."""
    parts, weight = packing.fp8_blocks((128, 128))(draw(576, 512))
    assert parts[".weight_scale_inv"].shape == (5, 4)
    form = Bytes8(block=(128, 128), field="weight_block_size")
    np.testing.assert_allclose(unpack(form, by_role(form, parts)).numpy(), weight, rtol=2e-7)


def test_codes_of_small_floats() -> None:
    assert list(E2M1) == packing.E2M1.tolist()
    codes = np.array([code for code in range(256) if code not in (0x7F, 0xFF)])
    assert packing.float8(codes).double().tolist() == packing.E4M3[codes].tolist()


@pytest.mark.parametrize("lead", [(3,), (3, 2)])
def test_fused_experts_have_blocks_each(lead: tuple[int, ...]) -> None:
    matrices = [packing.fp8_blocks((16, 16))(draw(40, 36 + 0 * n)) for n in range(int(np.prod(lead)))]
    parts = {
        role: torch.stack([made[0][ending] for made in matrices]).unflatten(0, lead)
        for role, ending in ((VALUES, ".weight"), (SCALES, ".weight_scale_inv"))
    }
    got = unpack(Bytes8(block=(16, 16), field="weight_block_size"), parts)
    np.testing.assert_allclose(got.flatten(0, -3).numpy(), np.stack([weight for _, weight in matrices]), rtol=2e-7)


def test_blocks_of_gpt_oss_make_transposed_weights() -> None:
    parts, weight = packing.mxfp4(draw(48, 64))
    blocks = parts[".weight_packed"].unflatten(-1, (2, 16))[None]
    got = unpack(BlocksMxfp4(), {VALUES: blocks, SCALES: parts[".weight_scale"][None]})
    np.testing.assert_array_equal(got[0].numpy(), weight.T)


def test_zero_points_may_be_unpacked_bytes() -> None:
    """Older releases of compressed-tensors write int8."""
    made = packing.grouped(draw(24, 64), 4, 32, symmetric=False)
    form = form_of(CASES["int4-asymmetric"].quantization)
    parts = {
        VALUES: packing.words(made.numbers, 4),
        SCALES: packing.half(made.scales),
        ZEROS: torch.from_numpy(made.zeros - 8).to(torch.int8),
    }
    np.testing.assert_allclose(unpack(form, parts).numpy(), made.weight(), rtol=2e-7)
    with pytest.raises(BadPart, match="from -8 to 8, expected -8 to 7") as caught:
        unpack(form, parts | {ZEROS: torch.tensor([[8, -8]] * 24, dtype=torch.int8)})
    assert caught.value.role == ZEROS


# --- What is not as it should be --------------------------------------------------------------------------------------


def with_a_nan(codes: torch.Tensor) -> torch.Tensor:
    raw = codes.clone().view(torch.uint8)
    raw[5, 7] = 0x7F
    return raw.view(codes.dtype)


@pytest.mark.parametrize(
    ("name", "role", "change", "expected"),
    [
        ("fp8-blocks", SCALES, lambda t: t[:-1], "expected [3, 5] for a weight [64, 96] with blocks of 24 x 20"),
        ("fp8-blocks", SCALES, lambda t: t.long(), "expected scales in 16 or 32 bits"),
        ("fp8-blocks", SCALES, lambda t: t * torch.nan, "infinite or not a number"),
        ("fp8-ue8m0", SCALES, lambda t: torch.full_like(t.view(torch.uint8), 255), "not a number"),
        ("fp8-channel", SCALES, lambda t: t[:-1], "expected [64, 1]"),
        ("fp8-tensor", VALUES, with_a_nan, "has a weight that is not a number"),
        ("mxfp8", VALUES, with_a_nan, "has a weight that is not a number"),
        ("mxfp8", SCALES, lambda t: t[:, :-1], "blocks of 1 x 32"),
        ("int4-symmetric", SCALES, lambda t: t[:, :-1], "3 groups for each of 64 outputs"),
        ("int4-symmetric", SCALES, lambda t: t / 0, "infinite or not a number"),
        ("int4-symmetric", VALUES, lambda t: t[:, :-1], "do not divide its inputs"),
        ("int4-symmetric", SHAPE, lambda t: t + 1, "says [65, 97], but the numbers make [64, 96]"),
        ("int4-asymmetric", ZEROS, lambda t: t[:-1], "expected the shape [8, 3]"),
        ("int4-ordered", ORDER, lambda t: t + 1, "has numbers from 1 to 3, expected 0 to 2"),
        ("awq", VALUES, lambda t: t[:-1], "group_size 32 does not divide its 95 inputs"),
        ("awq", ZEROS, lambda t: t[:-1], "expected the shape [3, 8]"),
        ("awq", SCALES, lambda t: t * torch.inf, "infinite or not a number"),
        ("gptq", VALUES, lambda t: t[:-1], "group_size 32 does not divide its 88 inputs"),
        ("gptq", SCALES, lambda t: t[:-1], "expected the shape [3, 64]"),
        ("gptq", ZEROS, lambda t: torch.full_like(t, -1), "from 16 to 16, expected 0 to 15"),
        ("gptq-act-order", ORDER, lambda t: t - 1, "has numbers from -1 to 1, expected 0 to 2"),
        ("nvfp4", SCALES, lambda t: t[:, :-1], "one for every 16 inputs"),
        ("nvfp4", SCALES, lambda t: t.float(), "expected float8_e4m3fn"),
        ("nvfp4", SECOND_SCALES, lambda t: t * torch.nan, "infinite or not a number"),
        ("nvfp4-compressed", SECOND_SCALES, lambda t: t * 0, "is 0"),
        ("mxfp4", SCALES, lambda t: t[:, :-1], "one for every 32 inputs"),
        ("mxfp4", SCALES, lambda t: t.float(), "expected E8M0"),
        ("mxfp4", VALUES, lambda t: t[:, :-1], "groups of 32 do not divide"),
    ],
)
def test_a_part_that_does_not_fit_is_named(name: str, role: str, change: Any, expected: str) -> None:
    form = form_of(CASES[name].quantization)
    parts = by_role(form, CASES[name].pack(draw(64, 96))[0])
    parts[role] = change(parts[role])
    with pytest.raises(BadPart) as caught:
        unpack(form, parts)
    assert caught.value.role == role
    assert expected in str(caught.value)


def compressed(**group: Any) -> dict[str, Any]:
    return {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"g": group}}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"quant_method": "x" * 9}, "'xxxxxxxxx' are not supported: the method is unknown; read are fp8"),
        ({"quant_method": "bitsandbytes"}, "not supported: the statistics of its blocks"),
        ({"bits": 4}, "quant_method is missing"),
        ("fp8", "quant_method is missing"),
        ({"quant_method": "fp8", "weight_block_size": [128, 0]}, "weight_block_size: expected two numbers above 0"),
        ({"quant_method": "fp8", "ignored_layers": "lm_head"}, "ignored_layers: expected a list of module names"),
        ({"quant_method": "awq", "bits": 8}, "bits: expected 4"),
        ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "version: expected gemm"),
        ({"quant_method": "gptq", "bits": 3}, "bits: expected 4 or 8"),
        ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}, "checkpoint_format: expected gptq or"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 0}, "group_size: expected a number above 0"),
        ({"quant_method": "gptq", "bits": 4, "dynamic": {"+:.*down.*": {"bits": 8}}}, "dynamic: expected patterns"),
        ({"quant_method": "modelopt", "quant_algo": "W4A8_AWQ"}, "quant_algo: expected one of FP8"),
        ({"quant_method": "compressed-tensors"}, "config_groups: expected an object"),
        (compressed(weights={"num_bits": 2, "type": "int"}), "config_groups.g.weights.num_bits: expected integers of"),
        (compressed(weights=4), "config_groups.g.weights: expected an object"),
        (compressed(format="marlin-24", weights={"num_bits": 4}), "format: expected one of pack-quantized"),
        (compressed(weights={"num_bits": 4}) | {"ignore": ["re:["]}, "ignore: expected regular expressions after re:"),
        (compressed(weights={"num_bits": 4}) | {"transform_config": {"a": 1}}, "sparse and rotated weights"),
    ],
)
def test_a_configuration_that_is_not_read_says_why(config: Any, expected: str) -> None:
    with pytest.raises(BadConfiguration) as caught:
        read_packing({"quantization_config": config})
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("pattern", "module", "meant"),
    [
        ("lm_head", "lm_head", True),
        ("gate", "model.layers.0.mlp.gate", True),
        ("gate", "model.layers.0.mlp.experts.0.gate_proj", False),
        ("mlp", "model.layers.0.mlp.experts.0.gate_proj", False),
        ("model.layers.1", "model.layers.1.mlp.up_proj", True),
        ("model.layers.1", "model.layers.11.mlp.up_proj", False),
        ("model.layers.*.self_attn", "model.layers.3.self_attn.q_proj", True),
        ("*self_attn*", "model.layers.3.self_attn.q_proj", True),
        ("model.layers.*.mlp.router", "model.layers.3.mlp.experts", False),
        ("re:.*self_attn.*", "model.layers.3.self_attn.q_proj", True),
        (r"re:.*mlp\.(gate|up|gate_up|down)_proj.*", "model.layers.0.mlp.up_proj", True),
        (r"re:.*mlp\.(gate|up|gate_up|down)_proj.*", "model.layers.1.mlp.experts.0.up_proj", False),
    ],
)
def test_which_modules_are_left_alone(pattern: str, module: str, meant: bool) -> None:
    found = read_packing({"quantization_config": {"quant_method": "fp8", "modules_to_not_convert": [pattern]}})
    assert found is not None
    assert found.leaves_alone(module) == (pattern if meant else None)


def test_groups_of_a_configuration_may_differ_by_module() -> None:
    config = CASES["int4-symmetric"].quantization
    weights = {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True}
    groups = config["config_groups"] | {
        "group_1": {"weights": weights, "targets": ["re:.*down_proj"]},
        "group_0": config["config_groups"]["group_0"] | {"targets": ["re:.*up_proj"]},
    }
    found = read_packing({"quantization_config": config | {"config_groups": groups}})
    assert found is not None
    assert [form.label for form in found.formats_of("mlp.down_proj")] == ["INT8 by channel"]
    assert [form.label for form in found.formats_of("mlp.up_proj")] == ["INT4 in groups of 32"]
    assert found.labels() == "INT4 in groups of 32, INT8 by channel"
