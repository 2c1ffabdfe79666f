"""Whole models in bfloat16 over several workers of a node compute what one worker computes, for any placement."""

from __future__ import annotations

import ctypes
import random
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from elastic_moe.model.native.exchange import NativeExchange
from elastic_moe.model.native.layers import JointLayers, NativeHead
from elastic_moe.model.trunk.step_batch import SequenceSlice
from tests.model.families import tiny_checkpoint
from tests.model.groups import run_group
from tests.model.lockstep import Lockstep, request
from tests.model.native.test_models import LENGTHS, logits, texts
from tests.model.random_checkpoint import make_random_checkpoint


def lockstep(path: Path, slots: tuple[int, ...], **more: Any) -> Lockstep:
    return Lockstep(path, slots, dtype="bfloat16", block_size=16, max_num_batched_tokens=128, **more)


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


TOKENS, READY, ASKED, ANSWERED, HEADER = 0, 3, 4, 5, 7
"""Where a segment has words of its Header in exchange.h, and where its Header ends, in lines of 64 bytes."""


def segments_of(workers: Lockstep) -> list[torch.Tensor]:
    segments: list[torch.Tensor] = groups(workers)[0]._views  # type: ignore[attr-defined]
    return segments


def words(workers: Lockstep, line: int) -> list[int]:
    """A word of each rank."""
    return [int(segment[64 * line : 64 * line + 4].view(torch.int32)) for segment in segments_of(workers)]


@pytest.mark.parametrize("trunk_dtype", ["auto", "int8"])
def test_workers_without_tokens_help_the_one_that_has_a_few(lib: ctypes.CDLL, tmp_path: Path, trunk_dtype: str) -> None:
    path = make_random_checkpoint(tmp_path / "m", "qwen3_moe", hidden=256, layers=3, experts=6, dtype="bfloat16")
    workers = lockstep(path, (2, 2, 2), trunk_dtype=trunk_dtype)
    runners = [worker._runner for worker in workers.workers.values()]
    joints, heads = [runner._joint for runner in runners], [runner._shared_head for runner in runners]
    assert None not in (*joints, *heads)
    text = texts(512)[0]

    def answered() -> list[int]:
        return words(workers, ANSWERED)

    def decode(joints: list[JointLayers | None], heads: list[NativeHead | None]) -> torch.Tensor:
        """Logits of a prompt, and of some tokens after it, two at a time; the first worker has them all."""
        for runner, joint, head in zip(runners, joints, heads, strict=True):
            runner._joint, runner._shared_head = joint, head
        rows = []
        for start, end in [(0, 20), *((n, n + 2) for n in range(20, 30, 2))]:
            part = [(0, text, start, end)]
            steps = [lambda: logits(runners[0], part, others=2)]  # noqa: B023 - it is called in this turn
            steps += [partial(runner.run, [], [end - start, 0, 0]) for runner in runners[1:]]
            rows.append(run_group(3, lambda rank: steps[rank]())[0])  # noqa: B023
        return torch.cat(rows)

    nobody = [None] * 3
    alone = decode(nobody, nobody)
    assert answered() == [0, 0, 0]
    for helped in ((joints, nobody), (nobody, heads), (joints, heads)):
        before = answered()
        assert torch.equal(decode(*helped), alone)
        after = answered()
        assert after[0] == 0
        assert all(one < other for one, other in zip(before[1:], after[1:], strict=True))


def until(there: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not there():
        assert time.monotonic() < deadline
        time.sleep(0.001)


@pytest.mark.parametrize("before", [(2, 0, 0), (2, 3, 0), (20, 0, 0), (0, 2, 0)])
def test_helpers_keep_what_a_rank_may_still_read(lib: ctypes.CDLL, tmp_path: Path, before: tuple[int, ...]) -> None:
    """The first rank has not begun a step in which the second asks the third for help: it may still read what the third
    has computed for its last tokens."""
    path = make_random_checkpoint(tmp_path / "m", "qwen3_moe", hidden=256, layers=3, experts=6, dtype="bfloat16")
    workers = lockstep(path, (2, 2, 2))
    runners = [worker._runner for worker in workers.workers.values()]
    area, text, helped = segments_of(workers)[2][64 * HEADER :], texts(512)[0], 0

    def step(tokens: tuple[int, ...], rank: int) -> torch.Tensor:
        piece = SequenceSlice(token_ids=text[: tokens[rank]], start=0, block_ids=[0, 1], prompt_length=len(text))
        return runners[rank].run([piece] if tokens[rank] else [], list(tokens)).float()

    after = (0, 2, 0)
    expected = run_group(3, partial(step, after))[1]
    for _ in range(5):
        run_group(3, partial(step, before))
        kept, ready, answered = area.clone(), words(workers, READY), words(workers, ANSWERED)
        published = [number + 1 for number in words(workers, TOKENS)]
        with ThreadPoolExecutor(3) as pool:
            third = pool.submit(step, after, 2)
            until(lambda: words(workers, READY)[2] != ready[2])  # noqa: B023 - it is called in this turn
            second = pool.submit(step, after, 1)
            until(lambda: words(workers, TOKENS)[1:] == published[1:])  # noqa: B023
            same = torch.equal(area, kept)
            pool.submit(step, after, 0).result()
            third.result()
            assert torch.equal(second.result(), expected)
        # where the second rank had the last tokens, it has read everything
        assert same == (before[0] > 0)
        helped += words(workers, ANSWERED)[2] > answered[2]
    assert helped > 0


def test_ranks_that_run_ahead_compute_what_they_compute_alone(lib: ctypes.CDLL, tmp_path: Path) -> None:
    """Steps follow one another without a meeting: tokens of one rank, which the others help with, and of several."""
    path = make_random_checkpoint(tmp_path / "m", "qwen3_moe", hidden=256, layers=3, experts=6, dtype="bfloat16")
    workers = lockstep(path, (2, 2, 2))
    runners = [worker._runner for worker in workers.workers.values()]
    text, rng = texts(512)[0], random.Random(0)

    def step(tokens: Sequence[int], rank: int) -> torch.Tensor:
        piece = SequenceSlice(token_ids=text[: tokens[rank]], start=0, block_ids=[0, 1], prompt_length=len(text))
        return runners[rank].run([piece] if tokens[rank] else [], list(tokens)).float()

    alone = {}
    for count in (1, 3, 20):
        for rank in range(3):
            only = [count if other == rank else 0 for other in range(3)]
            alone[rank, count] = run_group(3, partial(step, only))[rank]
    steps = [[rng.choice((1, 3, 20)) if rng.random() < 0.5 else 0 for _ in range(3)] for _ in range(600)]

    def wrong(rank: int) -> list[int]:
        found = []
        for number, tokens in enumerate(steps):
            logits = step(tokens, rank)
            if tokens[rank] and not torch.equal(logits, alone[rank, tokens[rank]]):
                found.append(number)
        return found

    before = words(workers, ANSWERED)
    assert run_group(3, wrong) == [[], [], []]
    assert all(one < other for one, other in zip(before, words(workers, ANSWERED), strict=True))


def test_numbers_of_questions_that_have_wrapped_around_are_no_later_ones(lib: ctypes.CDLL, tmp_path: Path) -> None:
    path = make_random_checkpoint(tmp_path / "m", "qwen3_moe", hidden=256, layers=3, experts=6, dtype="bfloat16")
    workers = lockstep(path, (2, 2, 2))
    runners = [worker._runner for worker in workers.workers.values()]
    part = [(0, texts(512)[0], 0, 2)]

    def step(rank: int) -> torch.Tensor:
        return logits(runners[0], part, others=2) if rank == 0 else runners[rank].run([], [2, 0, 0])

    first = run_group(3, step)[0]
    for line in (ASKED, ANSWERED, READY):
        for segment in segments_of(workers):
            # as if so many questions had been asked since the rank took part in one
            segment[64 * line : 64 * line + 4].view(torch.int32).fill_(2**31 - 1)
        run_group(3, lambda rank: runners[rank].run([], [0, 0, 0]))
        before = words(workers, ANSWERED)
        for _ in range(5):
            assert torch.equal(run_group(3, step)[0], first)
        assert words(workers, ANSWERED) != before


def test_nobody_waits_for_an_output_head_that_is_not_asked_for(lib: ctypes.CDLL, tmp_path: Path) -> None:
    path = make_random_checkpoint(tmp_path / "m", "qwen3_moe", hidden=256, layers=2, experts=4, dtype="bfloat16")
    workers = lockstep(path, (2, 2))
    first, other = (worker._runner for worker in workers.workers.values())

    def step(rank: int, *, logits: bool) -> int:
        piece = SequenceSlice(token_ids=[5, 6], start=0, block_ids=[0], prompt_length=4, wants_logits=logits)
        return len((other if rank else first).run([] if rank else [piece], [2, 0]))

    assert run_group(2, partial(step, logits=False))[0] == 0
    assert run_group(2, partial(step, logits=True))[0] == 1


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
