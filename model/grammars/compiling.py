"""Compiles grammars within limits, and keeps compiled ones on a worker.

A grammar comes from a stranger. Its size, its compilation and each of its masks have limits in llguidance; beyond them
the request fails, and no other. The API has compiled a grammar once before the request is accepted
(deploy/text/tokenizer_process.py), so an error on a worker is a defect.
"""

from __future__ import annotations

import json
import os
import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from llguidance import LLMatcher, LLParserLimits

from elastic_moe.cluster.messages.grammars import Grammar, GrammarKind
from elastic_moe.model.grammars.finite import check_finite
from elastic_moe.model.grammars.sources import GrammarError, one_line, source
from elastic_moe.model.grammars.vocabulary import Vocabulary

LIMITS = LLParserLimits(
    # some 20 ms of work at the first compilation, and 5 ms for a mask
    initial_lexer_fuel=1_000_000,
    step_lexer_fuel=100_000,
    step_max_items=50_000,
    # of 1 to 2 kB each, in every sequence
    max_lexer_states=10_000,
    max_grammar_size=100_000,
    verbose_errors=False,
)
MAX_GRAMMARS = 64
"""Most compiled grammars that a worker keeps for requests to come."""
MAX_CHARS = 1 << 21
"""Most characters of their texts together."""
NICENESS = 5


def compile_grammar(grammar: Grammar, vocabulary: Vocabulary) -> LLMatcher:
    """A matcher that has consumed nothing. Raises GrammarError."""
    text = source(grammar, vocabulary.tokenizer)
    matcher = LLMatcher(vocabulary.tokenizer, text, log_level=0, limits=LIMITS)
    if matcher.is_error():
        raise GrammarError(one_line(matcher.get_error()))
    return matcher


def check_grammar(grammar: Grammar, vocabulary: Vocabulary) -> None:
    """Compile a grammar, and find its first tokens. Raises GrammarError where that fails or no finite text matches."""
    if grammar.kind is GrammarKind.JSON_SCHEMA:
        try:
            check_finite(json.loads(grammar.text))
        except (ValueError, RecursionError) as error:
            raise GrammarError(one_line(str(error))) from None
    matcher = compile_grammar(grammar, vocabulary)
    mask = matcher.compute_bitmask()
    if matcher.is_error():
        reason = one_line(matcher.get_error())
        raise GrammarError("no text matches it" if reason.startswith("NoExtension") else f"too complex: {reason}")
    if not any(mask):
        raise GrammarError("the model's tokens cannot write any text that matches it")


class Compiler:
    """A worker's compiled grammars. One thread with a low priority reads the vocabulary and compiles; `get` does not
    wait. Use it from one thread."""

    def __init__(self, read: Callable[[tuple[int, ...]], Vocabulary]) -> None:
        """`read` makes the vocabulary for some end-of-sequence tokens; it may raise CheckpointError."""
        self._read = read
        self._vocabularies: dict[tuple[int, ...], Vocabulary] = {}
        self._compiled: OrderedDict[tuple[Grammar, tuple[int, ...]], Future[LLMatcher]] = OrderedDict()
        self._thread: ThreadPoolExecutor | None = None

    def get(self, grammar: Grammar, eos_token_ids: tuple[int, ...]) -> Future[LLMatcher]:
        """The compiled grammar: take a deep copy of it, and change nothing. All who ask for an equal one share it."""
        key = grammar, eos_token_ids
        found = self._compiled.get(key)
        if found is None:
            if self._thread is None:
                self._thread = ThreadPoolExecutor(1, thread_name_prefix="grammars", initializer=_give_way)
            found = self._compiled[key] = self._thread.submit(self._compile, grammar, eos_token_ids)
        self._compiled.move_to_end(key)
        self._shrink()
        return found

    def __len__(self) -> int:
        return len(self._compiled)

    def _shrink(self) -> None:
        chars = sum(len(grammar.text) for grammar, _ in self._compiled)
        while len(self._compiled) > 1 and (len(self._compiled) > MAX_GRAMMARS or chars > MAX_CHARS):
            (grammar, _), _ = self._compiled.popitem(last=False)
            chars -= len(grammar.text)

    def _compile(self, grammar: Grammar, eos_token_ids: tuple[int, ...]) -> LLMatcher:
        if eos_token_ids not in self._vocabularies:
            # every request of a server names the same tokens
            self._vocabularies = {eos_token_ids: self._read(eos_token_ids)}
        return compile_grammar(grammar, self._vocabularies[eos_token_ids])


def _give_way() -> None:
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
