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
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from llguidance import LLMatcher, LLParserLimits

from elastic_moe.cluster.errors import CheckpointError
from elastic_moe.cluster.messages.grammars import Grammar, GrammarKind
from elastic_moe.model.grammars.finite import check_finite
from elastic_moe.model.grammars.ranges import check_ranges
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
TRIED_TOKENS = 8
"""Tokens of a text that are tried before a grammar is accepted: some grammars grow too large only after the first."""


def compile_grammar(grammar: Grammar, vocabulary: Vocabulary) -> LLMatcher:
    """A matcher that has consumed nothing. Raises GrammarError."""
    text = source(grammar, vocabulary.tokenizer)
    matcher = LLMatcher(vocabulary.tokenizer, text, log_level=0, limits=LIMITS)
    if matcher.is_error():
        raise GrammarError(one_line(matcher.get_error()))
    return matcher


def check_grammar(grammar: Grammar, vocabulary: Vocabulary) -> None:
    """Compile a grammar, and write the beginning of a text that follows it.

    Raises GrammarError where that fails, or no finite text follows it.
    """
    if grammar.kind is GrammarKind.JSON_SCHEMA:
        try:
            schema = json.loads(grammar.text)
            check_finite(schema)
            check_ranges(schema)
        except (ValueError, RecursionError) as error:
            raise GrammarError(one_line(str(error))) from None
    matcher = compile_grammar(grammar, vocabulary)
    for _ in range(TRIED_TOKENS):
        mask = np.unpackbits(np.frombuffer(matcher.compute_bitmask(), dtype=np.uint8), bitorder="little")
        if matcher.is_error():
            reason = one_line(matcher.get_error())
            raise GrammarError("no text follows it" if reason.startswith("NoExtension") else f"too complex: {reason}")
        allowed = np.flatnonzero(mask)
        if not len(allowed):
            raise GrammarError("the model's tokens cannot write any text that follows it")
        # which one does not matter
        token = int(allowed[len(allowed) // 2])
        if matcher.is_stopped() or token == vocabulary.end or not matcher.try_consume_tokens([token]):
            if matcher.is_error():
                raise GrammarError(f"too complex: {one_line(matcher.get_error())}")
            return


@dataclass(frozen=True, slots=True, kw_only=True)
class Compiled:
    """A compiled grammar: take a deep copy of the matcher, and change nothing."""

    matcher: LLMatcher
    end: int
    """The token that ends an answer, as in Vocabulary."""


class Compiler:
    """The compiled grammars of a worker. Use it from one thread: another one, with a low priority, compiles."""

    def __init__(self, vocabulary: Vocabulary | CheckpointError) -> None:
        """`vocabulary`: the model's, or the reason why it has none; then no grammar compiles."""
        self._vocabulary = vocabulary
        self._compiled: OrderedDict[Grammar, Future[Compiled]] = OrderedDict()
        self._thread: ThreadPoolExecutor | None = None

    def get(self, grammar: Grammar) -> Future[Compiled]:
        """The compiled grammar, or a GrammarError. All who ask for an equal one share it."""
        found = self._compiled.get(grammar)
        if found is None:
            if self._thread is None:
                self._thread = ThreadPoolExecutor(1, thread_name_prefix="grammars", initializer=_give_way)
            found = self._compiled[grammar] = self._thread.submit(self._compile, grammar)
        self._compiled.move_to_end(grammar)
        self._shrink()
        return found

    def __len__(self) -> int:
        return len(self._compiled)

    def _shrink(self) -> None:
        chars = sum(len(grammar.text) for grammar in self._compiled)
        while len(self._compiled) > 1 and (len(self._compiled) > MAX_GRAMMARS or chars > MAX_CHARS):
            grammar, _ = self._compiled.popitem(last=False)
            chars -= len(grammar.text)

    def _compile(self, grammar: Grammar) -> Compiled:
        if isinstance(self._vocabulary, CheckpointError):
            raise GrammarError(str(self._vocabulary))
        return Compiled(matcher=compile_grammar(grammar, self._vocabulary), end=self._vocabulary.end)


def _give_way() -> None:
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
