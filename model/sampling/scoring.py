"""Log probabilities of a prompt's own tokens, from the hidden states of the step that runs them.

The logits of a long prompt would take gigabytes, so they are computed for some tokens at a time, and only the numbers
that the client asked for are kept.

Legend: R rows (tokens) at a time, C scored tokens of a chunk, V vocabulary, A alternatives.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from elastic_moe.cluster.messages.requests import RequestId
from elastic_moe.cluster.messages.scores import PromptScores
from elastic_moe.cluster.messages.steps import Chunk, ScoredPrompt
from elastic_moe.model.sampling.log_probabilities import LEAST_LOGPROB
from elastic_moe.model.sampling.state import SamplingState

ELEMENTS = 1 << 24
"""Most logits (R x V) that are computed at a time."""

LogitsOf = Callable[[int, int], Tensor]
"""It computes the logits [R, V] of the step's tokens from the first number up to, and without, the second."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scoring:
    """The tokens of one chunk whose next token is scored."""

    request_id: RequestId
    first_row: int
    """Place of the first of them among all tokens of the step."""
    place: int
    """Place in the prompt of the first scored token."""
    token_ids: Sequence[int]
    """[C] the scored tokens."""
    alternatives: int

    @classmethod
    def of(cls, chunk: Chunk, row: int, state: SamplingState) -> Scoring | None:
        """What is to be scored of a chunk whose first token is number `row` of the step; None if nothing is."""
        if chunk.score_from is None:
            return None
        end = min(chunk.start + chunk.length, state.num_prompt_tokens - 1)
        return cls(
            request_id=chunk.request_id,
            first_row=row + chunk.score_from - chunk.start,
            place=chunk.score_from + 1,
            token_ids=state.token_ids[chunk.score_from + 1 : end + 1],
            alternatives=state.params.prompt_logprobs or 0,
        )


def score(wanted: Sequence[Scoring], logits_of: LogitsOf, vocabulary: int) -> list[ScoredPrompt | RequestId]:
    """The scores of each of `wanted`, or the id of the request where the logits are not numbers.

    The memory of all logits at a time has a bound. It waits for the device once.
    """
    tables = [_table(one, logits_of, vocabulary) for one in wanted]
    if not tables:
        return []
    numbers = torch.cat([table.flatten() for table in tables]).cpu()
    found: list[ScoredPrompt | RequestId] = []
    begin = 0
    for one, table in zip(wanted, tables, strict=True):
        lines = numbers[begin : begin + table.numel()].view(table.shape)
        begin += table.numel()
        found.append(_packed(one, lines) if bool(lines.isfinite().all()) else one.request_id)
    return found


def _table(one: Scoring, logits_of: LogitsOf, vocabulary: int) -> Tensor:
    """[C, 2 (1 + A) + 1] float64: ids of the token and its alternatives, their log probabilities, and the rank."""
    rows = max(1, ELEMENTS // vocabulary)
    parts: list[Tensor] = []
    for begin in range(0, len(one.token_ids), rows):
        targets = one.token_ids[begin : begin + rows]
        logits_RV = logits_of(one.first_row + begin, one.first_row + begin + len(targets))
        parts.append(_lines(logits_RV, torch.tensor(targets, device=logits_RV.device), one.alternatives))
    return torch.cat(parts)


def _lines(logits_RV: Tensor, targets_R: Tensor, alternatives: int) -> Tensor:
    """NaN stands in every line whose logits are not numbers."""
    logits_RV = logits_RV.float()
    # CUDA adds up a row in an order that depends on its place in memory; rounding from float64 hides the difference
    dtype = torch.float32 if logits_RV.device.type == "cpu" else torch.float64
    total_R1 = logits_RV.to(dtype).logsumexp(dim=-1, keepdim=True)
    values, ids = logits_RV.topk(min(alternatives, logits_RV.shape[1]), dim=-1)
    own = logits_RV.gather(1, targets_R[:, None])
    rank = (logits_RV >= own).sum(dim=-1, keepdim=True)
    # a token with a logit of minus infinity is impossible, and not a fault
    logprobs = (torch.cat([own, values], dim=1) - total_R1).float().clamp(min=LEAST_LOGPROB).double()
    logprobs = logprobs.masked_fill(~total_R1.isfinite(), torch.nan)
    return torch.cat([targets_R[:, None].double(), ids.double(), logprobs, rank.double()], dim=1)


def _packed(one: Scoring, lines: Tensor) -> ScoredPrompt:
    width = (lines.shape[1] - 1) // 2
    scores = PromptScores(
        start=one.place,
        width=width,
        ids=_bytes(lines[:, :width], torch.int32),
        logprobs=_bytes(lines[:, width : 2 * width], torch.float32),
        ranks=_bytes(lines[:, -1:], torch.int32),
    )
    return ScoredPrompt(request_id=one.request_id, scores=scores)


def _bytes(numbers: Tensor, dtype: torch.dtype) -> bytes:
    return numbers.to(dtype).contiguous().numpy().tobytes()
