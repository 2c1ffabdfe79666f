"""Tiny checkpoints of every family that must be served, for tests. float32, some hundred KB to a MB each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from model.random_checkpoint import make_random_checkpoint

FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {"family": "mixtral"},
    "mixtral-sliding": {"family": "mixtral", "sliding_window": 8},
    "qwen3_moe": {"family": "qwen3_moe"},
    "qwen3_moe-mixed": {"family": "qwen3_moe", "layers": 4, "mlp_only_layers": [1], "tie_word_embeddings": True},
    "qwen2_moe": {"family": "qwen2_moe"},
    "qwen2_moe-sliding": {
        "family": "qwen2_moe",
        "use_sliding_window": True,
        "sliding_window": 8,
        "max_window_layers": 2,
    },
    "olmoe": {"family": "olmoe"},
    "deepseek_v3": {"family": "deepseek_v3", "seed": 1},
    "deepseek_v3-yarn": {
        "family": "deepseek_v3",
        "q_lora_rank": None,
        "max_position_embeddings": 256,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 64,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
        },
    },
    "deepseek_v2": {"family": "deepseek_v2"},
    "gpt_oss": {"family": "gpt_oss"},
    "glm4_moe": {"family": "glm4_moe"},
    "phimoe": {"family": "phimoe"},
    "granitemoe": {"family": "granitemoe"},
    "granitemoeshared": {"family": "granitemoeshared"},
    "ernie4_5_moe": {"family": "ernie4_5_moe"},
    "dots1": {"family": "dots1"},
    "flex_olmo": {"family": "flex_olmo"},
    "hunyuan_v1_moe": {"family": "hunyuan_v1_moe"},
    "minimax_m2": {"family": "minimax_m2"},
}
"""Name of a case -> what `make_random_checkpoint` is told. A case is a family, or a family with a setting that matters:
sliding windows, dense layers between MoE layers, scaled rotary embeddings, tied embeddings."""

_SIZES = {"hidden": 64, "layers": 3, "experts": 8, "top_k": 2, "ff": 32, "vocab": 512}
_made: dict[tuple[str, Path], Path] = {}


def tiny_checkpoint(name: str, where: Path | pytest.TempPathFactory) -> Path:
    """The directory of case `name` of FAMILIES, made below `where` unless this process has made it there already."""
    base = where if isinstance(where, Path) else where.getbasetemp()
    key = (name, base)
    if key not in _made:
        _made[key] = make_random_checkpoint(base / "checkpoints" / name, **(_SIZES | FAMILIES[name]))
    return _made[key]
