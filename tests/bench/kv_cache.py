"""What a token takes in the KV cache, and the longest context in 8 GB: `python -m tests.bench.kv_cache`.

Families have the sizes of transformers' default configurations, which are those of a published model for most of them.
No weight is made: the dry run by which the server decides whether it can serve a model tells what each layer keeps.
vLLM's figures come from its formula: a layer that makes keys and values of latents keeps the latents, and a layer with
a window of W tokens keeps no more than W - 1 tokens and those of one step. Here it keeps the window and two chunks of a
prompt, as model/worker/cache_room.py says.
"""

from __future__ import annotations

import argparse
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import AutoConfig

from elastic_moe.cluster.messages.epochs import STEPS_IN_FLIGHT
from elastic_moe.model.checkpoints.quiet import quiet_transformers
from elastic_moe.model.checkpoints.servability import LayerKV, dry_run
from elastic_moe.model.transformers_private import causal_class
from elastic_moe.model.worker.cache_room import CacheSizes, WindowSizes
from tests.bench.report import markdown

ROOM_BYTES = 8 * 10**9
BF16 = 2
BLOCK = 16
STEP_TOKENS = 2048
"""Tokens of a step in vLLM, which a layer with a window keeps besides the window."""
MOST_TOKENS = 1 << 40

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
    "dots1": {"n_routed_experts": 128, "n_shared_experts": 2, "num_experts_per_tok": 6, "first_k_dense_replace": 1},
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


def one_sequence(layers: Sequence[LayerKV], tokens: int) -> int:
    """The bytes that a sequence of so many tokens takes here."""
    short = [layer for layer in layers if layer.window and layer.window < tokens]
    apart = sum(layer.numbers for layer in short)
    windows = WindowSizes(
        tokens=max((layer.window or 0 for layer in short), default=0),
        block_bytes=apart * BF16 * BLOCK,
        block_size=BLOCK,
        max_num_batched_tokens=STEP_TOKENS,
        steps_in_flight=STEPS_IN_FLIGHT,
    )
    return CacheSizes(
        block_bytes=(sum(layer.numbers for layer in layers) - apart) * BF16 * BLOCK,
        blocks_per_sequence=-(-tokens // BLOCK),
        max_num_seqs=1,
        windows=windows if short else None,
    ).one


def longest_here(layers: Sequence[LayerKV]) -> int:
    """The tokens of one sequence that fit ROOM_BYTES here; 0: any number."""
    tokens = range(0, MOST_TOKENS, BLOCK)
    found = bisect_right(tokens, ROOM_BYTES, key=lambda n: one_sequence(layers, n))
    return 0 if found == len(tokens) else tokens[found - 1]


def longest_by_vllm(layers: Sequence[LayerKV]) -> int:
    """The tokens of one sequence that fit ROOM_BYTES by vLLM's formula; 0: any number."""
    steps = sorted((layer.window + STEP_TOKENS - 1, layer.numbers * BF16) for layer in layers if layer.window)
    room, token = float(ROOM_BYTES), sum(layer.numbers for layer in layers) * BF16
    for kept, nbytes in steps:
        if room / token <= kept:
            break
        room, token = room - kept * nbytes, token - nbytes
    return int(room // token) if token else 0


def row(family: str, layers: Sequence[LayerKV]) -> list[str]:
    numbers, expanded = (sum(getattr(layer, name) for layer in layers) for name in ("numbers", "expanded"))
    windows = [layer.window for layer in layers if layer.window]
    here, vllm = longest_here(layers), longest_by_vllm(layers)
    lasting = sum(layer.numbers for layer in layers if not layer.window)
    return [
        family,
        f"{len(layers)}" + (f", {len(windows)} with a window of {min(windows)}" if windows else ""),
        f"{numbers * BF16 / 1000:.1f}",
        f"{expanded / numbers:.1f}" if expanded != numbers else "",
        f"{1 - lasting / numbers:.0%}" if windows else "",
        f"{here / 1000:.0f}" if here else "unbounded",
        f"{vllm / 1000:.0f}" if vllm else "unbounded",
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
        "behind windows",
        "thousand tokens in 8 GB",
        "by vLLM's formula",
    )
    print(markdown(head, [row(family, layers_of(family)) for family in wanted]))


if __name__ == "__main__":
    main()
