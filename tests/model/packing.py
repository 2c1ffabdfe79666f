"""Packs weights in numpy as each format's description has it, one number at a time, and says what they stand for.

Written apart from model/formats/, from the descriptions alone. A packer takes a weight [N, K] and gives the stored
tensors by the endings of their names, and the weight that these stand for.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

Array = np.ndarray[Any, np.dtype[Any]]
Parts = dict[str, torch.Tensor]
Packer = Callable[[Array], tuple[Parts, Array]]


def e4m3(byte: int) -> float:
    """1 bit of sign, 4 of exponent with bias 7, 3 of mantissa; no infinities."""
    exponent, mantissa = byte >> 3 & 15, byte & 7
    size = mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
    return -size if byte >> 7 else size


E4M3 = np.array([e4m3(byte) for byte in range(256)])
E4M3[[0x7F, 0xFF]] = np.nan
E2M1 = np.array([(-1) ** (c >> 3) * (c % 8 / 2 if c % 8 < 4 else (2, 3, 4, 6)[c % 8 - 4]) for c in range(16)])


def nearest(values: Array, table: Array) -> Array:
    """The codes of the table's numbers that are nearest to the values."""
    numbers, codes = np.unique(table, return_index=True)
    numbers, codes = numbers[np.isfinite(numbers)], codes[np.isfinite(numbers)]
    return codes[np.searchsorted((numbers[1:] + numbers[:-1]) / 2, values)].astype(np.uint8)


def words(numbers: Array, bits: int, order: tuple[int, ...] | None = None) -> torch.Tensor:
    """Pack rows of numbers into words: number `order[i]` of a word at bit `i * bits`. The last word is filled up."""
    each = 32 // bits
    places = order or tuple(range(each))
    rows, columns = numbers.shape
    out = np.zeros((rows, -(-columns // each)), dtype=np.uint32)
    for word in range(out.shape[1]):
        for place, which in enumerate(places):
            if (column := word * each + which) < columns:
                out[:, word] |= (numbers[:, column].astype(np.uint32) & np.uint32(2**bits - 1)) << np.uint32(
                    place * bits
                )
    return torch.from_numpy(out.view(np.int32).copy())


def halves(codes: Array) -> torch.Tensor:
    """Two codes in a byte, the first in the lower half."""
    return torch.from_numpy((codes[..., 0::2] | codes[..., 1::2] << 4).astype(np.uint8))


def spread(scales: Array, block: tuple[int, int], shape: tuple[int, ...]) -> Array:
    n, k = np.indices(shape)
    return scales[n // block[0], k // block[1]]


def float8(codes: Array) -> torch.Tensor:
    return torch.from_numpy(codes.astype(np.uint8)).view(torch.float8_e4m3fn)


# --- 8 bits -----------------------------------------------------------------------------------------------------------


def fp8_blocks(
    block: tuple[int, int], *, powers: torch.dtype | None = None, ending: str = ".weight_scale_inv"
) -> Packer:
    """`powers`: scales are powers of 2, in this dtype."""

    def pack(weight: Array) -> tuple[Parts, Array]:
        rows, columns = weight.shape
        scales = np.zeros((-(-rows // block[0]), -(-columns // block[1])))
        for i in range(scales.shape[0]):
            for j in range(scales.shape[1]):
                most = np.abs(weight[i * block[0] : (i + 1) * block[0], j * block[1] : (j + 1) * block[1]]).max()
                scales[i, j] = 2.0 ** np.ceil(np.log2(most / 448)) if powers else np.float32(most / 448)
        each = spread(scales, block, weight.shape)
        codes = nearest(weight / each, E4M3)
        stored = torch.from_numpy(scales.astype(np.float32))
        if powers in (torch.uint8, torch.float8_e8m0fnu):
            stored = torch.from_numpy((np.log2(scales) + 127).astype(np.uint8)).view(powers)
        return {".weight": float8(codes), ending: stored}, E4M3[codes] * each

    return pack


def fp8_scaled(axis: int | None, shape: Callable[[int], tuple[int, ...]], ending: str = ".weight_scale") -> Packer:
    """A scale of each output (axis 1) or of the tensor (None), stored in `shape(outputs)`."""

    def pack(weight: Array) -> tuple[Parts, Array]:
        scales = np.float32(np.abs(weight).max(axis=axis, keepdims=True) / 448)
        codes = nearest(weight / scales, E4M3)
        stored = torch.from_numpy(np.broadcast_to(scales, scales.shape).copy()).reshape(shape(len(weight)))
        return {".weight": float8(codes), ending: stored, ".input_scale": torch.tensor(1.0)}, E4M3[codes] * scales

    return pack


def int8_channels(weight: Array) -> tuple[Parts, Array]:
    scales = np.float32(np.abs(weight).max(axis=1, keepdims=True) / 127)
    values = np.round(weight / scales).astype(np.int8)
    return {".weight": torch.from_numpy(values), ".weight_scale": torch.from_numpy(scales)}, values * scales.astype(
        np.float64
    )


# --- 4 bits -----------------------------------------------------------------------------------------------------------


def mxfp4(weight: Array) -> tuple[Parts, Array]:
    rows = len(weight)
    groups = np.abs(weight).reshape(rows, -1, 32).max(-1)
    exponents = np.ceil(np.log2(groups / 6)).astype(np.int64)
    each = spread(2.0**exponents, (1, 32), weight.shape)
    codes = nearest(weight / each, E2M1)
    scales = torch.from_numpy((exponents + 127).astype(np.uint8))
    return {".weight_packed": halves(codes), ".weight_scale": scales}, E2M1[codes] * each


def nvfp4(divides: bool) -> Packer:
    def pack(weight: Array) -> tuple[Parts, Array]:
        rows, _ = weight.shape
        whole = np.float32(np.abs(weight).max() / (6 * 448))
        groups = np.abs(weight).reshape(rows, -1, 16).max(-1) / 6 / whole
        scale_codes = nearest(groups, E4M3)
        each = spread(E4M3[scale_codes] * float(whole), (1, 16), weight.shape)
        codes = nearest(weight / np.where(each == 0, 1, each), E2M1)
        scales = float8(scale_codes)
        if divides:
            stored = np.float32(1 / whole)
            each = spread(E4M3[scale_codes] / float(stored), (1, 16), weight.shape)
            return {
                ".weight_packed": halves(codes),
                ".weight_scale": scales,
                ".weight_global_scale": torch.tensor([stored]),
            }, E2M1[codes] * each
        return {".weight": halves(codes), ".weight_scale": scales, ".weight_scale_2": torch.tensor(whole)}, E2M1[
            codes
        ] * each

    return pack


@dataclass(frozen=True, kw_only=True)
class Grouped:
    """Numbers 0 .. 2^bits - 1 of groups of inputs, before they are packed: weight = (number - zero) x scale."""

    numbers: Array
    zeros: Array
    """[N, G]"""
    scales: Array
    """[N, G], as the stored dtype has them."""
    index: Array
    """[K] the group of each input."""

    def weight(self) -> Array:
        return (self.numbers - self.zeros[:, self.index]) * self.scales[:, self.index]


def grouped(
    weight: Array,
    bits: int,
    group: int,
    *,
    symmetric: bool,
    shuffled: bool = False,
    dtype: torch.dtype = torch.float16,
) -> Grouped:
    rows, columns = weight.shape
    index = np.arange(columns) // group
    if shuffled:
        index = np.random.default_rng(columns).permutation(index)
    count = -(-columns // group)
    zeros, scales = np.zeros((rows, count), dtype=np.int64), np.zeros((rows, count))
    most = 2**bits - 1
    for g in range(count):
        part = weight[:, index == g]
        if symmetric:
            scales[:, g], zeros[:, g] = np.abs(part).max(1) / (2 ** (bits - 1) - 1), 2 ** (bits - 1)
        else:
            low, high = np.minimum(part.min(1), 0), np.maximum(part.max(1), 0)
            scales[:, g] = (high - low) / most
            # some tools store a zero point less 1, so that there is none of 0
            zeros[:, g] = np.clip(np.round(-low / scales[:, g]), 1, most)
    scales = torch.from_numpy(scales).to(dtype).double().numpy()
    numbers = np.clip(np.round(weight / scales[:, index]) + zeros[:, index], 0, most).astype(np.int64)
    return Grouped(numbers=numbers, zeros=zeros, scales=scales, index=index)


def half(scales: Array, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(scales)).to(dtype)


def compressed_integers(
    bits: int, group: int, *, symmetric: bool, shuffled: bool = False, dtype: torch.dtype = torch.bfloat16
) -> Packer:
    def pack(weight: Array) -> tuple[Parts, Array]:
        made = grouped(weight, bits, group, symmetric=symmetric, shuffled=shuffled, dtype=dtype)
        parts = {
            ".weight_packed": words(made.numbers, bits),
            ".weight_scale": half(made.scales, dtype),
            ".weight_shape": torch.tensor(weight.shape),
        }
        if not symmetric:
            parts[".weight_zero_point"] = words(made.zeros.T, bits).T.contiguous()
        if shuffled:
            parts[".weight_g_idx"] = torch.from_numpy(made.index).int()
        return parts, made.weight()

    return pack


def awq(group: int) -> Packer:
    order = (0, 2, 4, 6, 1, 3, 5, 7)

    def pack(weight: Array) -> tuple[Parts, Array]:
        made = grouped(weight, 4, group, symmetric=False)
        return {
            ".qweight": words(made.numbers.T, 4, order),
            ".qzeros": words(made.zeros.T, 4, order),
            ".scales": half(made.scales.T),
        }, made.weight()

    return pack


def gptq(bits: int, group: int, *, symmetric: bool, shuffled: bool = False, less_one: bool = True) -> Packer:
    def pack(weight: Array) -> tuple[Parts, Array]:
        made = grouped(weight, bits, group, symmetric=symmetric, shuffled=shuffled)
        return {
            ".qweight": words(made.numbers, bits).T.contiguous(),
            ".qzeros": words(made.zeros.T - less_one, bits),
            ".scales": half(made.scales.T),
            ".g_idx": torch.from_numpy(made.index).int(),
        }, made.weight()

    return pack


# --- Checkpoints ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Case:
    """A format, and how a config.json announces it."""

    pack: Packer
    quantization: Mapping[str, Any]
    experts_only: bool = False
    skip: tuple[str, ...] = field(default=("embed_tokens", "lm_head", ".mlp.gate.", "norm"))


def _compressed(form: str, **weights: Any) -> dict[str, Any]:
    ignore = ["lm_head", "re:.*mlp[.]gate$"]
    group = {"weights": {"symmetric": True, **weights}, "targets": ["Linear"]}
    return {"quant_method": "compressed-tensors", "format": form, "config_groups": {"group_0": group}, "ignore": ignore}


def _gptq(bits: int, **more: Any) -> dict[str, Any]:
    return {"quant_method": "gptq", "bits": bits, "group_size": 32, "sym": True, "desc_act": False, **more}


_FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic"}
_AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
_INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}

CASES = {
    "fp8-blocks": Case(
        pack=fp8_blocks((24, 20)),
        quantization=_FP8
        | {"weight_block_size": [24, 20], "modules_to_not_convert": ["lm_head", "model.layers.*.mlp.gate"]},
    ),
    "fp8-ue8m0": Case(
        pack=fp8_blocks((24, 128), powers=torch.float8_e8m0fnu),
        quantization=_FP8 | {"weight_block_size": [24, 128], "scale_fmt": "ue8m0", "ignored_layers": ["lm_head"]},
    ),
    "fp8-tensor": Case(pack=fp8_scaled(None, lambda _: (), ".weight_scale_inv"), quantization=_FP8),
    "fp8-channel": Case(
        pack=fp8_scaled(1, lambda rows: (rows, 1)),
        quantization=_compressed("float-quantized", num_bits=8, type="float", strategy="channel"),
    ),
    "fp8-modelopt": Case(
        pack=fp8_scaled(None, lambda _: (1,)),
        quantization={"quant_method": "modelopt", "quant_algo": "FP8", "ignore": ["lm_head", "*mlp.gate"]},
    ),
    "mxfp8": Case(pack=fp8_blocks((1, 32), powers=torch.uint8), quantization={"quant_method": "mxfp8"}),
    "mxfp8-wide": Case(
        pack=fp8_blocks((8, 64), powers=torch.float8_e8m0fnu),
        quantization=_FP8 | {"weight_block_size": [8, 64], "scale_fmt": "ue8m0", "ignored_layers": ["lm_head"]},
    ),
    "int8-channel": Case(
        pack=int8_channels,
        quantization=_compressed("int-quantized", num_bits=8, type="int", strategy="channel"),
    ),
    "int4-symmetric": Case(
        pack=compressed_integers(4, 32, symmetric=True), quantization=_compressed("pack-quantized", **_INT4)
    ),
    "int4-asymmetric": Case(
        pack=compressed_integers(4, 32, symmetric=False, dtype=torch.float16),
        quantization=_compressed("pack-quantized", **_INT4 | {"symmetric": False}),
    ),
    "int4-ordered": Case(
        pack=compressed_integers(4, 32, symmetric=True, shuffled=True),
        quantization=_compressed("pack-quantized", **_INT4, actorder="group"),
    ),
    "int8-groups": Case(
        pack=compressed_integers(8, 32, symmetric=True),
        quantization=_compressed("pack-quantized", **_INT4 | {"num_bits": 8}),
    ),
    "awq": Case(pack=awq(32), quantization=_AWQ | {"modules_to_not_convert": ["gate"]}),
    "gptq": Case(pack=gptq(4, 32, symmetric=True), quantization=_gptq(4)),
    "gptq-act-order": Case(
        pack=gptq(4, 32, symmetric=False, shuffled=True), quantization=_gptq(4, desc_act=True, sym=False)
    ),
    "gptq-v2": Case(
        pack=gptq(4, 32, symmetric=False, less_one=False), quantization=_gptq(4, checkpoint_format="gptq_v2")
    ),
    "gptq-int8": Case(pack=gptq(8, 32, symmetric=True), quantization=_gptq(8, dynamic={"-:.*mlp[.]gate$": {}})),
    "nvfp4": Case(
        pack=nvfp4(False), quantization={"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["lm_head"]}
    ),
    "nvfp4-compressed": Case(
        pack=nvfp4(True),
        quantization=_compressed("nvfp4-pack-quantized", num_bits=4, type="float", strategy="tensor_group"),
    ),
    "mxfp4": Case(
        pack=mxfp4,
        quantization=_compressed("mxfp4-pack-quantized", num_bits=4, type="float", strategy="group"),
        experts_only=True,
    ),
}


def pack_checkpoint(source: Path, where: Path, case: Case) -> tuple[Path, Path]:
    """Copies of the checkpoint `source`: (packed, plain with what the packed weights stand for)."""
    packed, plain = where / "packed", where / "plain"
    for copy in (packed, plain):
        shutil.copytree(source, copy)
    tensors = load_file(source / "model.safetensors")
    stored, meant = {}, {}
    for name, tensor in tensors.items():
        taken = tensor.dim() == 2 and name.endswith(".weight") and not any(part in name for part in case.skip)
        if not taken or (case.experts_only and ".experts." not in name):
            stored[name] = meant[name] = tensor
            continue
        parts, weight = case.pack(tensor.double().numpy())
        meant[name] = torch.from_numpy(weight).float().contiguous()
        for ending, part in parts.items():
            stored[name.removesuffix(".weight") + ending] = part.contiguous()
    save_file(stored, packed / "model.safetensors", {"format": "pt"})
    save_file(meant, plain / "model.safetensors", {"format": "pt"})
    file = packed / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": dict(case.quantization)}))
    return packed, plain
