"""How many prompt tokens run beside decodes: as many as the other requests can wait for, by what steps have taken.

A step with prompt tokens is taken to last as long as one with the same decodes alone, plus a time for each prompt
token. Both are learned. Prompts may make a step last by `SHARE` of that time longer, or by `ROOM_S` where that is more.
"""

from __future__ import annotations

SHARE = 0.75
"""Of the time that a step takes without prompts, the part that prompts may take beside it."""
ROOM_S = 0.04
"""Seconds that prompts may always take in a step: readers of a stream do not notice them."""
FEWEST_TOKENS = 16
"""Prompt tokens that may always run, so that each step brings a prompt forward."""
DECAY = 0.9
"""Weight of what was learned before, with each step."""
OUTLIER = 4.0
"""A step counts as at most so many times as long as expected: it may have waited for something else."""


class PrefillPace:
    """Learns from steps that have been run."""

    def __init__(self, first: int) -> None:
        """first: number of prompt tokens that may run while nothing is known."""
        self._first = first
        self._decode_s: dict[int, float] = {}
        """Seconds of a step without prompts, by the number of binary digits of its decodes."""
        self._prompt_s = self._prompt_tokens = 0.0
        """Decaying sums: the seconds that prompts took, and their tokens."""

    def tokens(self, decodes: int) -> int:
        """Number of prompt tokens of a worker to run beside so many decodes of a worker."""
        alone_s = self._decode_s.get(decodes.bit_length())
        if alone_s is None or not self._prompt_s:
            return self._first
        return max(FEWEST_TOKENS, int(max(ROOM_S, SHARE * alone_s) * self._prompt_tokens / self._prompt_s))

    def met(self, decodes: int, prompts: int, step_s: float) -> None:
        """A step took `step_s`. decodes, prompts: the most tokens of a worker, of each kind."""
        size = decodes.bit_length()
        alone_s = self._decode_s.get(size)
        if not decodes:
            return
        if not prompts:
            new_s = step_s if alone_s is None else min(step_s, OUTLIER * alone_s)
            self._decode_s[size] = new_s if alone_s is None else DECAY * alone_s + (1 - DECAY) * new_s
        elif alone_s is not None:
            took_s = max(0.0, step_s - alone_s)
            if self._prompt_s:
                took_s = min(took_s, OUTLIER * prompts * self._prompt_s / self._prompt_tokens)
            self._prompt_s = DECAY * self._prompt_s + took_s
            self._prompt_tokens = DECAY * self._prompt_tokens + prompts
