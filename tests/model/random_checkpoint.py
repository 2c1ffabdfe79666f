"""Random-weight checkpoints in Hugging Face layout, for tests and measurements.

Configuration, tensor names, tokenizer and chat template are those that a real checkpoint of the family has, since
transformers itself writes them. The text that such a model makes is noise, but its logits are well apart: weights are
scaled such that attention, every expert and the router matter, and that the best two tokens differ clearly. So greedy
decoding can be compared token by token between two implementations. The same seed gives the same bytes.
"""

from __future__ import annotations

import itertools
import sysconfig
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModelForMultimodalLM,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from elastic_moe.model.checkpoints.quiet import quiet_transformers
from elastic_moe.model.transformers_private import causal_class

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
EOS_TOKEN_ID = 0
"""<|endoftext|>. Generation also ends at <|im_end|>, number 2."""
LOGIT_STD = 4.0
"""Of random logits. The best of some thousand tokens is then about 1 ahead of the next."""

_SEED_BYTES = 400_000
"""Text that the tokenizer learns its merges from."""


def make_random_checkpoint(
    out: Path,
    family: str = "qwen3_moe",
    *,
    hidden: int = 64,
    layers: int = 4,
    experts: int = 8,
    top_k: int = 2,
    ff: int = 64,
    vocab: int = 512,
    dtype: str = "float32",
    seed: int = 0,
    max_shard_size: str = "50GB",
    **config_fields: Any,
) -> Path:
    """Write a checkpoint of transformers' model type `family` into the directory `out`, and return `out`.

    `ff` is the width of one expert. `config_fields` go to the configuration and win over everything else.
    Raises ValueError where transformers does not know the family.
    """
    tokenizer = small_tokenizer(vocab)
    fields = family_fields(family, hidden=hidden, layers=layers, experts=experts, top_k=top_k, ff=ff)
    out.mkdir(parents=True, exist_ok=True)
    with quiet_transformers():
        # what a family does not know would be written too, and other servers would believe that it means something
        known = {*AutoConfig.for_model(family).to_dict(), *type(AutoConfig.for_model(family)).attribute_map}
        fields = {name: value for name, value in fields.items() if name in known}
        config = AutoConfig.for_model(family, **(fields | {"vocab_size": len(tokenizer)} | config_fields))
        config.dtype = getattr(torch, dtype)
        kind: Any = causal_class(config)
        model: PreTrainedModel = kind._from_config(config, dtype=config.dtype)
        _randomise(model, torch.Generator().manual_seed(seed))
        model.generation_config = _generation_config(config)
        model.save_pretrained(out, max_shard_size=max_shard_size)
    tokenizer.save_pretrained(out)
    return out


def wrap_random_checkpoint(text: Path, out: Path, family: str, *, seed: int = 0, **parts: Any) -> Path:
    """Write a checkpoint of `family`, which takes more input than text, into the directory `out`, and return `out`.

    Its text part has the configuration of the checkpoint in the directory `text`. `parts` go to the configuration, such
    as that of its vision part.
    """
    with quiet_transformers():
        config = AutoConfig.for_model(family, text_config=AutoConfig.from_pretrained(text).to_dict(), **parts)
        config.dtype = torch.float32
        model = AutoModelForMultimodalLM.from_config(config, dtype=config.dtype)  # type: ignore[no-untyped-call]
        _randomise(model, torch.Generator().manual_seed(seed))
        model.generation_config = _generation_config(config.text_config)
        model.save_pretrained(out)
        small_tokenizer(config.text_config.vocab_size).save_pretrained(out)
    return out


def family_fields(family: str, *, hidden: int, layers: int, experts: int, top_k: int, ff: int) -> dict[str, Any]:
    """Configuration fields of a small model of `family`, in that family's own words."""
    heads = max(4, hidden // 64)
    fields: dict[str, Any] = {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads // 2,
        "intermediate_size": 2 * hidden,
        "max_position_embeddings": 4096,
        "num_experts_per_tok": top_k,
        "tie_word_embeddings": False,
        "bos_token_id": EOS_TOKEN_ID,
        "eos_token_id": EOS_TOKEN_ID,
        "pad_token_id": EOS_TOKEN_ID,
    }
    own: Callable[..., dict[str, Any]] = _OWN_FIELDS.get(family, _common_fields)
    return fields | own(hidden=hidden, heads=heads, layers=layers, experts=experts, top_k=top_k, ff=ff)


# --- What each family calls its dimensions, and what sets it apart ------------------------------------------------


def _qwen_fields(*, hidden: int, heads: int, experts: int, ff: int, **_: int) -> dict[str, Any]:
    return {
        "moe_intermediate_size": ff,
        "num_experts": experts,
        "norm_topk_prob": True,
        "head_dim": hidden // heads,
        "shared_expert_intermediate_size": 2 * ff,
    }


def _common_fields(*, hidden: int, heads: int, experts: int, ff: int, **_: int) -> dict[str, Any]:
    """For families not listed: every name in use for these dimensions. Those unknown to the family are dropped."""
    names = dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), experts)
    widths = {"moe_intermediate_size": ff, "shared_intermediate_size": ff, "shared_expert_intermediate_size": ff}
    shared = {"n_shared_experts": 1, "num_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 2, "topk_group": 1}
    return names | widths | shared | {"head_dim": hidden // heads, "sliding_window": 8}


def _gemma_fields(*, top_k: int, **sizes: int) -> dict[str, Any]:
    moe = {"enable_moe_block": True, "top_k_experts": top_k, "tie_word_embeddings": True}
    return _common_fields(**sizes) | moe | {"final_logit_softcapping": 8.0, "hidden_size_per_layer_input": 0}


def _granite_hybrid_fields(**sizes: int) -> dict[str, Any]:
    return _granite_fields(**sizes) | {"layer_types": ["attention"] * sizes["layers"]}


def _mixtral_fields(*, experts: int, ff: int, **_: int) -> dict[str, Any]:
    return {"intermediate_size": ff, "num_local_experts": experts}


def _minimax_m2_fields(*, hidden: int, heads: int, experts: int, ff: int, **_: int) -> dict[str, Any]:
    return {"intermediate_size": ff, "num_local_experts": experts, "head_dim": hidden // heads}


def _olmoe_fields(*, experts: int, ff: int, **_: int) -> dict[str, Any]:
    return {"intermediate_size": ff, "num_experts": experts}


def _granite_fields(*, hidden: int, heads: int, experts: int, ff: int, **_: int) -> dict[str, Any]:
    multipliers = {
        "embedding_multiplier": 2.0,
        "logits_scaling": 1.5,
        "residual_multiplier": 0.7,
        "attention_multiplier": (hidden // heads) ** -0.5 * 1.2,
    }
    return {"intermediate_size": ff, "num_local_experts": experts, "shared_intermediate_size": 2 * ff} | multipliers


def _gpt_oss_fields(*, hidden: int, heads: int, experts: int, ff: int, **_: int) -> dict[str, Any]:
    # Every second layer sees 8 tokens only: short prompts already tell a window from none.
    yarn = {"rope_type": "yarn", "rope_theta": 150000.0, "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0}
    return {
        "intermediate_size": ff,
        "num_local_experts": experts,
        "head_dim": hidden // heads,
        "sliding_window": 8,
        "rope_parameters": yarn | {"truncate": False, "original_max_position_embeddings": 128},
    }


def _deepseek_fields(*, hidden: int, heads: int, experts: int, ff: int, **_: int) -> dict[str, Any]:
    return {
        "num_key_value_heads": heads,
        "moe_intermediate_size": ff,
        "n_routed_experts": experts,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "n_group": 2,
        "topk_group": 1,
        "kv_lora_rank": hidden // 2,
        "q_lora_rank": hidden // 2,
        "qk_nope_head_dim": hidden // heads,
        "qk_rope_head_dim": max(8, hidden // heads // 2),
        "v_head_dim": hidden // heads,
    }


def _sparse_fields(**sizes: int) -> dict[str, Any]:
    """With 8 chosen keys, short prompts already tell a choice from none. With few heads, many scores would be 0 and
    equal.
    """
    indexer = {"index_topk": 8, "index_n_heads": 32, "index_head_dim": 16}
    layers = {"mlp_layer_types": ["dense"] + ["sparse"] * (sizes["layers"] - 1)}
    return _deepseek_fields(**sizes) | layers | indexer


def _glm_sparse_fields(**sizes: int) -> dict[str, Any]:
    """Every second layer takes the choice of the one before."""
    return _sparse_fields(**sizes) | {"indexer_types": (["full", "shared"] * sizes["layers"])[: sizes["layers"]]}


def _deepseek_v2_fields(**sizes: int) -> dict[str, Any]:
    return _deepseek_fields(**sizes) | {"topk_method": "group_limited_greedy", "routed_scaling_factor": 1.5}


def _glm_fields(*, hidden: int, heads: int, experts: int, ff: int, **_: int) -> dict[str, Any]:
    return {
        "moe_intermediate_size": ff,
        "n_routed_experts": experts,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "head_dim": hidden // heads,
        "use_qk_norm": True,
        "attention_bias": True,
    }


def _dots_fields(**sizes: int) -> dict[str, Any]:
    return _glm_fields(**sizes) | {"attention_bias": False, "sliding_window": 8, "max_window_layers": 1}


def _phimoe_fields(*, experts: int, ff: int, **_: int) -> dict[str, Any]:
    return {"intermediate_size": ff, "num_local_experts": experts, "attention_bias": True, "lm_head_bias": True}


def _ernie_fields(*, experts: int, top_k: int, ff: int, **_: int) -> dict[str, Any]:
    return {
        "moe_intermediate_size": ff,
        "moe_num_experts": experts,
        "moe_k": top_k,
        "moe_num_shared_experts": 1,
        "moe_layer_start_index": 1,
        "moe_layer_end_index": -1,
        "tie_word_embeddings": True,
    }


def _hunyuan_fields(*, hidden: int, heads: int, experts: int, top_k: int, ff: int, **_: int) -> dict[str, Any]:
    return {"intermediate_size": ff, "num_experts": experts, "moe_topk": top_k, "head_dim": hidden // heads}


_OWN_FIELDS: dict[str, Callable[..., dict[str, Any]]] = {
    "axk1": _deepseek_fields,
    "deepseek_v2": _deepseek_v2_fields,
    "deepseek_v3": _deepseek_fields,
    "deepseek_v32": _sparse_fields,
    "dots1": _dots_fields,
    "ernie4_5_moe": _ernie_fields,
    "flex_olmo": _olmoe_fields,
    "gemma4_text": _gemma_fields,
    "glm4_moe": _glm_fields,
    "glm4_moe_lite": _deepseek_fields,
    "glm_moe_dsa": _glm_sparse_fields,
    "gpt_oss": _gpt_oss_fields,
    "granitemoe": _granite_fields,
    "granitemoe_swa": _granite_fields,
    "granitemoehybrid": _granite_hybrid_fields,
    "granitemoeshared": _granite_fields,
    "hunyuan_v1_moe": _hunyuan_fields,
    "mistral4": _deepseek_fields,
    "minimax_m2": _minimax_m2_fields,
    "mixtral": _mixtral_fields,
    "olmoe": _olmoe_fields,
    "phimoe": _phimoe_fields,
    "qwen2_moe": _qwen_fields,
    "qwen3_moe": _qwen_fields,
}


# --- Weights --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def _randomise(model: PreTrainedModel, generator: torch.Generator) -> None:
    """Draw every weight anew. Matrices keep the size of what passes through them; the residual grows layer by layer."""
    head = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    embedding = model.get_input_embeddings()
    transposed = {id(p) for m in model.modules() if getattr(m, "is_transposed", False) for p in m.parameters()}
    states = model.state_dict()
    for name, value in itertools.chain(model.named_parameters(), model.named_buffers()):
        if name not in states:
            continue  # rope frequencies and other constants
        noise = torch.randn(value.shape, generator=generator)
        if value is head.weight or value is embedding.weight:
            scale = LOGIT_STD / value.shape[-1] ** 0.5 if value is head.weight else 1.0
            noise *= scale
            # Special tokens hardly ever come up, so that a generation does not end at once.
            noise[: len(SPECIAL_TOKENS)] *= 0.02
        elif value.dim() >= 2:
            fan_in = value.shape[-2] if id(value) in transposed and value.dim() == 3 else value.shape[-1]
            noise *= 1.5 / fan_in**0.5
        elif name.endswith("norm.weight") or "norm" in name.split(".")[-2]:
            noise = 1.0 + 0.1 * noise if name.endswith("weight") else 0.1 * noise
        else:
            noise *= 0.2  # biases, sinks, corrections of the router's choice
        value.copy_(noise.to(value.dtype))


def _generation_config(config: Any) -> GenerationConfig:
    eos = config.eos_token_id
    return GenerationConfig(  # type: ignore[no-untyped-call]
        bos_token_id=config.bos_token_id,
        eos_token_id=[eos, SPECIAL_TOKENS.index("<|im_end|>")] if eos == EOS_TOKEN_ID else eos,
        pad_token_id=config.pad_token_id,
    )


# --- Tokenizer ------------------------------------------------------------------------------------------------------


def small_tokenizer(vocab: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of at most `vocab` tokens: 3 special ones, the 256 bytes, and merges.

    Every text survives encoding and decoding. Raises ValueError for less than 259 tokens.
    """
    if vocab < len(SPECIAL_TOKENS) + 256:
        raise ValueError(f"vocab: {vocab} is too small, a byte-level tokenizer needs {len(SPECIAL_TOKENS) + 256}")
    tokenizer = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=Tokenizer.from_str(_trained_bpe(vocab)), eos_token="<|endoftext|>", pad_token="<|endoftext|>"
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


@cache
def _trained_bpe(vocab: int) -> str:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(_sample_text(), trainer)
    return str(bpe.to_str())


def _sample_text() -> Iterator[str]:
    """Text that every machine has: the standard library's own sources."""
    size = 0
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        if size > _SEED_BYTES:
            return
        text = path.read_text(encoding="utf-8", errors="replace")
        size += len(text)
        yield text
