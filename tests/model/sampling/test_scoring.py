"""Scores of prompt tokens against log_softmax, computed in pieces."""

from __future__ import annotations

import pytest
import torch

from elastic_moe.cluster.messages.requests import RequestId
from elastic_moe.cluster.messages.steps import ScoredPrompt
from elastic_moe.model.sampling import scoring
from elastic_moe.model.sampling.scoring import Scoring, score

ROWS, VOCABULARY = 12, 50


def logits() -> torch.Tensor:
    return 3 * torch.randn(ROWS, VOCABULARY, generator=torch.Generator().manual_seed(0))


def wanted(name: str, first_row: int, count: int, alternatives: int) -> Scoring:
    return Scoring(
        request_id=RequestId(name),
        first_row=first_row,
        place=5,
        token_ids=[(7 * row) % VOCABULARY for row in range(first_row, first_row + count)],
        alternatives=alternatives,
    )


@pytest.mark.parametrize("rows_at_a_time", [1, 3, 100])
def test_scores_are_those_of_log_softmax(monkeypatch: pytest.MonkeyPatch, rows_at_a_time: int) -> None:
    monkeypatch.setattr(scoring, "ELEMENTS", rows_at_a_time * VOCABULARY)
    most = 0

    def logits_of(begin: int, end: int) -> torch.Tensor:
        nonlocal most
        most = max(most, end - begin)
        return logits()[begin:end]

    asked = [wanted("a", 0, 7, 3), wanted("b", 8, 4, 0)]
    for one, found in zip(asked, score(asked, logits_of, VOCABULARY), strict=True):
        assert isinstance(found, ScoredPrompt)
        assert (found.request_id, found.scores.start) == (one.request_id, 5)
        rows = logits().log_softmax(-1)[one.first_row : one.first_row + len(one.token_ids)]
        for row, token_id, token in zip(rows, one.token_ids, found.scores.tokens(), strict=True):
            assert token.token_id == token_id
            assert token.logprob == pytest.approx(float(row[token_id]), abs=1e-5)
            assert token.rank == int((row >= row[token_id]).sum())
            best = row.topk(one.alternatives)
            assert [i for i, _ in token.top] == best.indices.tolist()
            assert [v for _, v in token.top] == pytest.approx(best.values.tolist(), abs=1e-5)
    assert most == min(rows_at_a_time, 7)


def test_logits_that_are_not_numbers_are_told_by_request() -> None:
    broken = logits()
    broken[9, 3] = torch.nan
    impossible = (7 * 1) % VOCABULARY
    broken[1, impossible] = -torch.inf
    first, second = score([wanted("a", 0, 7, 2), wanted("b", 8, 4, 2)], lambda b, e: broken[b:e], VOCABULARY)
    assert second == "b"
    assert isinstance(first, ScoredPrompt)
    assert list(first.scores.tokens())[1].logprob == -9999.0


def test_more_alternatives_than_tokens() -> None:
    (found,) = score([wanted("a", 0, 2, 60)], lambda b, e: logits()[b:e], VOCABULARY)
    assert isinstance(found, ScoredPrompt)
    assert found.scores.width == 1 + VOCABULARY
