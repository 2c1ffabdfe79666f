"""What sampling needs of one sequence."""

from __future__ import annotations

from concurrent.futures import Future

import numpy as np

from elastic_moe.cluster.messages.steps import NewSequence
from elastic_moe.model.grammars.compiling import Compiled
from elastic_moe.model.grammars.progress import Mask, Progress
from elastic_moe.model.sampling.thinking import Thinking
from elastic_moe.model.sampling.token_counts import TokenCounts

GREEDY_BELOW = 1e-5
"""A temperature below this number means greedy sampling, as in vLLM."""


class SamplingState:
    """One sequence's tokens, and what sampling needs of them. It belongs to one worker and is not thread-safe."""

    __slots__ = (
        "_eos",
        "_stops",
        "allowed",
        "bias",
        "counts",
        "greedy",
        "mask",
        "num_prompt_tokens",
        "params",
        "progress",
        "thinking",
        "token_ids",
    )

    def __init__(self, sequence: NewSequence, compiled: Future[Compiled] | None = None) -> None:
        """`compiled` is of the sequence's grammar, if it has one; it may be under way."""
        params = sequence.params
        self.params = params
        self.num_prompt_tokens = sequence.num_prompt_tokens
        self.token_ids = list(sequence.token_ids)
        """The prompt's tokens, then the output's."""
        self.greedy = params.temperature < GREEDY_BELOW
        self.bias = _columns(params.logit_bias) if params.logit_bias else None
        self._eos = frozenset(sequence.eos_token_ids)
        self._stops = self._eos.union(params.stop_token_ids)
        """Tokens that may not come before `min_tokens` tokens of output."""
        allowed = params.allowed_token_ids
        self.allowed = None if allowed is None else np.unique(np.array(allowed, dtype=np.int64))
        self.counts: TokenCounts | None = None
        if params.presence_penalty or params.frequency_penalty or params.repetition_penalty != 1.0:
            self.counts = TokenCounts(self.token_ids, self.num_prompt_tokens)
        self.thinking = None if params.thinking is None else Thinking(params.thinking, self.num_prompt_tokens)
        self.progress: Progress | None = None
        """The place in the grammar, if the sequence has one."""
        if compiled is not None:
            self.progress = Progress(
                compiled, self.token_ids, self.num_prompt_tokens, params, eos_token_ids=sequence.eos_token_ids
            )
        self.mask: Mask | None = None
        """The tokens that the grammar allows next; None allows all. Whoever calls `sample` sets it."""

    @property
    def num_output(self) -> int:
        """Output tokens so far, which is the index of the next one."""
        return len(self.token_ids) - self.num_prompt_tokens

    def append(self, token: int, *, spoilt: bool = False) -> None:
        """Add an output token. `spoilt`: it only stands for one that could not be sampled."""
        self.token_ids.append(token)
        if self.counts is not None:
            self.counts.add(token)
        if self.progress is not None:
            self.progress.grown(spoilt=spoilt)

    def truncate(self, num_tokens: int) -> None:
        """Remove every token past the first `num_tokens`, since their step runs again. A prompt cannot be cut."""
        if num_tokens >= len(self.token_ids):
            return
        assert num_tokens >= self.num_prompt_tokens, "a prompt is never cut"
        if self.counts is not None:
            for token in self.token_ids[num_tokens:]:
                self.counts.remove(token)
        del self.token_ids[num_tokens:]
        if self.progress is not None:
            self.progress.cut()

    def forced(self) -> int | None:
        """The token that must come next, since the reasoning has used up its tokens; None where there is none."""
        return None if self.thinking is None else self.thinking.forced(self.token_ids)

    @property
    def adjusted(self) -> bool:
        return (
            self.bias is not None
            or self.counts is not None
            or self.allowed is not None
            or self.mask is not None
            or self.thinking is not None
            or self.masked
        )

    @property
    def masked(self) -> bool:
        """Whether bad_words or min_tokens may forbid tokens at the next position."""
        return bool(self.params.bad_words) or bool(self._too_early)

    @property
    def _too_early(self) -> frozenset[int]:
        """The tokens that would end the answer too early. Where the grammar has begun, its mask leaves them out."""
        if self.progress is not None and self.progress.begun:
            return frozenset()
        if self.num_output < self.params.min_tokens:
            return self._stops
        return frozenset() if self.progress is None else self._eos

    def banned(self) -> np.ndarray:
        """The tokens that bad_words and min_tokens forbid at the next position."""
        banned = set(self._too_early)
        for *before, last in self.params.bad_words:
            if len(before) <= self.num_output and self.token_ids[len(self.token_ids) - len(before) :] == before:
                banned.add(last)
        return np.array(sorted(banned), dtype=np.int64)


def _columns(pairs: tuple[tuple[int, float], ...]) -> tuple[np.ndarray, np.ndarray]:
    """The distinct tokens and their values. If a token comes twice, its last value counts."""
    distinct = dict(pairs)
    return np.array(list(distinct), dtype=np.int64), np.array(list(distinct.values()), dtype=np.float64)
