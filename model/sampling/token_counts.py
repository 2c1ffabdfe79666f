"""Counts the tokens of a sequence. Penalties are computed from these counts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt


class TokenCounts:
    """The distinct tokens of one sequence, in arrays that grow, so that a step counts and copies nothing again."""

    __slots__ = ("_ids", "_in_prompt", "_output", "_slots")

    def __init__(self, token_ids: Sequence[int], num_prompt_tokens: int) -> None:
        prompt = dict.fromkeys(token_ids[:num_prompt_tokens])
        self._slots = {token: slot for slot, token in enumerate(prompt)}
        room = len(prompt) + 64
        self._ids = np.zeros(room, dtype=np.int64)
        self._ids[: len(prompt)] = list(prompt)
        self._in_prompt = np.zeros(room, dtype=np.bool_)
        self._in_prompt[: len(prompt)] = True
        self._output = np.zeros(room, dtype=np.int64)
        for token in token_ids[num_prompt_tokens:]:
            self.add(token)

    def add(self, token: int) -> None:
        """Count an output token."""
        slot = self._slots.get(token)
        if slot is None:
            slot = self._slots[token] = len(self._slots)
            if slot == len(self._ids):
                self._ids, self._in_prompt, self._output = (
                    np.concatenate([array, np.zeros_like(array)])
                    for array in (self._ids, self._in_prompt, self._output)
                )
            self._ids[slot] = token
        self._output[slot] += 1

    def remove(self, token: int) -> None:
        """Undo one `add`. The token keeps its place, with a count of 0."""
        self._output[self._slots[token]] -= 1

    def table(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_], npt.NDArray[np.int64]]:
        """[U] distinct tokens, whether each is in the prompt, and how often each is in the output (0 is possible)."""
        used = len(self._slots)
        return self._ids[:used], self._in_prompt[:used], self._output[:used]
