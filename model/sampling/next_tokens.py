"""Samples a step's sequences, and tells those apart that could not be sampled."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from elastic_moe.cluster.messages.requests import RequestId
from elastic_moe.cluster.messages.steps import Sample, Stuck
from elastic_moe.model.grammars.sources import GrammarError
from elastic_moe.model.sampling.greedy import NO_TOKEN
from elastic_moe.model.sampling.sampling import BLOCKED, sample
from elastic_moe.model.sampling.state import SamplingState

NO_COMMON_TOKEN = (
    "the answer cannot go on: its grammar allows no token here that allowed_token_ids and bad_words allow too"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class NextTokens:
    """Every sequence is in one of the first four, which are those of StepResult."""

    samples: tuple[Sample, ...]
    corrupted: tuple[RequestId, ...]
    unready: tuple[RequestId, ...]
    stuck: tuple[Stuck, ...]
    tokens: Mapping[RequestId, int]
    """The chosen token of each sequence; negative where none could be chosen."""

    def append_to(self, states: Mapping[RequestId, SamplingState]) -> None:
        """Append each sequence's token. Call it once it is known that the step's exchanges came to something."""
        for request_id, token in self.tokens.items():
            # the next step may be on its way and runs with any token here; nobody reads the result for this request
            states[request_id].append(max(0, token), spoilt=token < 0)


def choose(logits_BV: Tensor, states: Mapping[RequestId, SamplingState]) -> NextTokens:
    """Choose the next token of each sequence. `logits_BV`: [B, V], a row for each, in order."""
    stuck: dict[RequestId, str] = {}
    unready: list[RequestId] = []
    able: dict[RequestId, int] = {}
    for row, (request_id, state) in enumerate(states.items()):
        progress = state.progress
        if progress is not None and not progress.ready:
            unready.append(request_id)
            continue
        try:
            state.mask = None if progress is None else progress.mask()
        except GrammarError as error:
            stuck[request_id] = str(error)
            continue
        able[request_id] = row
    rows_BV = logits_BV if len(able) == len(states) else logits_BV[list(able.values())]
    chosen = dict(zip(able, sample(rows_BV, [states[request_id] for request_id in able]), strict=True))
    stuck |= {request_id: NO_COMMON_TOKEN for request_id, (token, _) in chosen.items() if token == BLOCKED}
    return NextTokens(
        samples=tuple(
            Sample(request_id=request_id, token_id=token, logprobs=logprobs)
            for request_id, (token, logprobs) in chosen.items()
            if token >= 0
        ),
        corrupted=tuple(request_id for request_id, (token, _) in chosen.items() if token == NO_TOKEN),
        unready=tuple(unready),
        stuck=tuple(Stuck(request_id=request_id, reason=reason) for request_id, reason in stuck.items()),
        tokens={request_id: chosen[request_id][0] if request_id in chosen else NO_TOKEN for request_id in states},
    )
