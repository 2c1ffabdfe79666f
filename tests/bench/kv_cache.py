"""What a token takes in the KV cache, and the longest context in 8 GB: `python -m tests.bench.kv_cache`.

Families have the sizes of transformers' default configurations, which are those of a published model for most of them.
No weight is made: the dry run by which the server decides whether it can serve a model tells what each layer keeps.
vLLM's figures come from its formula: a layer that makes keys and values of latents keeps the latents, and a layer with
a window of W tokens keeps no more than W - 1 tokens and those of one step. Here it keeps the window and two chunks of a
prompt, as model/worker/cache_room.py says. A sequence's states take the same at any length: once in vLLM, and here as
often as a running sequence may need them, because a step may have to be run again.
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
from elastic_moe.model.checkpoints.servability import LayerKV, Shape, dry_run
from elastic_moe.model.states.store import slots_per_sequence
from elastic_moe.model.transformers_private import causal_class
from elastic_moe.model.worker.cache_room import CacheSizes, WindowSizes
from tests.bench.report import markdown

ROOM_BYTES = 8 * 10**9
BF16 = 2
BLOCK = 16
STEP_TOKENS = 2048
"""Tokens of a step in vLLM, which a layer with a window keeps besides the window."""
MOST_TOKENS = 1 << 40
_KINDS = {"L": "linear_attention", "F": "full_attention", "C": "conv", "E": "moe"}


def _kinds(pattern: str) -> list[str]:
    """The kind of each layer."""
    return [_KINDS[letter] for letter in pattern]


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
    "granitemoeshared": {"num_local_experts": 32, "shared_intermediate_size": 1024},
    "axk1": {},
    "qwen3_next": {},
    "qwen3_5_moe_text": {},
    "kimi_linear": {},
    "granitemoehybrid": {
        "num_hidden_layers": 40,
        "num_key_value_heads": 8,
        "num_local_experts": 72,
        "num_experts_per_tok": 10,
        "mamba_d_state": 128,
        "layer_types": _kinds("LLLLLFLLLL" * 4),
    },
    "nemotron_h": {
        "hidden_size": 2688,
        "num_key_value_heads": 2,
        "mamba_num_heads": 64,
        "n_routed_experts": 128,
        "num_experts_per_tok": 6,
        "moe_intermediate_size": 1856,
        "layers_block_type": _kinds("LELELFELELELFELELELFELELELFELELELFELELELELFELELELELE"),
    },
    "jamba": {},
    "minimax": {
        "hidden_size": 6144,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "head_dim": 128,
        "num_local_experts": 32,
        "layer_types": _kinds("LLLLLLLF" * 10),
    },
    "lfm2_moe": {"num_hidden_layers": 24, "layer_types": _kinds("CCFCCCFCCCFCCCFCCCFCCFCC")},
}
"""Family -> fields that its default configuration lacks to be a published model with experts."""


def shape_of(family: str) -> Shape:
    """What the layers of a family keep of a token, and of a sequence."""
    with quiet_transformers(), torch.device("meta"):
        config = AutoConfig.for_model(family, **FAMILIES[family])
        kind: Any = causal_class(config)
        model = kind._from_config(
            config, dtype=torch.bfloat16, attn_implementation="eager", experts_implementation="eager"
        ).eval()
    return dry_run(model)


def one_sequence(layers: Sequence[LayerKV], tokens: int, state_bytes: int = 0) -> int:
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
    sizes = CacheSizes(
        block_bytes=(sum(layer.numbers for layer in layers) - apart) * BF16 * BLOCK,
        blocks_per_sequence=-(-tokens // BLOCK),
        max_num_seqs=1,
        windows=windows if short else None,
        state_bytes=state_bytes,
        states_per_sequence=slots_per_sequence(STEPS_IN_FLIGHT),
    )
    return sizes.one + sizes.seat_bytes


def longest_here(layers: Sequence[LayerKV], state_bytes: int = 0) -> int:
    """The tokens of one sequence that fit ROOM_BYTES here; 0: any number."""
    tokens = range(0, MOST_TOKENS, BLOCK)
    found = bisect_right(tokens, ROOM_BYTES, key=lambda n: one_sequence(layers, n, state_bytes))
    return 0 if found == len(tokens) else tokens[found - 1]


def longest_by_vllm(layers: Sequence[LayerKV], state_bytes: int = 0) -> int:
    """The tokens of one sequence that fit ROOM_BYTES by vLLM's formula; 0: any number."""
    steps = sorted((layer.window + STEP_TOKENS - 1, layer.numbers * BF16) for layer in layers if layer.window)
    room, token = float(ROOM_BYTES - state_bytes), sum(layer.numbers for layer in layers) * BF16
    for kept, nbytes in steps:
        if room / token <= kept:
            break
        room, token = room - kept * nbytes, token - nbytes
    return int(room // token) if token else 0


def row(family: str, layers: Sequence[LayerKV], state_bytes: int = 0) -> list[str]:
    numbers, expanded = (sum(getattr(layer, name) for layer in layers) for name in ("numbers", "expanded"))
    windows = [layer.window for layer in layers if layer.window]
    here, vllm = longest_here(layers, state_bytes), longest_by_vllm(layers, state_bytes)
    lasting = sum(layer.numbers for layer in layers if not layer.window)
    return [
        family,
        f"{len(layers)}" + (f", {len(windows)} with a window of {min(windows)}" if windows else ""),
        f"{numbers * BF16 / 1000:.1f}",
        f"{expanded / numbers:.1f}" if expanded != numbers else "",
        f"{1 - lasting / numbers:.0%}" if windows else "",
        f"{state_bytes / 1e6:.1f}" if state_bytes else "",
        f"{here / 1000:.0f}" if here else "unbounded",
        f"{vllm / 1000:.0f}" if vllm else "unbounded",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description="KV bytes per token, and the longest context in 8 GB.")
    parser.add_argument("families", nargs="*", choices=[[], *FAMILIES], default=[])
    wanted = parser.parse_args().families or list(FAMILIES)
    shapes = {family: shape_of(family) for family in wanted}
    head = (
        "family",
        "attention layers",
        "kB per token",
        "times that, expanded",
        "behind windows",
        "MB of states",
        "thousand tokens in 8 GB",
        "by vLLM's formula",
    )
    print(markdown(head, [row(family, shape.kv, shape.state_bytes) for family, shape in shapes.items()]))


if __name__ == "__main__":
    main()
