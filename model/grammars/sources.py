"""Writes a request's grammar in llguidance's language."""

from __future__ import annotations

import json

from llguidance import LLMatcher, LLTokenizer, grammar_from

from elastic_moe.cluster.messages.grammars import Grammar, GrammarKind
from elastic_moe.model.grammars.structural_tags import tags_source


class GrammarError(ValueError):
    """A grammar that cannot be compiled, or that is too complex. One line says why."""


def source(grammar: Grammar, tokenizer: LLTokenizer) -> str:
    """llguidance's text of a grammar. Raises GrammarError for some faults; the compiler finds the rest."""
    try:
        match grammar.kind:
            case GrammarKind.JSON_SCHEMA:
                return LLMatcher.grammar_from_json_schema(grammar.text)
            case GrammarKind.REGEX:
                return LLMatcher.grammar_from_regex(grammar.text)
            case GrammarKind.CHOICE:
                # each choice is ASCII with escapes, which are the same in Lark
                return grammar_from("choice", grammar.text)
            case GrammarKind.EBNF:
                return grammar_from("ebnf", grammar.text)
            case GrammarKind.STRUCTURAL_TAG:
                return tags_source(json.loads(grammar.text), tokenizer)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise GrammarError(one_line(str(error) or type(error).__name__)) from None


def one_line(text: str) -> str:
    # llguidance's errors may go on with the state of its parser
    return " ".join(text.partition("<state>")[0].partition("<non-verbose/>")[0].split())[:300]
