"""Ends the reasoning of an answer after a number of tokens, by forcing the tokens that end it.

What is forced depends on the answer's tokens alone, so a resumed request goes on alike.
"""

from __future__ import annotations

from collections.abc import Sequence

from elastic_moe.cluster.messages.requests import ThinkingBudget


class Thinking:
    """How far the reasoning of one sequence has come. It reads each token once."""

    __slots__ = ("_begin", "_budget", "_ended", "_first", "_read")

    def __init__(self, budget: ThinkingBudget, num_prompt_tokens: int) -> None:
        self._budget = budget
        self._first = num_prompt_tokens
        self._forget()

    def _forget(self) -> None:
        self._read = self._first
        """Number of tokens, the prompt's included, that have been looked at."""
        self._begin = None if self._budget.start else self._first
        """Number of tokens before the first one of the reasoning; None: it has not begun."""
        self._ended = False

    def forced(self, token_ids: Sequence[int]) -> int | None:
        """The token that must come next; None where the model chooses. `token_ids`: the prompt's, then the output's."""
        if len(token_ids) < self._read:
            # a step runs again
            self._forget()
        while self._read < len(token_ids) and not self._ended:
            self._read += 1
            self._look(token_ids)
        self._read = len(token_ids)
        if self._begin is None or self._ended or len(token_ids) < self._begin + self._budget.tokens:
            return None
        return self._budget.end[len(token_ids) - self._begin - self._budget.tokens]

    def _look(self, token_ids: Sequence[int]) -> None:
        """Note whether the reasoning begins or ends with token number `_read`."""
        if self._begin is None:
            if self._ends_with(token_ids, self._budget.start, self._first):
                self._begin = self._read
        elif self._ends_with(token_ids, self._budget.end, self._begin):
            self._ended = True

    def _ends_with(self, token_ids: Sequence[int], mark: Sequence[int], first: int) -> bool:
        begin = self._read - len(mark)
        return begin >= first and tuple(token_ids[begin : self._read]) == tuple(mark)
