"""The model's tokens, as llguidance needs them: their bytes, and which of them are special or end an answer."""

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
    width: int
    """Number of logits. Ids from the tokenizer's number of tokens on are padding, which no grammar allows."""


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
    """Make it of the content of tokenizer.json. It takes up to a second for a large one.

    `width` is the number of logits; by default the number of tokens. The tokens `eos_token_ids` end an answer; without
    any, one that llguidance finds. Raises CheckpointError where llguidance cannot use the tokenizer.
    """
    try:
        tokenizer = _load(text, width, list(eos_token_ids))
    except Exception as error:  # noqa: BLE001 - llguidance raises whatever its parsers raise
        message = " ".join(str(error).split())[:300]
        raise CheckpointError(f"structured output cannot use this model's {FILE}: {message}") from None
    return Vocabulary(tokenizer=tokenizer, width=tokenizer.vocab_size if width is None else width)


def _load(text: str, width: int | None, ends: list[int]) -> LLTokenizer:
    try:
        return LLTokenizer(text, n_vocab=width, eos_token=ends or None)
    except ValueError:
        # some tokenizers have more tokens than their model has logits, and some models end with tokens that the
        # tokenizer does not have
        size = LLTokenizer(text).vocab_size
        ends = [token_id for token_id in ends if token_id < size]
        return LLTokenizer(text, n_vocab=max(size, width or 0), eos_token=ends or None)
