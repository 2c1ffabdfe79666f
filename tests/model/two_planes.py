"""Two workers with processes of their own that share a GPU, or its fake on "cpu": their tokens, and the loss of one."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from elastic_moe.cluster.errors import StepAborted
from elastic_moe.cluster.placement import WorkerId
from elastic_moe.model.trunk.step_batch import SequenceSlice
from tests.model.lockstep import Lockstep, request
from tests.model.remote_planes import RemotePlane

KV_BYTES = 16 << 20


@contextmanager
def cluster_of_two(path: Path, device: str, **options: Any) -> Iterator[Lockstep]:
    planes: list[RemotePlane] = []

    def plane(spec: object) -> RemotePlane:
        planes.append(RemotePlane(spec))  # type: ignore[arg-type]
        return planes[-1]

    try:
        # without a number, each would take most of what is free when both begin
        cluster = Lockstep(
            path, [4, 4], device=device, transport="ipc", plane=plane, kv_cache_bytes=KV_BYTES, **options
        )
        assert [plane.exchange() for plane in planes] == ["DeviceMemoryTransport"] * 2
        yield cluster
    finally:
        for plane in planes:
            plane.end()


def tokens_across_replacements(path: Path, device: str, prompt: Sequence[int], count: int) -> list[int]:
    """Greedy tokens of a request during which experts change places twice."""
    with cluster_of_two(path, device) as cluster:
        cluster.scheduler.add(request("one", prompt, max_tokens=count))
        tokens: list[int] = []
        for step in range(100):
            if step in (10, 30):
                assert cluster.replace(cluster.shuffled(step), [4, 4]) > 0
            for output in cluster.step():
                tokens += output.token_ids
        return tokens


def logits_of_two(path: Path, device: str, texts: Sequence[Sequence[int]], **options: Any) -> tuple[Tensor, bool]:
    """Logits after each token of the texts from the fourth on: the first worker reads four tokens of all, and goes on
    by one; the second has nothing to do in some steps, and else a text of its own. Experts change places in between.
    Also whether all steps were replayed from graphs.
    """
    with cluster_of_two(path, device, **options) as cluster:
        planes, found, steps = list(cluster.workers.values()), [], 0
        for begin, end in ((0, 4), *((n, n + 1) for n in range(4, min(map(len, texts))))):
            if begin == 6:
                assert cluster.replace(cluster.shuffled(3), [4, 4]) > 0
            own = [_piece(text, begin, end, n) for n, text in enumerate(texts)]
            other = [_piece(texts[0], 0, begin, 0)] if begin % 2 else []
            sizes = [sum(len(piece.token_ids) for piece in pieces) for pieces in (own, other)]
            pending = [
                cluster.pool.submit(plane.logits, pieces, sizes)  # type: ignore[attr-defined]
                for plane, pieces in zip(planes, (own, other), strict=True)
            ]
            found.append(pending[0].result(timeout=60))
            pending[1].result(timeout=60)
            steps += 1
        return torch.stack(found), all(plane.launched()[1] == steps for plane in planes)  # type: ignore[attr-defined]


def _piece(text: Sequence[int], start: int, end: int, number: int) -> SequenceSlice:
    blocks = list(range(8 * number, 8 * number + 8))
    return SequenceSlice(token_ids=text[start:end], start=start, block_ids=blocks, prompt_length=len(text))


def seconds_until_a_lost_worker_is_noticed(path: Path, device: str, prompt: Sequence[int]) -> float:
    """Kill a worker while steps run, and abort the other's step, as the coordinator does."""
    with cluster_of_two(path, device) as cluster:
        cluster.scheduler.add(request("one", prompt, max_tokens=64))
        for _ in range(5):
            cluster.step()
        cluster.send()
        cluster.workers[WorkerId("w1")].process.kill()  # type: ignore[attr-defined]
        begin = time.monotonic()
        for _ in range(3):
            # sooner or later a step needs the worker that is gone
            cluster.send()
            flight = cluster.flights.popleft()
            if flight[WorkerId("w1")].exception(timeout=60) is not None:
                break
        survivor = cluster.workers[WorkerId("w0")]
        survivor.abort_step(cluster.epoch)
        with pytest.raises(StepAborted):
            flight[WorkerId("w0")].result(timeout=60)
        return time.monotonic() - begin
