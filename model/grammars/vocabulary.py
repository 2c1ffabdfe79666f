"""The model's tokens, as llguidance needs them: their bytes, and which of them are special."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from llguidance import LLTokenizer

from elastic_moe.cluster.errors import CheckpointError

FILE = "tokenizer.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Vocabulary:
    tokenizer: LLTokenizer
    end: int
    """The token that stands for the end of an answer in masks."""


def read_vocabulary(model_dir: str, *, width: int | None = None, eos_token_ids: Sequence[int] = ()) -> Vocabulary:
    """The vocabulary of a model directory; see `make_vocabulary`. Raises CheckpointError where there is no file."""
    text = tokenizer_json(model_dir)
    if text is None:
        raise CheckpointError(f"{model_dir}: there is no readable {FILE}, which structured output needs")
    return make_vocabulary(text, width=width, eos_token_ids=eos_token_ids)


def tokenizer_json(model_dir: str) -> str | None:
    """The content of tokenizer.json; None where there is no such file."""
    try:
        return (Path(model_dir) / FILE).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None


def make_vocabulary(text: str, *, width: int | None = None, eos_token_ids: Sequence[int] = ()) -> Vocabulary:
    """Make it of the content of tokenizer.json. For 100,000 tokens it takes a second, in which no other thread runs.

    `width` is the number of logits; by default the number of tokens. Masks have at least so many bits, and those of
    padding are never set. Raises CheckpointError where llguidance cannot use the tokenizer.
    """
    try:
        tokenizer = _load(text, width, eos_token_ids)
    except Exception as error:  # noqa: BLE001 - llguidance raises whatever its parsers raise
        message = " ".join(str(error).split())[:300]
        raise CheckpointError(f"structured output cannot use this model's {FILE}: {message}") from None
    return Vocabulary(tokenizer=tokenizer, end=tokenizer.eos_token)


def _load(text: str, width: int | None, eos_token_ids: Sequence[int]) -> LLTokenizer:
    # without a token that ends answers in the file, any one can stand for it
    ends: list[int | None] = [*eos_token_ids[:1], None, 0]
    for end in ends[:-1]:
        for size in dict.fromkeys([width, None]):
            try:
                return LLTokenizer(text, n_vocab=size, eos_token=end)
            except ValueError:
                # some tokenizers have more tokens than their model has logits; some models end with an unknown token
                continue
    return LLTokenizer(text, eos_token=ends[-1])
