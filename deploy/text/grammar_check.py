"""Compiles a request's grammar once, before the request is accepted. It runs in a process with limits."""

from __future__ import annotations

from collections.abc import Callable

from elastic_moe.cluster.errors import CheckpointError
from elastic_moe.cluster.messages.grammars import Grammar, GrammarKind
from elastic_moe.model.grammars.compiling import check_grammar
from elastic_moe.model.grammars.sources import GrammarError
from elastic_moe.model.grammars.vocabulary import Vocabulary, make_vocabulary

GRAMMAR_S = 1.0
"""Seconds of processor time for one grammar."""


class GrammarCheck:
    """Has the vocabulary, once it is needed or loaded."""

    def __init__(self, tokenizer_json: Callable[[], str | None]) -> None:
        """`tokenizer_json` gives the content of tokenizer.json; None where the model has none."""
        self._tokenizer_json = tokenizer_json
        self._vocabulary: Vocabulary | str | None = None
        """The model's vocabulary, or the reason why there is none; None until it is needed."""

    def load(self) -> Vocabulary | str:
        if self._vocabulary is None:
            text = self._tokenizer_json()
            if text is None:
                self._vocabulary = "this model has no tokenizer.json, which structured output needs"
            else:
                try:
                    self._vocabulary = make_vocabulary(text)
                except CheckpointError as error:
                    self._vocabulary = str(error)
        return self._vocabulary

    def fault(self, kind: str, text: str) -> str | None:
        """Why this grammar cannot be used; None if it can."""
        vocabulary = self.load()
        if isinstance(vocabulary, str):
            return vocabulary
        try:
            check_grammar(Grammar(kind=GrammarKind(kind), text=text), vocabulary)
        except GrammarError as error:
            return str(error)
        return None
