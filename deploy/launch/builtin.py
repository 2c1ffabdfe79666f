"""The built-in model, which is served when the user names none, and its routing traces. Both come with the package; the
README.md beside the model says how it was made."""

from __future__ import annotations

import argparse
from pathlib import Path

from elastic_moe.cluster.messages.epochs import ModelInfo
from elastic_moe.cluster.setting import path_flag

NOTICE = "No model directory was given: serving the built-in model, which writes well-formed nonsense."
"""The line that a user of the built-in model reads at the start."""

MODEL_DIR = Path(__file__).parents[1] / "models" / "emoe-mini"
"""The directory of the model, in Hugging Face layout."""

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
    matrix_bytes=1179648,
    kv_layers=((128, None),) * 6,
)
"""What `open_checkpoint` would return for the model. It stands here because that call takes five seconds of imports."""

_PREFIX = "builtin:"


def trace_names() -> tuple[str, ...]:
    """The subjects of the texts on which the routing of the built-in model was recorded."""
    return tuple(sorted(path.stem for path in (MODEL_DIR / "traces").glob("*.npz")))


def trace_path(text: str) -> Path:
    """The file of a trace that a user names by its path or by `builtin:SUBJECT`.

    Raises argparse.ArgumentTypeError for an unknown subject.
    """
    if not text.startswith(_PREFIX):
        return path_flag(text)
    name = text.removeprefix(_PREFIX)
    if name not in trace_names():
        known = ", ".join(_PREFIX + name for name in trace_names())
        raise argparse.ArgumentTypeError(f"{text}: there is no such trace; the built-in traces are {known}")
    return MODEL_DIR / "traces" / f"{name}.npz"
