"""Layers with a sliding window keep no more blocks than the window needs, and compute what transformers computes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from elastic_moe.cluster.messages.requests import GenerateRequest
from elastic_moe.cluster.messages.seats import LiveBlocks
from elastic_moe.cluster.messages.steps import WindowBlocks
from elastic_moe.model.trunk.kv_cache import KVCache
from elastic_moe.model.trunk.step_batch import SequenceSlice
from tests.model.families import WINDOWED, tiny_checkpoint
from tests.model.lockstep import Lockstep, request
from tests.model.test_parity import greedy, reference

NEW_TOKENS = 40
LENGTHS = (5, 30, 75)
"""The window has 8 tokens, and a block 4."""


@pytest.fixture(scope="module", params=[*WINDOWED, "mixtral-sliding"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(request.param, tmp_path_factory)


@pytest.fixture(scope="module")
def gpt_oss(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint("gpt_oss-short", tmp_path_factory)


def texts() -> list[list[int]]:
    g = torch.Generator().manual_seed(5)
    return [torch.randint(3, 500, (n,), generator=g).tolist() for n in LENGTHS]


class Held:
    """Blocks of a sequence's window, given as the scheduler gives them."""

    def __init__(self, free: list[int]) -> None:
        self.live = LiveBlocks()
        self._free = free

    def move(self, cache: KVCache, start: int, end: int) -> None:
        """Give back what tokens from `start` on do not read, and get blocks up to `end`."""
        assert cache.windows is not None
        before = self.live.ids.copy()
        self.live.drop_before(cache.windows.first_block(start, cache.block_size))
        self._free += before[: len(before) - len(self.live.ids)]
        last = self.live.first + len(self.live.ids)
        count = -(-end // cache.block_size) - last
        self.live.put(WindowBlocks(first=last, ids=tuple(self._free.pop(0) for _ in range(count))))


def spoil(cache: KVCache, blocks: Sequence[int]) -> None:
    """What nobody holds is not to be read."""
    assert cache.windows is not None
    for layer in cache.windows.layers:
        for store in cache.stores(layer):
            store[:, list(blocks)] = math.nan


@pytest.mark.parametrize("cuts", [(75,), (3, 9, 10, 30, 31, 32, 75)], ids=str)
def test_logits_of_mixed_prompts(checkpoint: Path, cuts: tuple[int, ...]) -> None:
    """Prompts of up to nine windows in one batch, chunked and not: logits within 1e-4 at the end of each chunk."""
    [worker] = Lockstep(checkpoint, [8]).workers.values()
    cache = worker.loaded.cache
    free = list(range(60))
    held = [Held(free) for _ in LENGTHS]
    for first, last in zip((0, *cuts), cuts, strict=False):
        pieces = {
            number: SequenceSlice(
                token_ids=text[first:last],
                start=first,
                block_ids=range(number * 20, number * 20 + 20),
                windows=held[number].live,
                prompt_length=len(text),
            )
            for number, text in enumerate(texts())
            if len(text) > first
        }
        for number, piece in pieces.items():
            held[number].move(cache, piece.start, piece.end)
        spoil(cache, free)
        rows = worker._runner.run([*pieces.values()], [sum(len(piece.token_ids) for piece in pieces.values())])
        for row, (number, piece) in zip(rows, pieces.items(), strict=True):
            with torch.no_grad():
                expected = reference(checkpoint)(torch.tensor([texts()[number][: piece.end]])).logits[0, -1]
            assert (row - expected).abs().max() < 1e-4, f"prompt of {LENGTHS[number]} tokens up to {piece.end}"


def serve(cluster: Lockstep, requests: Sequence[GenerateRequest], lose_every: int = 0) -> dict[str, list[int]]:
    """Run the requests. After each step, none that decodes holds more blocks than its window needs.

    `lose_every`: after so many steps, those in flight are dropped and run again.
    """
    tokens: dict[str, list[int]] = {r.request_id: [] for r in requests}
    for one in requests:
        cluster.scheduler.add(one)
    turns = 0
    while cluster.scheduler.num_requests:
        turns += 1
        for output in cluster.step():
            tokens[output.request_id] += output.token_ids
        cluster.scheduler.validate()
        if lose_every and turns % lose_every == 0:
            cluster.send()
            cluster.lose_steps()
    return tokens


def compare(cluster: Lockstep, path: Path, *, copies: int = 1, lose_every: int = 0) -> None:
    """Serve prompts, several of each, and compare their answers with transformers'."""
    prompts = texts() * copies
    names = [f"r{cluster.steps}-{number}" for number in range(len(prompts))]
    asked = [request(name, text, max_tokens=NEW_TOKENS) for name, text in zip(names, prompts, strict=True)]
    got = serve(cluster, asked, lose_every)
    for name, text in zip(names, prompts, strict=True):
        assert got[name] == greedy(path, text, NEW_TOKENS, claimed=got[name]), name


@pytest.mark.parametrize("slots", [(8,), (3, 3, 2)], ids=str)
def test_greedy_tokens_for_any_number_of_workers(checkpoint: Path, slots: tuple[int, ...]) -> None:
    compare(Lockstep(checkpoint, slots), checkpoint)


def test_a_long_answer_takes_as_many_blocks_as_a_short_one(gpt_oss: Path) -> None:
    used = {}
    for count in (20, 100):
        cluster = Lockstep(gpt_oss, [8], prefix_caching=False)
        [cache] = cluster.scheduler._caches.by_worker.values()
        assert cache.windows is not None
        pool, most = cache.windows.pool, 0
        cluster.scheduler.add(request("one", texts()[0], max_tokens=count))
        while cluster.scheduler.num_requests:
            cluster.step()
            most = max(most, pool.num_blocks - pool.num_free)
        used[count] = most
    # the last 8 tokens lie in up to three blocks of 4
    assert used == {20: 3, 100: 3}


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_steps_that_are_run_again_change_nothing(gpt_oss: Path, depth: int) -> None:
    compare(Lockstep(gpt_oss, [4, 4], depth=depth), gpt_oss, lose_every=3)


def test_a_prefix_goes_on_from_a_window(checkpoint: Path) -> None:
    cluster = Lockstep(checkpoint, [8])
    compare(cluster, checkpoint)
    assert cluster.scheduler.status().prefix_hits == 0
    compare(cluster, checkpoint)
    # the last full blocks that leave a token to run hold 4, 28 and 72
    assert cluster.scheduler.status().prefix_hits == 4 + 28 + 72
    [long] = [text for text in texts() if len(text) == 75]
    branch = [*long[:42], *long[:20]]
    assert serve(cluster, [request("branch", branch, max_tokens=8)])["branch"] == greedy(checkpoint, tuple(branch), 8)
    assert cluster.scheduler.status().prefix_hits == 4 + 28 + 72 + 40, "the middle of a prompt is a prefix too"


def test_requests_are_preempted_and_computed_again(gpt_oss: Path) -> None:
    cluster = Lockstep(gpt_oss, [4, 4], kv_blocks=40)
    compare(cluster, gpt_oss, copies=3)
    assert cluster.scheduler.status().preemptions > 0


def test_little_memory_cuts_prompts_and_makes_requests_wait(gpt_oss: Path) -> None:
    """Memory for one sequence of full length and its chunk: more sequences run as far as their windows fit."""
    [worker] = Lockstep(gpt_oss, [8]).workers.values()
    sizes = worker.loaded.memory.sizes()
    cluster = Lockstep(gpt_oss, [8], kv_cache_bytes=sizes.one)
    [small] = cluster.workers.values()
    assert small.window_room is not None
    assert small.window_room.blocks == sizes.first_window
    assert small.loaded.cache.nbytes == sizes.one
    compare(cluster, gpt_oss, copies=3)


def test_requests_of_a_worker_that_is_gone_are_computed_again(gpt_oss: Path) -> None:
    cluster = Lockstep(gpt_oss, [4, 4])
    blocks = {worker: cache.pool.num_blocks for worker, cache in cluster.scheduler._caches.by_worker.items()}
    rooms = {name: worker.window_room for name, worker in cluster.workers.items() if worker.window_room is not None}
    tokens: dict[str, list[int]] = {f"r{len(text)}": [] for text in texts()}
    for name, text in zip(tokens, texts(), strict=True):
        cluster.scheduler.add(request(name, text, max_tokens=NEW_TOKENS))
    turns = moved = 0
    while cluster.scheduler.num_requests:
        turns += 1
        if turns in (6, 20):
            while cluster.flights:
                cluster.land()
            gone = list(blocks)[turns % 4 // 2]
            others = {worker: count for worker, count in blocks.items() if worker != gone}
            moved += cluster.scheduler.set_workers(others, window_rooms=rooms)
            cluster.workers[gone].forget_sequences()
            cluster.scheduler.set_workers(blocks, window_rooms=rooms)
        for output in cluster.step():
            tokens[output.request_id] += output.token_ids
    assert moved > 1
    for text in texts():
        answer = tokens[f"r{len(text)}"]
        assert answer == greedy(gpt_oss, text, NEW_TOKENS, claimed=answer)
