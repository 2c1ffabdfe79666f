"""Families with latent attention, with an indexer, and inside of models that take images, against transformers' own.

The text models are compared with the same text part as transformers computes it in the whole model.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, PreTrainedModel

from elastic_moe.cluster.fit import Part
from elastic_moe.model.checkpoints.quiet import quiet_transformers
from elastic_moe.model.transformers_private import causal_class, multimodal_class
from elastic_moe.model.trunk.step_batch import SequenceSlice
from tests.model.disturbed import answers_disturbed
from tests.model.families import HYBRIDS, WRAPPED, tiny_checkpoint
from tests.model.lockstep import Lockstep, request

LATENT = ("glm4_moe_lite", "mistral4", "axk1")
SPARSE = ("deepseek_v32", "glm_moe_dsa")
CASES = (*LATENT, *SPARSE, *WRAPPED)
LENGTHS = (1, 5, 13, 45)
"""The longest prompt is expanded as a whole, and its second part is absorbed."""
COMPARED = (5, 45)
NEW_TOKENS = 24


@cache
def reference(path: Path, whole: bool) -> PreTrainedModel:
    config = AutoConfig.from_pretrained(path)
    kind: Any = multimodal_class(config) if whole else causal_class(config)
    with quiet_transformers():
        model: PreTrainedModel = kind.from_pretrained(
            path, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
        )
    return model.eval()


def prompts() -> list[list[int]]:
    g = torch.Generator().manual_seed(0)
    return [torch.randint(3, 300, (n,), generator=g).tolist() for n in LENGTHS]


def slices(parts: list[tuple[list[int], int, int]]) -> list[SequenceSlice]:
    return [
        SequenceSlice(
            token_ids=text[start:end], start=start, block_ids=range(12 * n, 12 * n + 12), prompt_length=len(text)
        )
        for n, (text, start, end) in enumerate(parts)
    ]


@pytest.mark.parametrize("case", [case for case in CASES if case not in WRAPPED or WRAPPED[case][0] not in HYBRIDS])
def test_logits_of_mixed_prompts_whole_and_in_chunks(case: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tiny_checkpoint(case, tmp_path_factory)
    cluster = Lockstep(path, [8], max_num_batched_tokens=128)
    runner = cluster.workers_runner()
    texts = prompts()
    with torch.no_grad():
        model = reference(path, case in WRAPPED)
        expected = torch.stack([model(input_ids=torch.tensor([text])).logits[0, -1] for text in texts])
    got = runner.run(slices([(text, 0, len(text)) for text in texts]), [64])
    assert (got - expected).abs().max() < 1e-4
    runner.run(slices([(text, 0, len(text) * 4 // 5) for text in texts if len(text) > 1]), [50])
    got = runner.run(slices([(text, len(text) * 4 // 5, len(text)) for text in texts if len(text) > 1]), [14])
    assert (got - expected[1:]).abs().max() < 1e-4
    if case in (*LATENT, *SPARSE):
        [worker] = cluster.workers.values()
        assert all(
            row.modules.startswith(("latents of 32+", "indexer keys of 16")) for row in worker.report.of(Part.ATTENTION)
        )


@pytest.mark.parametrize("case", CASES)
def test_greedy_tokens_on_one_and_on_three_workers_whatever_happens(
    case: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tiny_checkpoint(case, tmp_path_factory)
    texts = [text for text in prompts() if len(text) in COMPARED]
    expected = []
    for text in texts:
        with torch.no_grad():
            out = reference(path, case in WRAPPED).generate(
                input_ids=torch.tensor([text]),
                max_new_tokens=NEW_TOKENS,
                min_new_tokens=NEW_TOKENS,
                do_sample=False,
                eos_token_id=None,
            )
        expected.append(out[0, len(text) :].tolist())
    cluster = Lockstep(path, [8], max_num_batched_tokens=64)
    got = cluster.run([request(f"r{len(text)}", text, max_tokens=NEW_TOKENS) for text in texts])
    assert list(got.values()) == expected
    cluster = Lockstep(path, (3, 3, 2), kv_blocks=20)
    *answers, again = answers_disturbed(cluster, texts * 3, NEW_TOKENS)
    assert answers == expected * 3
    assert again == expected[-1][: len(again)]
