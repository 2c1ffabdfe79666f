"""Tiny checkpoints of every family that must be served, for tests. float32, some hundred KB to a MB each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.model.random_checkpoint import make_random_checkpoint, wrap_random_checkpoint

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
    "phimoe-sliding": {"family": "phimoe", "sliding_window": 8},
    "phimoe-longrope": {
        "family": "phimoe",
        "original_max_position_embeddings": 2048,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "factor": 2.0,
            "short_factor": [1.0, 1.0, 1.1, 1.2, 1.3, 1.5, 1.7, 2.0],
            "long_factor": [1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0],
            "short_mscale": 1.1,
            "long_mscale": 1.3,
        },
    },
    "granitemoe": {"family": "granitemoe"},
    "granitemoeshared": {"family": "granitemoeshared"},
    "ernie4_5_moe": {"family": "ernie4_5_moe"},
    "dots1": {"family": "dots1"},
    "flex_olmo": {"family": "flex_olmo"},
    "hunyuan_v1_moe": {"family": "hunyuan_v1_moe"},
    "minimax_m2": {"family": "minimax_m2"},
    "gemma4_text": {"family": "gemma4_text"},
    "gemma4_text-keys": {"family": "gemma4_text", "attention_k_eq_v": True, "num_global_key_value_heads": 1},
}
"""Name of a case -> arguments of `make_random_checkpoint`. A case is a family, or a family with a setting that matters:
sliding windows, soft-caps, dense layers between MoE layers, scaled rotary embeddings, tied embeddings."""

MORE_FAMILIES = (
    "afmoe",
    "axk1",
    "cohere2_moe",
    "exaone_moe",
    "glm4_moe_lite",
    "granitemoe_swa",
    "granitemoehybrid",
    "hy_v3",
    "laguna",
    "mellum",
    "mimo_v2_flash",
    "minimax_m3_vl_text",
    "solar_open",
)
"""Further families that are served. Only tests of what differs by family use them."""

_DELTA = {
    "seed": 2,
    "family": "qwen3_next",
    "layers": 4,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 8,
}
_MIXED = ["linear_attention", "full_attention", "linear_attention", "linear_attention"]

HYBRIDS: dict[str, dict[str, Any]] = {
    "qwen3_next": _DELTA,
    "qwen3_5_moe_text": _DELTA | {"family": "qwen3_5_moe_text"},
    "kimi_linear": {
        "family": "kimi_linear",
        "layers": 4,
        "layer_types": _MIXED,
        "q_lora_rank": None,
        "num_local_experts": 8,
        "linear_num_heads": 2,
        "linear_head_dim": 16,
    },
    "granitemoehybrid-mamba": {
        "family": "granitemoehybrid",
        "layers": 4,
        "layer_types": _MIXED,
        "mamba_n_heads": 8,
        "mamba_d_head": 16,
        "mamba_d_state": 16,
        "mamba_n_groups": 2,
        "mamba_chunk_size": 8,
    },
    "nemotron_h": {
        "family": "nemotron_h",
        "layers": 6,
        "layers_block_type": ["linear_attention", "moe", "full_attention", "moe", "linear_attention", "moe"],
        "mamba_num_heads": 8,
        "mamba_head_dim": 16,
        "ssm_state_size": 16,
        "n_groups": 2,
        "chunk_size": 8,
        "moe_latent_size": 32,
        "moe_shared_expert_intermediate_size": 64,
    },
    "jamba": {
        "family": "jamba",
        "layers": 4,
        "attn_layer_period": 3,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 0,
        "mamba_d_state": 8,
    },
    "minimax": {
        "family": "minimax",
        "layers": 4,
        "layer_types": _MIXED,
        "intermediate_size": 32,
        "block_size": 8,
        "linear_attn_alpha_factor": 1.5,
        "linear_attn_beta_factor": 0.7,
    },
    "lfm2_moe": {
        "family": "lfm2_moe",
        "layers": 4,
        "layer_types": ["conv", "conv", "full_attention", "conv"],
        "num_dense_layers": 1,
    },
}
"""Cases like those of FAMILIES, of models that keep a state per sequence in some layers."""

WINDOWED: dict[str, dict[str, Any]] = {
    "gpt_oss-short": {"family": "gpt_oss", "layers": 4, "sliding_window": 8},
    "mimo_v2_flash-short": {"family": "mimo_v2_flash", "layers": 4, "sliding_window": 8},
}
"""Cases of models whose prompts are longer than the window of some layers, beside "mixtral-sliding"."""

_VISION = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_attention_heads": 2,
    "num_hidden_layers": 1,
}
WRAPPED: dict[str, tuple[str, str, dict[str, Any]]] = {
    "kimi_k25": ("deepseek_v3", "kimi_k25", {"vision_config": _VISION, "tie_word_embeddings": False}),
    "mistral3": (
        "mistral4",
        "mistral3",
        {"vision_config": {"model_type": "pixtral", "head_dim": 16} | _VISION, "tie_word_embeddings": False},
    ),
    "qwen3_5_moe": (
        "qwen3_5_moe_text",
        "qwen3_5_moe",
        {
            "vision_config": {"hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "depth": 1}
            | {"out_hidden_size": 64, "num_position_embeddings": 16},
        },
    ),
    "gemma4": ("gemma4_text", "gemma4", {"vision_config": None, "audio_config": None}),
}
"""Name of a model with more input than text -> case of its text part, its family, and fields of its configuration."""

_SIZES = {"hidden": 64, "layers": 3, "experts": 8, "top_k": 2, "ff": 32, "vocab": 512}
_made: dict[tuple[str, Path], Path] = {}


def tiny_checkpoint(name: str, where: Path | pytest.TempPathFactory) -> Path:
    """The directory of case `name` of FAMILIES, HYBRIDS, WINDOWED or WRAPPED, or of one of MORE_FAMILIES, made below
    `where`.

    One process makes it once.
    """
    base = where if isinstance(where, Path) else where.getbasetemp()
    key = (name, base)
    if key not in _made and name in WRAPPED:
        text, family, parts = WRAPPED[name]
        _made[key] = wrap_random_checkpoint(tiny_checkpoint(text, where), base / "checkpoints" / name, family, **parts)
    elif key not in _made:
        _made[key] = make_random_checkpoint(
            base / "checkpoints" / name, **(_SIZES | (FAMILIES | HYBRIDS | WINDOWED).get(name, {"family": name}))
        )
    return _made[key]
