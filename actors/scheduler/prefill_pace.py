"""Decides how many prompt tokens run beside decodes, by the time that earlier steps have taken.

A step with prompt tokens is expected to last as long as one with the same decodes alone, plus a time for each prompt
token. Both are learned. Prompts may lengthen a step by `SHARE` of its decodes' time, and by more where many requests
wait for their first token beside few that decode, because both kinds of readers wait.
"""

from __future__ import annotations

SHARE = 0.75
"""Most time that prompts may add to a step if few requests wait, as a share of the step's time without prompts."""
MOST_SHARE = 3.0
"""The part that they may take at most, however many wait."""
ROOM_S = 0.025
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
        self._alone_s: dict[int, float] = {}
        """Seconds of a step without prompts, by the number of binary digits of its decodes."""
        self._guessed_s: dict[int, float] = {}
        """The same, guessed from steps with prompts: while many prompts wait, there are no others."""
        self._beside = _Rate()
        """Seconds that prompt tokens take in steps with decodes."""
        self._without = _Rate()
        """Seconds that they take in other steps, which is more: such a step reads the weights for them alone."""

    def tokens(self, decodes: int, crowd: float = 0.0) -> int:
        """Number of prompt tokens of a worker to run beside so many decodes of a worker.

        crowd: number of requests that wait for their first token, for each that decodes.
        """
        size = decodes.bit_length()
        alone_s, token_s = self._alone_s.get(size, self._guessed_s.get(size)), self._token_s
        if alone_s is None or not token_s:
            return self._first
        return max(FEWEST_TOKENS, int(max(ROOM_S, min(MOST_SHARE, SHARE * (1 + crowd)) * alone_s) / token_s))

    @property
    def _token_s(self) -> float | None:
        return self._beside.seconds or self._without.seconds

    def met(self, decodes: int, prompts: int, step_s: float) -> None:
        """A step took `step_s`. decodes, prompts: the most tokens of a worker, of each kind."""
        size = decodes.bit_length()
        alone_s = self._alone_s.get(size)
        if not decodes:
            self._without.add(prompts, step_s)
        elif not prompts:
            self._alone_s[size] = _blend(alone_s, step_s)
        elif alone_s is not None:
            self._beside.add(prompts, max(0.0, step_s - alone_s))
        elif (token_s := self._token_s) is not None:
            self._guessed_s[size] = _blend(self._guessed_s.get(size), max(0.0, step_s - prompts * token_s))


class _Rate:
    """Seconds of a token: of all tokens of late, so that large pieces count most."""

    def __init__(self) -> None:
        self._seconds = self._tokens = 0.0

    @property
    def seconds(self) -> float | None:
        return self._seconds / self._tokens if self._tokens else None

    def add(self, tokens: int, took_s: float) -> None:
        if self.seconds:
            took_s = min(took_s, OUTLIER * tokens * self.seconds)
        self._seconds = DECAY * self._seconds + took_s
        self._tokens = DECAY * self._tokens + tokens


def _blend(known_s: float | None, seen_s: float) -> float:
    if not known_s:
        return seen_s
    return DECAY * known_s + (1 - DECAY) * min(seen_s, OUTLIER * known_s)
