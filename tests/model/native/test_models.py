"""Whole models in bfloat16 with the native library are near float32, and give the same bits in any batch."""

from __future__ import annotations

import ctypes
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from elastic_moe.model.checkpoints.quiet import quiet_transformers
from elastic_moe.model.trunk.step_batch import SequenceSlice
from elastic_moe.model.worker.runner import ModelRunner
from tests.model.families import FAMILIES, tiny_checkpoint
from tests.model.lockstep import Lockstep
from tests.model.test_parity import reference

LENGTHS = (30, 1, 17, 9, 4, 23, 2)


def texts(vocabulary: int) -> list[list[int]]:
    g = torch.Generator().manual_seed(0)
    return [torch.randint(3, vocabulary, (n,), generator=g).tolist() for n in LENGTHS]


# the tests of a family follow one another where several processes share them
@lru_cache(maxsize=1)
def runner_of(path: Path) -> ModelRunner:
    return Lockstep(path, [8], dtype="bfloat16", block_size=16, max_num_batched_tokens=128).workers_runner()


def logits(runner: ModelRunner, parts: list[tuple[int, list[int], int, int]], others: int = 0) -> torch.Tensor:
    """Of the last token of each (block, text, start, end); all in one step, in which `others` run no tokens."""
    slices = [
        SequenceSlice(token_ids=text[start:end], start=start, block_ids=[block, block + 1], prompt_length=len(text))
        for block, text, start, end in parts
    ]
    return runner.run(slices, [sum(len(s.token_ids) for s in slices), *[0] * others]).float()


def rounded(path: Path) -> PreTrainedModel:
    with quiet_transformers():
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.bfloat16, attn_implementation="eager", experts_implementation="eager"
        )
    return model.eval()


def answers(model: PreTrainedModel) -> list[torch.Tensor]:
    with torch.no_grad():
        return [model(torch.tensor([text])).logits[0, -1].float() for text in texts(model.config.vocab_size)]


@pytest.mark.parametrize("family", list(FAMILIES))
def test_as_near_to_the_truth_as_transformers(
    lib: ctypes.CDLL, family: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tiny_checkpoint(family, tmp_path_factory)
    truth = torch.stack(answers(reference(path)))
    theirs = torch.stack(answers(rounded(path)))
    runner = runner_of(path)
    parts = [(2 * i, text, 0, len(text)) for i, text in enumerate(texts(truth.shape[1]))]
    ours = logits(runner, parts)
    # the median text: near a tie, the last bit decides on an expert, and then a text has another answer, here or there
    error, usual = ((got - truth).norm(dim=1).median() for got in (ours, theirs))
    assert error <= 1.5 * usual + 1e-3 * truth.norm(dim=1).median()


@pytest.mark.parametrize("family", list(FAMILIES))
def test_company_and_cuts_change_no_bit(
    lib: ctypes.CDLL, family: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tiny_checkpoint(family, tmp_path_factory)
    runner = runner_of(path)
    first, *others = texts(512)[:3]
    [alone] = logits(runner, [(0, first, 0, len(first))])
    company = [(2 * i + 2, text, 0, len(text)) for i, text in enumerate(others)]
    assert torch.equal(logits(runner, [*company, (10, first, 0, len(first))])[-1], alone)
    logits(runner, [(20, first, 0, 11)])
    logits(runner, [*company[:1], (20, first, 11, 29)])
    assert torch.equal(logits(runner, [(20, first, 29, 30), *company])[0], alone)
