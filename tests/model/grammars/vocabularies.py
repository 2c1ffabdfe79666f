"""The built-in model's tokens, and what a grammar allows, for tests."""

from __future__ import annotations

import json
from concurrent.futures import Future
from functools import cache
from typing import Any

import numpy as np

from elastic_moe.cluster.messages.grammars import Grammar, GrammarKind
from elastic_moe.model.grammars.compiling import Compiled, compile_grammar
from elastic_moe.model.grammars.progress import Mask
from elastic_moe.model.grammars.vocabulary import Vocabulary, read_vocabulary
from tests.paths import ROOT

BUILTIN = str(ROOT / "deploy" / "models" / "emoe-mini")
EOS = 0
WIDTH = 3072


@cache
def vocabulary() -> Vocabulary:
    return read_vocabulary(BUILTIN, width=WIDTH, eos_token_ids=(EOS,))


def grammar(kind: GrammarKind, what: Any) -> Grammar:
    return Grammar(kind=kind, text=what if isinstance(what, str) else json.dumps(what))


def compiled(wanted: Grammar) -> Future[Compiled]:
    future: Future[Compiled] = Future()
    future.set_result(Compiled(matcher=compile_grammar(wanted, vocabulary()), end=EOS))
    return future


def encode(text: str) -> list[int]:
    return vocabulary().tokenizer.tokenize_str(text)


def allowed(mask: Mask) -> set[int]:
    return set(np.nonzero(np.unpackbits(mask, bitorder="little"))[0].tolist())


def matches(wanted: Grammar, text: str) -> bool:
    """Whether the whole text follows the grammar."""
    matcher = compile_grammar(wanted, vocabulary())
    tokens = encode(text)
    return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()
