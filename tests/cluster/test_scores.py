"""Packed log probabilities of a prompt: cut, joined and read again."""

from __future__ import annotations

from array import array

from elastic_moe.cluster.messages.scores import PromptScores, ScoredPromptToken, joined


def scores(start: int, end: int) -> PromptScores:
    """The token at place n has the id n, log probability -n and rank 2n, and one alternative."""
    places = range(start, end)
    return PromptScores(
        start=start,
        width=2,
        ids=array("i", [i for n in places for i in (n, 100 + n)]).tobytes(),
        logprobs=array("f", [v for n in places for v in (-n, -n / 2)]).tobytes(),
        ranks=array("i", [2 * n for n in places]).tobytes(),
    )


def test_pieces_make_the_whole() -> None:
    assert joined([]) is None
    assert joined([scores(1, 4), scores(4, 5), scores(5, 9)]) == scores(1, 9)
    assert len(scores(1, 9)) == 8
    assert scores(1, 9).end == 9


def test_what_has_come_already_is_cut_off() -> None:
    assert scores(1, 9).from_place(4) == scores(4, 9)
    assert scores(4, 9).from_place(2) == scores(4, 9)
    assert len(scores(1, 4).from_place(6)) == 0


def test_tokens_are_read() -> None:
    assert list(scores(3, 5).tokens()) == [
        ScoredPromptToken(token_id=3, logprob=-3.0, rank=6, top=((103, -1.5),)),
        ScoredPromptToken(token_id=4, logprob=-4.0, rank=8, top=((104, -2.0),)),
    ]
