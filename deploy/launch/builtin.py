"""The model that is served when none is given, and its routing traces. Both come with the package; its README.md
says what it is made of."""

from __future__ import annotations

import argparse
from pathlib import Path

from elastic_moe.cluster.messages.epochs import ModelInfo

NOTICE = "No model directory was given: serving the built-in model, which writes well-formed nonsense."
"""What a user of the built-in model must be told."""

MODEL_DIR = Path(__file__).parents[1] / "models" / "emoe-mini"
"""In Hugging Face layout."""

MODEL = ModelInfo(
    architecture="Qwen3MoeForCausalLM",
    num_layers=6,
    num_logical_experts=16,
    top_k=2,
    hidden_size=128,
    vocab_size=3072,
    max_model_len=1024,
    expert_bytes=73728,
    trunk_bytes=1404928,
    eos_token_ids=(0,),
    dtype="bfloat16",
)
"""What opening it tells, which takes five seconds of imports."""

_PREFIX = "builtin:"


def trace_names() -> tuple[str, ...]:
    """Subjects of the text that the built-in model's routing was recorded on."""
    return tuple(sorted(path.stem for path in (MODEL_DIR / "traces").glob("*.npz")))


def trace_path(text: str) -> Path:
    """A trace as a user names it: a file, or `builtin:SUBJECT`. Raises what argparse wants for an unknown subject."""
    if not text.startswith(_PREFIX):
        return Path(text)
    name = text.removeprefix(_PREFIX)
    if name not in trace_names():
        known = ", ".join(_PREFIX + name for name in trace_names())
        raise argparse.ArgumentTypeError(f"{text}: no such trace, there are {known}")
    return MODEL_DIR / "traces" / f"{name}.npz"
