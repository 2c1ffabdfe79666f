"""Opens a model directory: finds what it holds, and whether it can be served. Reads no weight.

Everything that can be wrong with a checkpoint is found here, in a second or two, and reported in one line.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from elastic_moe.cluster.errors import CheckpointError
from elastic_moe.cluster.messages.epochs import ModelInfo
from elastic_moe.model.checkpoints.conversion import Conversion, find_conversion
from elastic_moe.model.checkpoints.kept import kept_form
from elastic_moe.model.checkpoints.limits import MOST_POSITIONS, WithinCpuTime, check_counts
from elastic_moe.model.checkpoints.packed import PackedTensor, Stored, find_packed
from elastic_moe.model.checkpoints.quiet import quiet_transformers
from elastic_moe.model.checkpoints.raw import read_configuration, read_json
from elastic_moe.model.checkpoints.servability import NotServable, Shape, dry_run
from elastic_moe.model.checkpoints.stored import stored_tensors
from elastic_moe.model.checkpoints.wrapped import text_part, text_tensors
from elastic_moe.model.formats.configuration import BadConfiguration, Packing, read_packing
from elastic_moe.model.transformers_private import CONFIG_MAPPING, causal_class, multimodal_class
from elastic_moe.model.trunk.linear import NARROW_OUTPUTS
from elastic_moe.model.trunk.rotation import LONGROPE, growth_limit

_BROKEN = (
    *(ValueError, TypeError, KeyError, AttributeError, IndexError, RuntimeError, ArithmeticError, AssertionError),
    *(ImportError, OSError, StrictDataclassError, MemoryError),
)
"""Errors that transformers raises when a configuration makes no sense to it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """An opened model directory."""

    path: Path
    config: PretrainedConfig
    """The configuration of the language model, also if the checkpoint's configuration has more parts."""
    info: ModelInfo
    tensors: dict[str, Stored]
    """Those of the language model, by the names that they have in a checkpoint of it alone."""
    packing: Packing | None
    """What config.json says of packed weights; None if it says nothing of them."""
    stored_dtype: torch.dtype
    """The floating dtype in which most of the bytes are stored that are not packed."""
    skeleton: PreTrainedModel
    """The model on the meta device, which has names and shapes only. Nobody may run or change it."""
    shape: Shape
    conversion: Conversion


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open the Hugging Face checkpoint in the directory `path`.

    Raises CheckpointError, with one line, if the checkpoint is missing, damaged, incomplete or cannot be served.
    Never runs code of the checkpoint, and never unpickles. Blocks for a second or two.
    """
    path = Path(path)
    raw = _read_raw(path)
    try:
        tensors = stored_tensors(path)
    except CheckpointError as unreadable:
        # an error in config.json explains more than this one, so it is looked for first
        check_counts(path / "config.json", raw, None)
        _understand(path)
        raise unreadable
    check_counts(path / "config.json", raw, tensors)
    packing = _packing(path / "config.json", raw)
    config, skeleton, shape = _understand(path)
    weights = find_packed(path / "config.json", packing, tensors)
    try:
        return _planned(path, config, skeleton, shape, weights, packing)
    except CheckpointError:
        raise
    except _BROKEN as error:
        raise CheckpointError(
            f"{path / 'config.json'}: does not fit the stored tensors ({_one_line(error)})"
        ) from error


def _understand(path: Path) -> tuple[PretrainedConfig, PreTrainedModel, Shape]:
    config = _read_config(path)
    try:
        skeleton = _skeleton(path, text_part(config))
        shape = dry_run(skeleton)
    except NotServable as reason:
        raise CheckpointError(f"{path}: {type(skeleton).__name__} cannot be served: {reason}") from reason
    except CheckpointError:
        raise
    except _BROKEN as error:
        raise CheckpointError(f"{path / 'config.json'}: no model can be built from it ({_one_line(error)})") from error
    return config, skeleton, shape


def _planned(
    path: Path,
    config: PretrainedConfig,
    skeleton: PreTrainedModel,
    shape: Shape,
    tensors: dict[str, Stored],
    packing: Packing | None,
) -> Checkpoint:
    """Find which stored tensors make which parameters, and describe the model."""
    if text_part(config) is not config:
        tensors = text_tensors(_whole_skeleton(config), skeleton, tensors)
    conversion = find_conversion(skeleton, shape.expert_modules, shape.num_experts, tensors)
    dtype = _stored_dtype(tensors)
    expert_bytes, trunk_bytes, matrix_bytes = _sizes(skeleton, shape, dtype)
    of_experts = (name for parts in conversion.experts for part in parts for name in part.sources_of(0).values())
    info = ModelInfo(
        architecture=type(skeleton).__name__,
        num_layers=len(shape.expert_modules),
        num_logical_experts=shape.num_experts,
        top_k=shape.top_k,
        hidden_size=shape.hidden_size,
        vocab_size=shape.vocab_size,
        max_model_len=_max_model_len(path, config),
        expert_bytes=expert_bytes,
        trunk_bytes=trunk_bytes,
        eos_token_ids=_eos_token_ids(path, config),
        dtype=str(dtype).removeprefix("torch."),
        rope_limits=_rope_limits(config),
        rope_growth_limit=growth_limit(skeleton),
        kept=kept_form(skeleton, shape, conversion, tensors),
        packed_as=_packed_as(of_experts, tensors),
        matrix_bytes=matrix_bytes,
        trunk_packed_as=_packed_as(conversion.trunk, tensors),
        kv_layers=tuple((layer.numbers, layer.window) for layer in shape.kv),
    )
    return Checkpoint(
        path=path,
        config=skeleton.config,
        info=info,
        tensors=tensors,
        packing=packing,
        stored_dtype=dtype,
        skeleton=skeleton,
        shape=shape,
        conversion=conversion,
    )


# --- Configuration ------------------------------------------------------------------------------------------------


def _read_raw(path: Path) -> dict[str, Any]:
    """Read config.json as it is written. Raises CheckpointError unless transformers knows its model type."""
    raw = read_configuration(path)
    file, model_type = path / "config.json", raw["model_type"]
    if model_type not in CONFIG_MAPPING:
        if "auto_map" in raw:
            raise CheckpointError(f"{file}: {model_type} needs code that comes with the checkpoint, which is never run")
        raise CheckpointError(f"{file}: model_type {model_type!r} is unknown to the installed transformers")
    _packing(file, raw)
    return raw


def _read_config(path: Path) -> PretrainedConfig:
    file = path / "config.json"
    try:
        with quiet_transformers():
            config: PretrainedConfig = AutoConfig.from_pretrained(path, trust_remote_code=False, local_files_only=True)
    except _BROKEN as error:
        raise CheckpointError(f"{file}: {_one_line(error)}") from error
    for part in (config, text_part(config)):
        if hasattr(part, "quantization_config"):
            # weights are unpacked while they are loaded, so transformers must not set up kernels for packed ones
            del part.quantization_config
    return config


def _packing(file: Path, raw: dict[str, Any]) -> Packing | None:
    try:
        return read_packing(raw)
    except BadConfiguration as error:
        raise CheckpointError(f"{file}: {error}") from error


def _skeleton(path: Path, config: PretrainedConfig) -> PreTrainedModel:
    """Build the causal language model of `config` on the meta device."""
    file = path / "config.json"
    if getattr(config, "is_encoder_decoder", False):
        raise CheckpointError(f"{file}: {config.model_type} is an encoder-decoder model, which cannot be served")
    kind: Any = causal_class(config)
    if kind is None:
        others = sorted(key for key in config.sub_configs if key != "text_config")
        why = f"; it takes other input than text ({', '.join(others)})" if others else ""
        raise CheckpointError(f"{file}: transformers has no causal language model for {config.model_type}{why}")
    try:
        with torch.device("meta"), WithinCpuTime(), quiet_transformers():
            model: PreTrainedModel = kind._from_config(
                config, attn_implementation="eager", experts_implementation="eager"
            )
            model.eval()  # type: ignore[no-untyped-call]
    except _BROKEN as error:
        raise CheckpointError(f"{file}: no model can be built from it ({_one_line(error)})") from error
    return model


def _whole_skeleton(config: PretrainedConfig) -> PreTrainedModel:
    """Build the model of a configuration that has more parts than text, on the meta device."""
    kind: Any = multimodal_class(config)
    if kind is None:
        raise CheckpointError(f"transformers has no model for all parts of {config.model_type}")
    with torch.device("meta"), WithinCpuTime(), quiet_transformers():
        model: PreTrainedModel = kind._from_config(config, attn_implementation="eager")
    return model


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__


def _max_model_len(path: Path, config: PretrainedConfig) -> int:
    """The longest sequence that the position embeddings allow, in tokens.

    YaRN and linear scaling multiply the original length. Where max_position_embeddings already is the product
    (DeepSeek, gpt-oss), the result is the same.
    """
    length = int(config.get_text_config().max_position_embeddings)
    longest = max((_scaled(length, part) for part in _ropes(config)), default=length)
    if not (length >= 2 and 2 <= longest <= MOST_POSITIONS):
        raise CheckpointError(
            f"{path / 'config.json'}: max_position_embeddings is {float(length):.10g}, and {float(longest):.10g} "
            f"with the scaling of its rotary embeddings: expected from 2 to {MOST_POSITIONS} positions"
        )
    return longest


def _ropes(config: PretrainedConfig) -> list[dict[str, Any]]:
    rope = getattr(config.get_text_config(), "rope_parameters", None) or {}
    # some families have parameters for each kind of layer
    return [rope] if "rope_type" in rope else [part for part in rope.values() if isinstance(part, dict)]


def _rope_limits(config: PretrainedConfig) -> tuple[int, ...]:
    limits = {
        int(rope["original_max_position_embeddings"]) for rope in _ropes(config) if rope.get("rope_type") == LONGROPE
    }
    return tuple(sorted(limits))


def _scaled(length: int, rope: dict[str, Any]) -> int:
    if rope.get("rope_type") == "yarn" and rope.get("factor"):
        return max(length, int(rope.get("original_max_position_embeddings", length) * rope["factor"]))
    if rope.get("rope_type") in ("linear", "dynamic") and rope.get("factor"):
        return int(length * rope["factor"])
    return length


def _eos_token_ids(path: Path, config: PretrainedConfig) -> tuple[int, ...]:
    """All end tokens that generation_config.json and config.json name; if they name none, those of the model family.

    The API adds the tokenizer's end token to every request. Fine-tunes change one of these three places and leave the
    others unchanged, so all three count.
    """
    generation, own = path / "generation_config.json", path / "config.json"
    found = _named_eos(generation, read_json(generation)) if generation.is_file() else []
    raw = read_json(own)
    found += _named_eos(own, raw)
    if isinstance(text := raw.get("text_config"), dict):
        found += _named_eos(own, text)
    if not found:
        found = _named_eos(own, {"eos_token_id": getattr(config.get_text_config(), "eos_token_id", None)})
    return tuple(dict.fromkeys(found))


def _named_eos(file: Path, content: dict[str, Any]) -> list[int]:
    eos = content.get("eos_token_id")
    ids = [] if eos is None else eos if isinstance(eos, list) else [eos]
    if not all(isinstance(token, int) for token in ids):
        raise CheckpointError(f"{file}: eos_token_id must be a token or a list of tokens, found {eos!r}")
    return ids


def _packed_as(names: Iterable[str], tensors: dict[str, Stored]) -> str | None:
    """The format of the first of these tensors that is packed."""
    return next((w.format.label for name in names if isinstance(w := tensors[name], PackedTensor)), None)


# --- Sizes --------------------------------------------------------------------------------------------------------


def _stored_dtype(tensors: dict[str, Stored]) -> torch.dtype:
    """The floating dtype in which most bytes are stored, without packed weights."""
    counts: Counter[torch.dtype] = Counter({torch.bfloat16: 0})
    for tensor in tensors.values():
        if tensor.dtype.is_floating_point and not isinstance(tensor, PackedTensor):
            counts[tensor.dtype] += tensor.nbytes
    return counts.most_common(1)[0][0]


def _sizes(model: PreTrainedModel, shape: Shape, dtype: torch.dtype) -> tuple[int, int, int]:
    """Bytes of one expert, of the trunk, and of the trunk's matrices that --trunk-dtype can round, in `dtype`. Tied
    weights count once."""
    experts = {id(p) for name in shape.expert_modules for p in model.get_submodule(name).parameters()}
    trunk = [p for p in model.parameters() if id(p) not in experts]
    matrices = {
        id(module.weight): module.weight.numel()
        for module in model.modules()
        if isinstance(module, nn.Linear | nn.Embedding)
        and id(module.weight) not in experts
        and len(module.weight) >= NARROW_OUTPUTS
    }
    of_experts = sum(p.numel() for p in model.parameters() if id(p) in experts)
    count = shape.num_experts * len(shape.expert_modules)
    counts = of_experts // count, sum(p.numel() for p in trunk), sum(matrices.values())
    of_expert, of_trunk, of_matrices = (number * dtype.itemsize for number in counts)
    return of_expert, of_trunk, of_matrices
