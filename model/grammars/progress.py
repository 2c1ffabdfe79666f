"""One sequence's place in its grammar, and the mask of its next token.

A `Progress` belongs to the thread that runs the steps. Masks are computed in other threads, one at a time for each
sequence, so that a matcher is never used by two. A step that runs again, or one token too many, only means that fewer
of the consumed tokens count: the matcher rolls them back.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import Future

import numpy as np
from llguidance import LLMatcher

from elastic_moe.cluster.messages.requests import SamplingParams
from elastic_moe.model.grammars.compiling import Compiled
from elastic_moe.model.grammars.sources import GrammarError, one_line

Mask = np.ndarray[tuple[int], np.dtype[np.uint8]]
"""A bit for each token, lowest first in each byte: whether the token is allowed."""


class Progress:
    """Follows a sequence's tokens. Not thread-safe."""

    __slots__ = (
        "_after",
        "_begin",
        "_edits",
        "_eos",
        "_job",
        "_job_at",
        "_kept",
        "_matching",
        "_params",
        "_prompt",
        "_spoilt",
        "_tokens",
        "compiled",
    )

    def __init__(
        self,
        compiled: Future[Compiled],
        tokens: list[int],
        num_prompt_tokens: int,
        params: SamplingParams,
        eos_token_ids: Sequence[int],
    ) -> None:
        """`compiled` is of `params.grammar` and may be under way. `tokens` are the sequence's own, prompt and output:
        whoever changes that list calls `grown` or `cut`."""
        self.compiled = compiled
        self._tokens = tokens
        self._prompt = num_prompt_tokens
        self._params = params
        self._eos = tuple(eos_token_ids)
        self._after = list(params.grammar_after or ())
        self._matching = _Matching()
        self._begin = self._find_begin()
        """Number of tokens before the grammar begins, the prompt's included; None while it has not begun."""
        self._kept = 0
        """How many tokens, of those that the latest mask came after, are still the sequence's."""
        self._edits = 0
        """How often such tokens have been removed."""
        self._spoilt: int | None = None
        """Place of the first token that no grammar goes on after."""
        self._job: MaskJob | None = None
        self._job_at = (-1, 0)

    def _find_begin(self) -> int | None:
        size = len(self._after)
        ends = range(self._prompt + size, len(self._tokens) + 1)
        return next((end for end in ends if self._tokens[end - size : end] == self._after), None)

    @property
    def begun(self) -> bool:
        """Whether the grammar restricts the next token."""
        return self._begin is not None

    def grown(self, *, spoilt: bool = False) -> None:
        """A token was added. `spoilt`: it only stands for one that could not be sampled."""
        # the answer ends with an end-of-sequence token, and what follows is one token too many
        ends = self._begin is not None and self._tokens[-1] in self._eos
        if (spoilt or ends) and self._spoilt is None:
            self._spoilt = len(self._tokens) - 1
        size = len(self._after)
        if self._begin is None and self._tokens[max(self._prompt, len(self._tokens) - size) :] == self._after:
            self._begin = len(self._tokens)

    def cut(self) -> None:
        """Tokens were removed from the end."""
        length = len(self._tokens)
        if self._spoilt is not None and self._spoilt >= length:
            self._spoilt = None
        valid = max(0, length - self._begin) if self._begin is not None else 0
        if valid < self._kept:
            self._kept = valid
            self._edits += 1
        if self._after and self._begin is not None and self._begin > length:
            self._begin = None

    def begin_mask(self) -> MaskJob | None:
        """A job to run for the next token's mask. None where there is none to begin: it runs or has run already, or
        must wait, or nothing is restricted."""
        if self._begin is None or self._spoilt is not None or self._is_current:
            return None
        if self._job is not None and not self._job.future.done():
            return None
        consumed = self._job.consumed if self._job is not None else 0
        new = self._tokens[self._begin + self._kept :]
        self._job = MaskJob(
            self._matching, self.compiled, consumed=self._kept + len(new), drop=consumed - self._kept, new=new,
            eos=self._eos,
            held_back=self._held_back,
        )  # fmt: skip
        self._kept += len(new)
        self._job_at = len(self._tokens), self._edits
        return self._job

    @property
    def job(self) -> MaskJob | None:
        """The job of the next token's mask, if it has begun."""
        return self._job if self._is_current else None

    @property
    def slow(self) -> bool:
        """Whether the next mask may take long. The first one does, since the grammar's automata are made lazily."""
        return self._matching.last_s > SLOW_S

    @property
    def ready(self) -> bool:
        """Whether `mask` may be called."""
        return self._begin is None or (self._spoilt is None and (job := self.job) is not None and job.future.done())

    def mask(self) -> Mask | None:
        """The mask of the next token; None allows all. Raises GrammarError where the grammar cannot go on."""
        if self._begin is None:
            return None
        assert self._job is not None
        return self._job.future.result()

    @property
    def _is_current(self) -> bool:
        return self._job_at == (len(self._tokens), self._edits) and self._spoilt is None

    @property
    def _held_back(self) -> tuple[int, ...]:
        """Tokens that may only come where the grammar has no other: those that would end the answer too early."""
        if len(self._tokens) - self._prompt < self._params.min_tokens:
            return (*self._eos, *self._params.stop_token_ids)
        return self._eos if self._params.ignore_eos else ()


SLOW_S = 0.002
"""A sequence whose last mask took longer makes its next one beside those of the others."""


class MaskJob:
    """Makes one mask: takes tokens back first, then consumes new ones."""

    __slots__ = ("_compiled", "_drop", "_eos", "_held_back", "_matching", "_new", "consumed", "future")

    def __init__(
        self,
        matching: _Matching,
        compiled: Future[Compiled],
        *,
        consumed: int,
        drop: int,
        new: Sequence[int],
        eos: Sequence[int],
        held_back: Sequence[int],
    ) -> None:
        """`consumed`: tokens of the grammar's part that the mask comes after. `held_back`: see Progress._held_back."""
        self._matching, self._compiled = matching, compiled
        self._drop, self._new = drop, new
        self._eos, self._held_back = eos, held_back
        self.consumed = consumed
        self.future: Future[Mask] = Future()
        """The mask, or a GrammarError."""

    def run(self) -> None:
        """Call it once, from any thread, after the grammar has been compiled."""
        try:
            compiled = self._compiled.result()
            mask = self._matching.mask(compiled.matcher, self._drop, self._new)
            self.future.set_result(_without(_with_ends(mask, compiled.end, self._eos), self._held_back))
        except GrammarError as error:
            self.future.set_exception(error)
        except BaseException as error:  # noqa: BLE001 - what Rust panics with is no Exception
            self.future.set_exception(GrammarError(one_line(f"{type(error).__name__}: {error}")))


class _Matching:
    """A matcher, and the seconds of its last mask."""

    __slots__ = ("_matcher", "last_s")

    def __init__(self) -> None:
        self._matcher: LLMatcher | None = None
        self.last_s = float("inf")

    def mask(self, base: LLMatcher, drop: int, new: Sequence[int]) -> Mask:
        began = time.perf_counter()
        if self._matcher is None:
            self._matcher = base.deep_copy()
        matcher = self._matcher
        if drop and not matcher.rollback(drop):
            raise GrammarError(one_line(f"cannot go back in the grammar: {matcher.get_error()}"))
        consumed = matcher.try_consume_tokens(list(new))
        bits = matcher.compute_bitmask() if consumed == len(new) else b""
        if matcher.is_error():
            raise GrammarError(one_line(f"the grammar is too complex at this place: {matcher.get_error()}"))
        if consumed < len(new):
            raise GrammarError("the output does not follow the grammar")
        self.last_s = time.perf_counter() - began
        return np.frombuffer(bits, dtype=np.uint8)


def _with_ends(mask: Mask, end: int, eos: Sequence[int]) -> Mask:
    """The mask with all end-of-sequence tokens where `end` is allowed, which stands for the end of the answer."""
    if not mask[end >> 3] >> (end & 7) & 1 or tuple(eos) == (end,):
        return mask
    ended = mask.copy()
    ended[end >> 3] &= ~(1 << (end & 7)) & 0xFF
    for token in eos:
        if token < 8 * len(ended):
            ended[token >> 3] |= 1 << (token & 7)
    return ended


def _without(mask: Mask, tokens: Sequence[int]) -> Mask:
    """The mask without these tokens, unless it allows no others."""
    if not tokens:
        return mask
    rest = mask.copy()
    for token in tokens:
        if token < 8 * len(rest):
            rest[token >> 3] &= ~(1 << (token & 7)) & 0xFF
    return rest if rest.any() else mask
