"""Whole models whose experts lie partly on the disk compute what they compute from memory, bit for bit."""

from __future__ import annotations

import logging
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from elastic_moe.cluster.errors import UserError
from elastic_moe.cluster.messages.epochs import Epoch, FetchSource
from elastic_moe.cluster.placement import Tier
from elastic_moe.model.experts.cpu import CpuExperts
from elastic_moe.model.native import unavailable
from elastic_moe.model.tiers.tiers import Tiers
from elastic_moe.model.worker.data_plane import DataPlane
from tests.model.families import tiny_checkpoint
from tests.model.groups import run_group
from tests.model.lockstep import Lockstep, request
from tests.model.native.test_models import LENGTHS, logits, texts
from tests.model.packing import CASES, pack_checkpoint


def all_logits(cluster: Lockstep) -> list[torch.Tensor]:
    """Of all texts, twice, run by the first worker; the others compute their experts."""
    runners = [worker._runner for worker in cluster.workers.values()]
    parts = [(2 * i, text, 0, len(text)) for i, text in enumerate(texts(512))]

    def run(rank: int) -> torch.Tensor:
        if rank == 0:
            return logits(runners[0], parts, others=len(runners) - 1)
        return runners[rank].run([], [sum(LENGTHS), *[0] * (len(runners) - 1)])

    return [run_group(len(runners), run)[0] for _ in range(2)]


def prompts(count: int) -> list[tuple[int, ...]]:
    rng = np.random.default_rng(0)
    return [tuple(int(n) for n in rng.integers(3, 500, 5 + 7 * i)) for i in range(count)]


def tokens(cluster: Lockstep) -> dict[str, list[int]]:
    return dict(cluster.run([request(f"r{i}", text, max_tokens=12) for i, text in enumerate(prompts(4))]))


@pytest.mark.parametrize(
    ("family", "dtype", "expert_dtype", "slots"),
    [
        ("gpt_oss", "float32", "auto", (4, 4)),
        ("qwen3_moe", "bfloat16", "auto", (8,)),
        ("gpt_oss", "bfloat16", "auto", (4, 4)),
        ("qwen3_moe", "bfloat16", "int8", (8,)),
        ("qwen3_moe in mxfp8", "bfloat16", "auto", (8,)),
        ("qwen3_moe in nvfp4", "bfloat16", "auto", (8,)),
    ],
)
def test_logits_have_the_same_bits_wherever_experts_lie(
    family: str,
    dtype: str,
    expert_dtype: str,
    slots: tuple[int, ...],
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    family, _, packed = family.partition(" in ")
    if (packed or expert_dtype == "int8") and unavailable() is not None:
        pytest.skip(f"no native library: {unavailable()}")
    path = tiny_checkpoint(family, tmp_path_factory)
    if packed:
        path, _ = pack_checkpoint(path, tmp_path / "checkpoint", CASES[packed])
    more = {"dtype": dtype, "expert_dtype": expert_dtype, "block_size": 16, "max_num_batched_tokens": 128}
    expected = all_logits(Lockstep(path, slots, **more))[0]  # type: ignore[arg-type]
    for pinned, cache_slots in ((0, 1), (slots[0] // 2, 1)):
        cluster = Lockstep(path, slots, pinned=pinned, cache_slots=cache_slots, cache_dir=tmp_path, **more)  # type: ignore[arg-type]
        for got in all_logits(cluster):
            assert torch.equal(got, expected)
        counts = [worker.tier_counts() for worker in cluster.workers.values()]
        assert all(count.accesses[Tier.DISK] > 0 for count in counts)
        most = (pinned + cache_slots) * cluster.info.num_layers
        assert all(count.resident <= most for count in counts)
    # the last cluster found a record of every expert that was needed before
    assert all(count.fetched_bytes[FetchSource.CHECKPOINT] == 0 for count in counts)


@pytest.mark.parametrize("policy", ["lfru", "lru", "lfu", "lifo"])
def test_float32_tokens_do_not_depend_on_the_tiers(
    policy: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tiny_checkpoint("qwen3_moe", tmp_path_factory)
    expected = tokens(Lockstep(path, (4, 4)))
    cluster = Lockstep(path, (4, 4), pinned=1, cache_dir=tmp_path, policy=policy)
    assert tokens(cluster) == expected


def test_experts_change_their_tiers_while_requests_run(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tiny_checkpoint("qwen3_moe", tmp_path_factory)
    expected = tokens(Lockstep(path, (8,)))
    cluster = Lockstep(path, (8,), pinned=1, cache_dir=tmp_path)
    worker = next(iter(cluster.workers.values()))
    tiers = cluster.placement.tiers
    got: dict[str, list[int]] = {f"r{i}": [] for i in range(4)}
    for i, text in enumerate(prompts(4)):
        cluster.scheduler.add(request(f"r{i}", text, max_tokens=12))
    ended: set[str] = set()
    for number in range(200):
        for output in cluster.step():
            got[output.request_id] += output.token_ids
            if output.finish_reason is not None:
                ended.add(output.request_id)
        if len(ended) == 4:
            break
        # at every third step another expert of each layer is the one in the device
        if number % 3 == 0:
            while cluster.flights:
                cluster.landed += cluster.scheduler.commit(
                    {w: future.result(timeout=60) for w, future in cluster.flights.popleft().items()}
                )
            tiers = np.roll(tiers, 1, axis=1)
            new = cluster.placement_with(tiers)
            held = [new.resident(worker.spec.worker, layer) for layer in range(new.num_layers)]
            worker.read_experts([(layer, e) for layer, row in enumerate(held) for e in row])
            cluster._flip(new)
            assert worker.held() == tuple(tuple(sorted(row)) for row in held)
    assert got == expected


def test_what_was_brought_for_an_abandoned_epoch_leaves(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At once, or when the step that runs has ended: the control plane brings the next experts into the same memory."""
    cluster = Lockstep(tiny_checkpoint("qwen3_moe", tmp_path_factory), (8,), pinned=1, cache_dir=tmp_path)
    worker = next(iter(cluster.workers.values()))
    joins = DataPlane(worker.spec)
    joins.load()
    for one in (joins, worker):
        placed = one.held()
        one.read_experts([(0, 5)])
        assert one.held() != placed
        one.abandon(Epoch(9))
        assert one.held() == placed
    worker.read_experts([(0, 5)])
    brought, run = worker.held(), worker._runner.run
    during = []

    def run_meanwhile(*args: Any, **kwargs: Any) -> torch.Tensor:
        worker.abandon(Epoch(9))
        during.append(worker.held())
        return run(*args, **kwargs)

    monkeypatch.setattr(worker._runner, "run", run_meanwhile)
    cluster.run([request("r", prompts(1)[0], max_tokens=2)])
    assert (during[0], worker.held()) == (brought, placed)


def test_the_cache_area_of_an_idle_worker_makes_room_at_once(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """What arrives for a coming epoch takes the memory of what the area held, also if no step runs."""
    cluster = Lockstep(
        tiny_checkpoint("qwen3_moe", tmp_path_factory), (8,), pinned=1, cache_slots=3, cache_dir=tmp_path
    )
    worker = next(iter(cluster.workers.values()))
    cluster.run([request("r", prompts(2)[1], max_tokens=4)])
    before = worker.tier_counts().resident
    assert before + 6 > worker.capacity
    worker.read_experts([(0, 5), (0, 6), (1, 6), (1, 7), (2, 7)])
    assert worker.tier_counts().resident <= worker.capacity
    worker.import_experts(worker.export_experts([(2, 6)]))
    assert [set(row) for row in worker.held()] == [{0, 5, 6}, {0, 6, 7}, {0, 6, 7}]
    assert worker.tier_counts().resident <= worker.capacity


def test_damaged_and_foreign_records_are_read_again_from_the_checkpoint(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, caplog: pytest.LogCaptureFixture
) -> None:
    path = tiny_checkpoint("qwen3_moe", tmp_path_factory)
    expected = tokens(Lockstep(path, (8,), pinned=1, cache_dir=tmp_path))
    [folder] = tmp_path.iterdir()
    records = sorted(folder.iterdir())
    whole = [record.read_bytes() for record in records]
    damaged = bytearray(whole[0])
    damaged[5000] ^= 1
    records[0].write_bytes(damaged)
    records[1].write_bytes(whole[1][:-4096])
    records[2].write_bytes(whole[3])
    with caplog.at_level(logging.WARNING):
        cluster = Lockstep(path, (8,), pinned=1, cache_dir=tmp_path)
        assert tokens(cluster) == expected
    assert sum("read again from the checkpoint" in record.message for record in caplog.records) == 1
    counts = next(iter(cluster.workers.values())).tier_counts()
    assert counts.fetched_bytes[FetchSource.CHECKPOINT] > 0
    assert [record.read_bytes() for record in records] == whole
    # a record of another layout lies in another folder
    Lockstep(path, (8,), dtype="float16", pinned=1, cache_dir=tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


def test_where_memory_is_short_the_kv_cache_gives_way_to_experts_but_not_further_than_one_sequence_and_the_seats(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster = Lockstep(tiny_checkpoint("qwen3_moe", tmp_path_factory), (8,))
    [loaded] = cluster.workers.values()
    least = (loaded.spec.model.max_model_len // 4 + 8 - 1) * loaded.loaded.memory.sizes().block_bytes
    expert_bytes, layers = cluster.info.expert_bytes, cluster.info.num_layers

    def load_with(available: float, **fields: Any) -> tuple[DataPlane, int]:
        memory = SimpleNamespace(available=int(available), total=1 << 50)
        monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
        worker = DataPlane(replace(loaded.spec, **fields))
        return worker, worker.load()[0]

    worker, blocks = load_with((least + 4.1 * layers * expert_bytes) / 0.9)
    assert (worker.capacity, blocks) == (int(4.1 * layers), 128 // 4 + 8 - 1)
    assert [len(row) for row in worker.held()] == [3] * layers, "a fourth slot of each layer is the cache area"
    kv = 100 * loaded.loaded.memory.sizes().block_bytes
    worker, blocks = load_with((kv + 2.1 * layers * expert_bytes) / 0.9, kv_cache_bytes=kv)
    assert (worker.capacity, blocks) == (int(2.1 * layers), 100)
    with pytest.raises(UserError, match=f"w0 has memory for 1 expert .*, and needs {layers * expert_bytes} bytes"):
        load_with((least + 1.5 * expert_bytes) / 0.9)
    with pytest.raises(UserError, match=f"--expert-memory-bytes: expected at least {layers * expert_bytes} bytes"):
        load_with(1 << 40, expert_memory_bytes=layers * expert_bytes - 1)


def test_without_a_directory_for_records_the_checkpoint_serves(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, caplog: pytest.LogCaptureFixture
) -> None:
    path = tiny_checkpoint("qwen3_moe", tmp_path_factory)
    expected = tokens(Lockstep(path, (8,)))
    a_file = tmp_path / "file"
    a_file.write_text("")
    with caplog.at_level(logging.WARNING):
        cluster = Lockstep(path, (8,), pinned=1, cache_dir=a_file)
        assert tokens(cluster) == expected
    assert sum("--expert-cache-dir" in record.message for record in caplog.records) == 1
    counts = next(iter(cluster.workers.values())).tier_counts()
    assert counts.fetched_bytes[FetchSource.DISK] == 0 < counts.fetched_bytes[FetchSource.CHECKPOINT]


def test_workers_of_several_nodes_share_the_misses_of_a_step(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tiny_checkpoint("qwen3_moe", tmp_path_factory)
    expected = tokens(Lockstep(path, (6, 2)))
    # the threads of one process get the disk in any order
    monkeypatch.setattr(Tiers, "fetch_s", 0.001)
    cluster = Lockstep(path, (6, 2), pinned=1, cache_dir=tmp_path, transport="tcp")
    assert tokens(cluster) == expected
    misses = [worker.tier_counts().accesses[Tier.DISK] for worker in cluster.workers.values()]
    # by the placement, the first one would have forty times those of the other
    assert 20 < max(misses) < 2 * min(misses)


@pytest.mark.parametrize(("dtype", "transport"), [("bfloat16", "shm"), ("float32", "tcp")])
def test_where_all_are_in_memory_no_step_runs_code_of_the_tiers(
    dtype: str, transport: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tiny_checkpoint("qwen3_moe", tmp_path_factory)

    def rooms(**more: Any) -> set[str]:
        """The folders of the functions that the steps call."""
        cluster = Lockstep(path, (4, 4), dtype=dtype, transport=transport, **more)
        called: set[str] = set()
        threading.setprofile(lambda frame, event, argument: called.add(frame.f_code.co_filename))
        try:
            cluster.run([request("r", prompts(1)[0], max_tokens=2)])  # its steps run in threads that begin now
        finally:
            threading.setprofile(None)
        worker = next(iter(cluster.workers.values()))
        assert (worker._experts.tiers is None) == (not more)
        natives = [layer.native for layer in worker.loaded.fit.experts if isinstance(layer, CpuExperts)]
        assert all(native is None or (native.supply is None) == (not more) for native in natives)
        return {file for file in called if any(part in file for part in ("model/tiers", "buffering", "dealing"))}

    assert not rooms()
    assert rooms(pinned=1, cache_dir=tmp_path)
