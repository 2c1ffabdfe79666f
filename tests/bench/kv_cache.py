"""What a token takes in the KV cache, and the longest context in 8 GB: `python -m tests.bench.kv_cache`.

Families have the sizes of transformers' default configurations, which are those of a published model for most of them.
No weight is made: the dry run by which the server decides whether it can serve a model tells what each layer keeps.
vLLM's figures come from its formula: a layer that makes keys and values of latents keeps the latents, and a layer with
a window of W tokens keeps no more than W - 1 tokens and those of one step.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import AutoConfig

from elastic_moe.model.checkpoints.quiet import quiet_transformers
from elastic_moe.model.checkpoints.servability import LayerKV, dry_run
from elastic_moe.model.transformers_private import causal_class
from tests.bench.report import markdown

ROOM_BYTES = 8 * 10**9
BF16 = 2
STEP_TOKENS = 2048
"""Tokens of a step in vLLM, which a layer with a window keeps besides the window."""

FAMILIES: Mapping[str, Mapping[str, Any]] = {
    "mixtral": {},
    "qwen3_moe": {},
    "qwen2_moe": {},
    "olmoe": {},
    "flex_olmo": {},
    "deepseek_v2": {
        "num_hidden_layers": 60,
        "num_attention_heads": 128,
        "n_routed_experts": 160,
        "num_experts_per_tok": 6,
    },
    "deepseek_v3": {},
    "deepseek_v32": {},
    "glm4_moe_lite": {},
    "glm_moe_dsa": {},
    "mistral4": {},
    "gpt_oss": {},
    "glm4_moe": {},
    "dots1": {"n_routed_experts": 128, "num_experts_per_tok": 6},
    "phimoe": {},
    "granitemoe": {"num_local_experts": 32},
    "ernie4_5_moe": {},
    "hunyuan_v1_moe": {"num_experts": 16, "moe_topk": 1, "head_dim": 128},
    "minimax_m2": {},
    "gemma4_text": {"enable_moe_block": True, "num_experts": 128, "top_k_experts": 8, "moe_intermediate_size": 704},
    "mimo_v2_flash": {},
}
"""Family -> fields that its default configuration lacks to be a published model with experts."""


def layers_of(family: str) -> tuple[LayerKV, ...]:
    """What each attention layer of a family keeps of a token."""
    with quiet_transformers(), torch.device("meta"):
        config = AutoConfig.for_model(family, **FAMILIES[family])
        kind: Any = causal_class(config)
        model = kind._from_config(config, attn_implementation="eager", experts_implementation="eager").eval()
    return dry_run(model).kv


def longest(layers: Sequence[LayerKV]) -> tuple[int, int]:
    """The tokens of one sequence that fit ROOM_BYTES: here, and by vLLM's formula."""
    ours = sum(layer.numbers for layer in layers) * BF16
    steps = sorted((layer.window + STEP_TOKENS - 1, layer.numbers * BF16) for layer in layers if layer.window)
    room, token = float(ROOM_BYTES), ours
    for kept, nbytes in steps:
        if room / token <= kept:
            break
        room, token = room - kept * nbytes, token - nbytes
    return ROOM_BYTES // ours, int(room // token) if token else 0


def row(family: str, layers: Sequence[LayerKV]) -> list[str]:
    numbers, expanded = (sum(getattr(layer, name) for layer in layers) for name in ("numbers", "expanded"))
    windows = [layer.window for layer in layers if layer.window]
    here, vllm = longest(layers)
    return [
        family,
        f"{len(layers)}" + (f", {len(windows)} with a window of {min(windows)}" if windows else ""),
        f"{numbers * BF16 / 1000:.1f}",
        f"{expanded / numbers:.1f}" if expanded != numbers else "",
        f"{here // 1000}",
        f"{vllm // 1000}" if vllm else "unbounded",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description="KV bytes per token, and the longest context in 8 GB.")
    parser.add_argument("families", nargs="*", choices=[[], *FAMILIES], default=[])
    wanted = parser.parse_args().families or list(FAMILIES)
    head = (
        "family",
        "attention layers",
        "kB per token",
        "times that, expanded",
        "thousand tokens in 8 GB",
        "by vLLM's formula",
    )
    print(markdown(head, [row(family, layers_of(family)) for family in wanted]))


if __name__ == "__main__":
    main()
