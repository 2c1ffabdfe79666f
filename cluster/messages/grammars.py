"""What an answer must look like: a part of SamplingParams, from the API through the engine to the workers' sampling."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class GrammarKind(StrEnum):
    JSON_SCHEMA = "json_schema"
    """The text is a JSON schema. Its key "x-guidance" holds llguidance's options, such as whitespace_flexible."""
    REGEX = "regex"
    """The text is a regular expression of the Rust crate `regex`. The whole answer must match it."""
    CHOICE = "choice"
    """The text is a JSON list of strings, of which the answer is one."""
    EBNF = "ebnf"
    """The text is a grammar in llguidance's form of Lark, with %json {schema} in rules, or in llama.cpp's GBNF."""
    STRUCTURAL_TAG = "structural_tag"
    """The text is the JSON object of vLLM's structural tags: free text with parts that must match a schema."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Grammar:
    """Requests with an equal grammar share one compiled grammar on a worker."""

    kind: GrammarKind
    text: str
