"""A checkpoint of random weights that is as large as those that GPUs serve, made on a GPU in seconds."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.model.random_checkpoint import small_tokenizer

HIDDEN, EXPERTS, TOP_K, WIDTH, VOCAB = 2048, 64, 8, 1024, 32768
HEADS, KEY_HEADS, HEAD_SIZE = 32, 4, 128


def wide_checkpoint(out: Path, *, layers: int, device: str = "cuda") -> Path:
    """Write a Qwen3-MoE in bfloat16 of about 0.8 GB a layer into the directory `out`, and return `out`."""
    out.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator(device=device).manual_seed(0)

    def draw(*sizes: int, std: float | None = None) -> Tensor:
        numbers = torch.randn(*sizes, generator=generator, device=device, dtype=torch.bfloat16)
        return numbers * (sizes[-1] ** -0.5 if std is None else std)

    def ones(size: int) -> Tensor:
        return torch.ones(size, dtype=torch.bfloat16)

    files: dict[str, str] = {}

    def write(name: str, tensors: dict[str, Tensor]) -> None:
        save_file({key: t.cpu().clone() for key, t in tensors.items()}, out / name, metadata={"format": "pt"})
        files.update(dict.fromkeys(tensors, name))

    embedding, head = draw(VOCAB, HIDDEN, std=1.0), draw(VOCAB, HIDDEN, std=4 * HIDDEN**-0.5)
    ends = {"model.embed_tokens.weight": embedding, "model.norm.weight": ones(HIDDEN), "lm_head.weight": head}
    write("ends.safetensors", ends)
    with ThreadPoolExecutor(6) as pool:
        jobs = []
        for number in range(layers):
            at = f"model.layers.{number}"
            layer = {
                f"{at}.input_layernorm.weight": ones(HIDDEN),
                f"{at}.post_attention_layernorm.weight": ones(HIDDEN),
                f"{at}.self_attn.q_proj.weight": draw(HEADS * HEAD_SIZE, HIDDEN),
                f"{at}.self_attn.k_proj.weight": draw(KEY_HEADS * HEAD_SIZE, HIDDEN),
                f"{at}.self_attn.v_proj.weight": draw(KEY_HEADS * HEAD_SIZE, HIDDEN),
                f"{at}.self_attn.o_proj.weight": draw(HIDDEN, HEADS * HEAD_SIZE),
                f"{at}.self_attn.q_norm.weight": ones(HEAD_SIZE),
                f"{at}.self_attn.k_norm.weight": ones(HEAD_SIZE),
                f"{at}.mlp.gate.weight": draw(EXPERTS, HIDDEN, std=2 * HIDDEN**-0.5),
            }
            gate_up = draw(EXPERTS, 2 * WIDTH, HIDDEN).cpu()
            down = draw(EXPERTS, HIDDEN, WIDTH, std=2 * WIDTH**-0.5).cpu()
            for expert in range(EXPERTS):
                module = f"{at}.mlp.experts.{expert}"
                layer[f"{module}.gate_proj.weight"] = gate_up[expert, :WIDTH]
                layer[f"{module}.up_proj.weight"] = gate_up[expert, WIDTH:]
                layer[f"{module}.down_proj.weight"] = down[expert]
            jobs.append(pool.submit(write, f"layer-{number}.safetensors", layer))
        for job in jobs:
            job.result()
    index = {"metadata": {"total_size": 0}, "weight_map": files}
    (out / "model.safetensors.index.json").write_text(json.dumps(index))
    (out / "config.json").write_text(json.dumps(_config(layers), indent=1))
    small_tokenizer(512).save_pretrained(out)
    return out


def _config(layers: int) -> dict[str, object]:
    return {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "dtype": "bfloat16",
        "hidden_size": HIDDEN,
        "intermediate_size": 4 * HIDDEN,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KEY_HEADS,
        "head_dim": HEAD_SIZE,
        "num_experts": EXPERTS,
        "num_experts_per_tok": TOP_K,
        "moe_intermediate_size": WIDTH,
        "norm_topk_prob": True,
        "vocab_size": VOCAB,
        "max_position_embeddings": 40960,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 0,
    }
