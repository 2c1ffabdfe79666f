"""The end of the reasoning is forced once its tokens are used up, and not before."""

from __future__ import annotations

import pytest
import torch

from elastic_moe.cluster.messages.requests import RequestId, SamplingParams, ThinkingBudget
from elastic_moe.cluster.messages.steps import NewSequence
from elastic_moe.model.sampling.sampling import sample
from elastic_moe.model.sampling.state import SamplingState
from elastic_moe.model.sampling.thinking import Thinking

PROMPT = [1, 2, 90, 91]
"""It has the marks too, which count in the output only."""


def made(budget: ThinkingBudget, chosen: list[int]) -> list[int]:
    """The output where the model would choose these tokens, one after the other."""
    thinking, tokens = Thinking(budget, len(PROMPT)), list(PROMPT)
    for token in chosen:
        forced = thinking.forced(tokens)
        tokens.append(token if forced is None else forced)
    return tokens[len(PROMPT) :]


@pytest.mark.parametrize(
    ("budget", "chosen", "output"),
    [
        # the answer begins within the reasoning
        (ThinkingBudget(tokens=3, end=(91,)), [5] * 6, [5, 5, 5, 91, 5, 5]),
        (ThinkingBudget(tokens=0, end=(91, 92)), [5] * 4, [91, 92, 5, 5]),
        # it ends by itself
        (ThinkingBudget(tokens=3, end=(91,)), [5, 91, 5, 5, 5], [5, 91, 5, 5, 5]),
        (ThinkingBudget(tokens=2, end=(91, 92)), [91, 92, 5, 5, 5], [91, 92, 5, 5, 5]),
        # it begins with a mark, or does not begin
        (ThinkingBudget(tokens=2, end=(91,), start=(90,)), [90, 5, 5, 5, 5], [90, 5, 5, 91, 5]),
        (ThinkingBudget(tokens=2, end=(91,), start=(90, 90)), [90, 5, 90, 90, 5, 5, 5], [90, 5, 90, 90, 5, 5, 91]),
        (ThinkingBudget(tokens=2, end=(91,), start=(90,)), [5] * 5, [5] * 5),
    ],
)
def test_when_the_end_is_forced(budget: ThinkingBudget, chosen: list[int], output: list[int]) -> None:
    assert made(budget, chosen) == output


def test_a_step_that_runs_again_forces_the_same() -> None:
    thinking = Thinking(ThinkingBudget(tokens=2, end=(91, 92)), len(PROMPT))
    full = [*PROMPT, 5, 5, 91]
    assert thinking.forced(full) == 92
    assert thinking.forced(full[:-1]) == 91
    assert thinking.forced(full[:-2]) is None
    assert thinking.forced(full) == 92


def test_nothing_forbids_the_end() -> None:
    """Not even the request's own settings, and other rows are left alone."""
    params = SamplingParams(
        max_tokens=9,
        temperature=0.0,
        thinking=ThinkingBudget(tokens=1, end=(7,)),
        bad_words=((7,),),
        allowed_token_ids=(3, 4),
    )
    sequences = [
        NewSequence(
            request_id=RequestId("r"), token_ids=(1, *output), num_prompt_tokens=1, params=params, eos_token_ids=(0,)
        )
        for output in [(), (3,)]
    ]
    logits = torch.zeros(2, 10)
    logits[:, 4] = 1.0
    assert [token for token, _ in sample(logits, [SamplingState(one) for one in sequences])] == [4, 7]
