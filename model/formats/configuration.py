"""Reads `quantization_config` of a config.json: the formats of a checkpoint's weights, and the modules left alone."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from elastic_moe.model.formats.awq import Awq
from elastic_moe.model.formats.bytes8 import Bytes8
from elastic_moe.model.formats.floats4 import BlocksMxfp4, Mxfp4, Nvfp4
from elastic_moe.model.formats.gptq import Gptq
from elastic_moe.model.formats.integers import PackedIntegers
from elastic_moe.model.formats.interface import Format

_REGEX = "re:"
_LEFT_ALONE = ("modules_to_not_convert", "ignored_layers", "ignore", "exclude_modules")

_REFUSED = {
    "bitsandbytes": "the statistics of its blocks are quantized themselves, in a layout of its CUDA kernels",
    "torchao": "its layouts are those of its tensor classes",
    "quanto": "its layouts are those of its tensor classes",
    "hqq": "its layouts are those of its kernels",
    "eetq": "its layout is that of its CUDA kernels",
    "aqlm": "weights from codebooks are not read",
    "vptq": "weights from codebooks are not read",
    "spqr": "weights with sparse outliers are not read",
    "higgs": "rotated weights are not read",
    "bitnet": "weights of fewer than 4 bits are not read",
    "quark": "its layouts are not read",
    "auto-round": "its layouts are not read; its exports as GPTQ, AWQ or compressed-tensors are",
}


class BadConfiguration(ValueError):
    """A quantization_config cannot be read. The message is one line that names the field."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scoped:
    """A format, and the modules that have it."""

    format: Format
    targets: tuple[str, ...] = ()
    """Patterns of module names; all modules if there is none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Packing:
    """What a configuration says of a checkpoint's packed weights."""

    method: str
    formats: tuple[Scoped, ...]
    left_alone: tuple[str, ...] = ()
    """Patterns of the modules that are not packed."""

    def formats_of(self, module: str) -> list[Format]:
        """The formats that a module may have, the likeliest first."""
        found = [s.format for s in self.formats if not s.targets or any(_matches(t, module) for t in s.targets)]
        return found or [scoped.format for scoped in self.formats]

    def leaves_alone(self, module: str) -> str | None:
        """The pattern by which the configuration says that the module is not packed; None if it does not say so."""
        return next((pattern for pattern in self.left_alone if _matches(pattern, module)), None)

    def labels(self) -> str:
        return ", ".join(dict.fromkeys(scoped.format.label for scoped in self.formats))


def _matches(pattern: str, module: str) -> bool:
    """Whether a module, or one that it is part of, is meant by a pattern.

    `re:` begins a regular expression that matches the name's beginning, `*` stands for any text, and a plain pattern
    is a whole name, the begin or the end of one, at a dot.
    """
    if pattern.startswith(_REGEX):
        return re.match(pattern.removeprefix(_REGEX), module) is not None
    if "*" in pattern:
        return fnmatchcase(module, pattern) or fnmatchcase(module, f"{pattern}.*")
    return f"{module}.".startswith(f"{pattern}.") or f".{module}".endswith(f".{pattern}")


def read_packing(raw: Mapping[str, Any]) -> Packing | None:
    """What the configuration `raw` says of packed weights; None if it says that there are none.

    Raises BadConfiguration for a method that is not read, and for fields that make no sense.
    """
    places = (raw, raw.get("text_config"))
    keys = ("quantization_config", "compression_config")
    found = [place[key] for place in places if isinstance(place, dict) for key in keys if place.get(key)]
    if not found:
        return None
    config = found[0]
    method = config.get("quant_method") if isinstance(config, dict) else None
    if not isinstance(method, str):
        raise BadConfiguration("quantization_config: quant_method is missing")
    reader = _READERS.get(method)
    if reader is None:
        known = f"read are {', '.join(_READERS)}"
        why = _REFUSED.get(method, "the method is unknown")
        raise BadConfiguration(
            f"quantization_config: weights quantized by {method!r} are not supported: {why}; {known}"
        )
    return Packing(method=method, formats=tuple(reader(config)), left_alone=tuple(_left_alone(config)))


def _left_alone(config: Mapping[str, Any]) -> Iterator[str]:
    for key in _LEFT_ALONE:
        patterns = config.get(key) or ()
        if not isinstance(patterns, list | tuple) or not all(isinstance(pattern, str) for pattern in patterns):
            raise _bad(key, "a list of module names", patterns)
        yield from (_checked(key, pattern) for pattern in patterns)
    for pattern in _dynamic(config):
        if pattern.startswith("-:"):
            yield _checked("dynamic", _REGEX + pattern.removeprefix("-:"))


def _checked(key: str, pattern: str) -> str:
    if pattern.startswith(_REGEX):
        try:
            re.compile(pattern.removeprefix(_REGEX))
        except re.error as error:
            raise _bad(key, "regular expressions after re:", pattern) from error
    return pattern


def _dynamic(config: Mapping[str, Any]) -> Mapping[str, Any]:
    dynamic = config.get("dynamic") or {}
    if not isinstance(dynamic, dict):
        raise _bad("dynamic", "an object of module patterns", dynamic)
    return dynamic


# --- Methods ----------------------------------------------------------------------------------------------------------


def _fp8(config: Mapping[str, Any]) -> Iterator[Scoped]:
    key = "weight_block_size"
    yield Scoped(format=Bytes8(block=_block(config, key), field=key))
    if config.get("expert_dtype") == "fp4":
        yield Scoped(format=Mxfp4())


def _fp8_by_channel(config: Mapping[str, Any]) -> Iterator[Scoped]:
    yield Scoped(format=Bytes8(block=None, field=f"quant_method {config['quant_method']}"))


def _mxfp8(config: Mapping[str, Any]) -> Iterator[Scoped]:
    yield Scoped(format=Bytes8(block=(1, 32), field="quant_method mxfp8"))


def _mxfp4(config: Mapping[str, Any]) -> Iterator[Scoped]:
    yield Scoped(format=BlocksMxfp4())
    yield Scoped(format=Mxfp4())


def _awq(config: Mapping[str, Any]) -> Iterator[Scoped]:
    if (bits := config.get("bits", config.get("w_bit"))) != 4:
        raise _bad("bits", "4, which is all that AWQ's packing has", bits)
    version = str(config.get("version", "gemm")).lower()
    if version != "gemm":
        raise _bad("version", "gemm, the only packing of AWQ that is read", version)
    group = _group(config, "group_size" if "group_size" in config else "q_group_size")
    yield Scoped(format=Awq(group=group, zeros=bool(config.get("zero_point", True))))


def _gptq(config: Mapping[str, Any]) -> Iterator[Scoped]:
    bits = config.get("bits")
    if bits not in (4, 8):
        raise _bad("bits", "4 or 8", bits)
    packing = config.get("checkpoint_format", config.get("format", "gptq"))
    if packing not in ("gptq", "gptq_v2"):
        raise _bad("checkpoint_format", "gptq or gptq_v2, the packings of GPTQ that are read", packing)
    others = [pattern for pattern in _dynamic(config) if not pattern.startswith("-:")]
    if others:
        raise _bad("dynamic", "patterns of modules that are not quantized, which begin with -:", others[0])
    yield Scoped(
        format=Gptq(
            bits=bits,
            group=_group(config, "group_size"),
            act_order=bool(config.get("desc_act")),
            less_one=packing == "gptq",
        )
    )


def _modelopt(config: Mapping[str, Any]) -> Iterator[Scoped]:
    inner = config.get("quantization")
    algorithm = config.get("quant_algo", inner.get("quant_algo") if isinstance(inner, dict) else None)
    key = f"quant_algo {algorithm}"
    fp8, nvfp4 = Bytes8(block=None, field=key), Nvfp4(divides=False)
    known: dict[str, tuple[Format, ...]] = {
        "FP8": (fp8,),
        "FP8_PER_CHANNEL_PER_TOKEN": (fp8,),
        "NVFP4": (nvfp4,),
        "MXFP8": (Bytes8(block=(1, 32), field=key),),
        "MIXED_PRECISION": (nvfp4, fp8),
    }
    if not isinstance(algorithm, str) or algorithm not in known:
        raise _bad("quant_algo", f"one of {', '.join(known)}", algorithm)
    yield from (Scoped(format=form) for form in known[algorithm])


def _compressed_tensors(config: Mapping[str, Any]) -> Iterator[Scoped]:
    for key in ("sparsity_config", "transform_config"):
        if (part := config.get(key)) and not (isinstance(part, dict) and part.get("format") == "dense"):
            raise BadConfiguration(f"quantization_config: {key}: sparse and rotated weights are not read")
    groups = config.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        raise _bad("config_groups", "an object of groups", groups)
    for name, group in groups.items():
        weights = group.get("weights") if isinstance(group, dict) else None
        if not isinstance(weights, dict):
            raise _bad(f"config_groups.{name}.weights", "an object", weights)
        targets = group.get("targets") or ()
        patterns = [_checked("targets", t) for t in targets if isinstance(t, str) and t.startswith(_REGEX)]
        form = _group_format(f"config_groups.{name}", group.get("format") or config.get("format"), weights)
        yield Scoped(format=form, targets=tuple(patterns) if len(patterns) == len(targets) else ())


def _group_format(where: str, packing: Any, weights: Mapping[str, Any]) -> Format:
    kind, bits = weights.get("type", "int"), weights.get("num_bits")
    if packing == "pack-quantized":
        if bits not in (4, 8) or kind != "int":
            raise _bad(f"{where}.weights.num_bits", "integers of 4 or 8 bits", bits)
        return PackedIntegers(
            bits=bits,
            group=_group(weights, "group_size") if weights.get("strategy") != "channel" else None,
            symmetric=bool(weights.get("symmetric", True)),
            field=f"{where}.weights",
        )
    if packing == "nvfp4-pack-quantized":
        return Nvfp4(divides=True)
    if packing == "mxfp4-pack-quantized":
        return Mxfp4()
    if packing == "mxfp8-quantized":
        return Bytes8(block=(1, 32), field=f"{where}.weights")
    if packing in ("float-quantized", "int-quantized", "naive-quantized") and bits == 8:
        if kind == "int" and not weights.get("symmetric", True):
            raise _bad(f"{where}.weights.symmetric", "true for INT8", False)
        return Bytes8(block=_strategy_block(where, weights), field=f"{where}.weights", integer=kind == "int")
    known = "pack-quantized, float-quantized, int-quantized, nvfp4-, mxfp4-pack-quantized and mxfp8-quantized"
    raise _bad("format", f"one of {known}, with a number of bits that it has", f"{packing} in {bits} bits")


def _strategy_block(where: str, weights: Mapping[str, Any]) -> tuple[int, int] | None:
    strategy = weights.get("strategy")
    if strategy == "block":
        return _block(weights, "block_structure")
    if strategy == "group":
        group = _group(weights, "group_size")
        return None if group is None else (1, group)
    if strategy in ("tensor", "channel"):
        return None
    raise _bad(f"{where}.weights.strategy", "tensor, channel, group or block", strategy)


_READERS: dict[str, Callable[[Mapping[str, Any]], Iterator[Scoped]]] = {
    "fp8": _fp8,
    "fbgemm_fp8": _fp8_by_channel,
    "mxfp8": _mxfp8,
    "mxfp4": _mxfp4,
    "compressed-tensors": _compressed_tensors,
    "modelopt": _modelopt,
    "awq": _awq,
    "gptq": _gptq,
}


# --- Fields -----------------------------------------------------------------------------------------------------------


def _bad(key: str, expected: str, found: Any) -> BadConfiguration:
    return BadConfiguration(f"quantization_config: {key}: expected {expected}, found {str(found)[:80]!r}")


def _block(config: Mapping[str, Any], key: str) -> tuple[int, int] | None:
    """Outputs and inputs of a block; None if the field is missing or null."""
    value = config.get(key)
    if value is None:
        return None
    if isinstance(value, list) and len(value) == 2 and all(map(_is_count, value)):
        return value[0], value[1]
    raise _bad(key, "two numbers above 0", value)


def _group(config: Mapping[str, Any], key: str) -> int | None:
    """Inputs of a group; None if all inputs are one group."""
    value = config.get(key)
    if value in (None, -1):
        return None
    if _is_count(value):
        return int(value)
    raise _bad(key, "a number above 0, or -1 for one group", value)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < 2**31
