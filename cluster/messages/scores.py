"""Log probabilities of prompt tokens, packed, since a prompt may have a hundred thousand tokens with twenty
alternatives each.

Legend: C scored tokens, A alternatives to each.
"""

from __future__ import annotations

import itertools
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

_NUMBER_BYTES = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredPromptToken:
    """A prompt token with its log probability and rank, and the most likely tokens at its place, best first."""

    token_id: int
    logprob: float
    rank: int
    """1 for the most likely token."""
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptScores:
    """The scores of C consecutive tokens of one prompt."""

    start: int
    """Place in the prompt of the first of them. The prompt's first token, at place 0, has no score."""
    width: int
    """1 + A."""
    ids: bytes
    """int32 [C, 1 + A]: each token, then its alternatives."""
    logprobs: bytes
    """float32 [C, 1 + A]."""
    ranks: bytes
    """int32 [C]."""

    def __len__(self) -> int:
        return len(self.ranks) // _NUMBER_BYTES

    @property
    def end(self) -> int:
        return self.start + len(self)

    def from_place(self, start: int) -> PromptScores:
        """The scores from place `start` on."""
        skip = max(0, start - self.start) * _NUMBER_BYTES
        return PromptScores(
            start=max(start, self.start),
            width=self.width,
            ids=self.ids[skip * self.width :],
            logprobs=self.logprobs[skip * self.width :],
            ranks=self.ranks[skip:],
        )

    def tokens(self) -> Iterator[ScoredPromptToken]:
        ids, logprobs, ranks = array("i"), array("f"), array("i")
        for numbers, packed in ((ids, self.ids), (logprobs, self.logprobs), (ranks, self.ranks)):
            numbers.frombytes(packed)
        for at, rank in enumerate(ranks):
            begin, end = at * self.width, (at + 1) * self.width
            yield ScoredPromptToken(
                token_id=ids[begin],
                logprob=logprobs[begin],
                rank=rank,
                top=tuple(zip(ids[begin + 1 : end], logprobs[begin + 1 : end], strict=True)),
            )


def joined(pieces: Sequence[PromptScores]) -> PromptScores | None:
    """Consecutive pieces as one; None where there is no piece."""
    if len(pieces) <= 1:
        return pieces[0] if pieces else None
    assert all(before.end == after.start for before, after in itertools.pairwise(pieces))
    return PromptScores(
        start=pieces[0].start,
        width=pieces[0].width,
        ids=b"".join(piece.ids for piece in pieces),
        logprobs=b"".join(piece.logprobs for piece in pieces),
        ranks=b"".join(piece.ranks for piece in pieces),
    )
