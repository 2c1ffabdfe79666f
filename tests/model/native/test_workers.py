"""Whole models in bfloat16 over several workers of a node compute what one worker computes, for any placement."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest
import torch

from elastic_moe.model.native.exchange import NativeExchange
from tests.model.families import tiny_checkpoint
from tests.model.groups import run_group
from tests.model.lockstep import Lockstep, request
from tests.model.native.test_models import LENGTHS, logits, texts


def lockstep(path: Path, slots: tuple[int, ...]) -> Lockstep:
    return Lockstep(path, slots, dtype="bfloat16", block_size=16, max_num_batched_tokens=128)


def groups(workers: Lockstep) -> list[object]:
    return [worker._epoch.exchange for worker in workers.workers.values() if worker._epoch is not None]


def first_logits(workers: Lockstep, vocabulary: int) -> torch.Tensor:
    """Of all texts, run by the first worker; the others compute their experts."""
    runners = [worker._runner for worker in workers.workers.values()]
    parts = [(2 * i, text, 0, len(text)) for i, text in enumerate(texts(vocabulary))]

    def run(rank: int) -> torch.Tensor:
        if rank == 0:
            return logits(runners[0], parts, others=len(runners) - 1)
        return runners[rank].run([], [sum(LENGTHS), *[0] * (len(runners) - 1)])

    return run_group(len(runners), run)[0]


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "gpt_oss"])
def test_several_workers_compute_what_one_does(
    lib: ctypes.CDLL, family: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tiny_checkpoint(family, tmp_path_factory)
    alone = first_logits(lockstep(path, (8,)), 512)
    workers = lockstep(path, (3, 3, 2))
    assert all(isinstance(group, NativeExchange) for group in groups(workers))
    together = first_logits(workers, 512)
    # the median text: partial sums meet in another order, and near a tie the last bit decides on an expert
    assert ((together - alone).norm(dim=1) / alone.norm(dim=1)).median() < 0.02


def test_an_epoch_of_the_same_members_keeps_the_exchange(
    lib: ctypes.CDLL, tmp_path_factory: pytest.TempPathFactory
) -> None:
    workers = lockstep(tiny_checkpoint("mixtral", tmp_path_factory), (4, 4))
    before = groups(workers)
    prompts = [request(f"r{n}", text, max_tokens=6) for n, text in enumerate(texts(512)[:3])]
    for r in prompts:
        workers.scheduler.add(r)
    workers.step()
    assert workers.replace(workers.shuffled(3), (4, 4)) > 0
    done = {r.request_id for r in prompts}
    for _ in range(50):
        done -= {output.request_id for output in workers.step() if output.finish_reason is not None}
    assert not done
    assert all(a is b for a, b in zip(before, groups(workers), strict=True))
