"""Rotary embeddings that depend on a sequence's length: short and long sequences in one batch, against transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from elastic_moe.model.checkpoints.checkpoint import open_checkpoint
from elastic_moe.model.checkpoints.quiet import quiet_transformers
from tests.model.lockstep import Lockstep, request
from tests.model.random_checkpoint import make_random_checkpoint

ORIGINAL = 24
SIZES: dict[str, Any] = {"hidden": 64, "layers": 2, "experts": 4, "top_k": 2, "ff": 32, "vocab": 300}


def dynamic(factor: float = 8.0) -> dict[str, Any]:
    return {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": factor}


def checkpoint(where: Path, family: str, **fields: Any) -> Path:
    return make_random_checkpoint(where / family, family, **SIZES, max_position_embeddings=ORIGINAL, **fields)


def alone(path: Path, prompt: list[int], tokens: int) -> list[int]:
    """transformers' greedy answer by a model that has run nothing else."""
    with quiet_transformers(), torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
        ).eval()
        out = model.generate(
            torch.tensor([prompt]), max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, eos_token_id=None
        )
    return list(out[0, len(prompt) :].tolist())


def prompts(lengths: tuple[int, ...]) -> list[list[int]]:
    g = torch.Generator().manual_seed(3)
    return [torch.randint(3, 300, (n,), generator=g).tolist() for n in lengths]


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
def test_dynamic_ntk_for_short_and_long_requests_in_one_batch(family: str, tmp_path: Path) -> None:
    """Some stay short, one grows past the original length, others begin beyond it: none changes another."""
    path = checkpoint(tmp_path, family, rope_parameters=dynamic())
    texts = prompts((5, 20, 40, 90))
    cluster = Lockstep(path, [2, 2], max_num_batched_tokens=32)
    assert open_checkpoint(path).info.max_model_len == ORIGINAL * 8
    got = cluster.run([request(f"r{n}", text, max_tokens=16) for n, text in enumerate(texts)])
    expected = [alone(path, text, 16) for text in texts]
    assert list(got.values()) == expected
    # what changed the tokens of the long ones is the scaling
    plain = checkpoint(tmp_path / "plain", family, rope_parameters=dynamic(factor=1.0))
    assert [alone(plain, text, 16) == answer for text, answer in zip(texts, expected, strict=True)][-1] is False


def test_dynamic_ntk_when_answers_are_computed_again(tmp_path: Path) -> None:
    """A cache that is too small: requests are preempted, and their answers run again as one chunk."""
    path = checkpoint(tmp_path, "qwen3_moe", rope_parameters=dynamic())
    texts = prompts((5, 20, 40, 30))
    cluster = Lockstep(path, [4], kv_blocks=26)
    got = cluster.run([request(f"r{n}", text, max_tokens=30) for n, text in enumerate(texts)])
    assert cluster.scheduler.status().preemptions > 0
    assert list(got.values()) == [alone(path, text, 30) for text in texts]


def test_longrope_for_short_and_long_requests_in_one_batch(tmp_path: Path) -> None:
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "short_factor": [1.0, 1.0, 1.1, 1.2, 1.3, 1.5, 1.7, 2.0],
        "long_factor": [1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0],
        "short_mscale": 1.1,
        "long_mscale": 1.3,
        "original_max_position_embeddings": ORIGINAL,
    }
    sizes = SIZES | {"max_position_embeddings": 8 * ORIGINAL, "original_max_position_embeddings": ORIGINAL}
    path = make_random_checkpoint(tmp_path / "phimoe", "phimoe", **sizes, rope_parameters=rope)
    texts = prompts((5, 40, 12, 90))
    got = Lockstep(path, [2, 2]).run([request(f"r{n}", text, max_tokens=10) for n, text in enumerate(texts)])
    assert list(got.values()) == [alone(path, text, 10) for text in texts]


HALF_HEAD = 8
LONG_FACTORS = [1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0]
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "default": ("qwen3_moe", {}),
    "linear": ("qwen3_moe", {"factor": 4.0}),
    "dynamic": ("qwen3_moe", {"factor": 4.0}),
    "yarn": ("qwen3_moe", {"factor": 4.0, "original_max_position_embeddings": ORIGINAL}),
    "longrope": (
        "qwen3_moe",
        {
            "factor": 4.0,
            "short_factor": [1.0] * HALF_HEAD,
            "long_factor": LONG_FACTORS,
            "original_max_position_embeddings": ORIGINAL,
        },
    ),
    "llama3": (
        "qwen3_moe",
        {
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": ORIGINAL,
        },
    ),
    "proportional": ("qwen3_moe", {"partial_rotary_factor": 0.5}),
}
"""Kind of rotary embedding -> a family, and the parameters of the kind."""


def test_every_kind_of_transformers_is_tried() -> None:
    assert set(KINDS) == {"default", *ROPE_INIT_FUNCTIONS}


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_for_short_and_long_requests_in_one_batch(kind: str, tmp_path: Path) -> None:
    """Of three requests, one is longer than the original length from the start, and one becomes so."""
    family, parameters = KINDS[kind]
    rope = {"rope_type": kind, "rope_theta": 10000.0, **parameters}
    sizes = SIZES | {"max_position_embeddings": ORIGINAL if kind == "dynamic" else 4 * ORIGINAL}
    path = make_random_checkpoint(tmp_path / kind, family, **sizes, rope_parameters=rope)
    texts = prompts((5, ORIGINAL - 4, 40))
    got = Lockstep(path, [4]).run([request(f"r{n}", text, max_tokens=8) for n, text in enumerate(texts)])
    assert list(got.values()) == [alone(path, text, 8) for text in texts]


def test_a_fixed_scaling_that_is_called_dynamic_does_not_grow(tmp_path: Path) -> None:
    """Hunyuan's checkpoints say dynamic and give an alpha."""
    path = checkpoint(tmp_path, "hunyuan_v1_moe", rope_parameters=dynamic(1.0) | {"alpha": 1000.0})
    assert open_checkpoint(path).info.rope_growth_limit is None
    path = checkpoint(tmp_path, "qwen3_moe", rope_parameters=dynamic())
    assert open_checkpoint(path).info.rope_growth_limit == ORIGINAL
