"""The benchmark of migrations runs whole on a CPU, and on a GPU that is pretended."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from elastic_moe.cluster.facts.transfers import AT_ONCE_ON_GPUS
from tests.bench import gpu_migration
from tests.bench.gpu_migration import ON_GPU, Bench, Store, ceilings, checkpoint, measure, report
from tests.model import pretended_cuda
from tests.model.pretended_tensors import OnDevice, entered


def rows(text: str) -> dict[str, list[str]]:
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    return {line[0]: line[1:] for line in lines}


def test_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_migration, "USUAL_STEPS", 5)
    monkeypatch.setattr(gpu_migration, "WARM_STEPS", 2)
    text = measure(None, "cpu", 2, 2)
    found = rows(text)
    [bundled] = [name for name in found if name.endswith(f", {AT_ONCE_ON_GPUS} at a time")]
    for name in ("to pinned memory", "by one core of the host", "bundles of 1, 1 at a time", bundled, ON_GPU):
        assert float(found[name][0]) > 0
    assert float(found["flips of 8 experts before them"][0]) > 0
    share, longest = re.search(r"(\d+)% of the copy rate .* step ([\d.]+) times", text).groups()  # type: ignore[union-attr]
    assert int(share) < 100
    assert float(longest) > 0


def test_copies_and_a_flip_on_a_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second set has the experts of the first, in its slots, whole."""
    monkeypatch.setattr(gpu_migration, "USUAL_STEPS", 3)
    monkeypatch.setattr(gpu_migration, "WARM_STEPS", 2)
    path = checkpoint(tmp_path, "cpu", 1)
    pretended_cuda.pretend(monkeypatch)
    monkeypatch.setattr(gpu_migration, "ThreadPoolExecutor", pretended_cuda.Threads)
    monkeypatch.setattr(gpu_migration, "MOST_TOKENS", 300)
    monkeypatch.setattr(Bench, "bundle", 5)
    monkeypatch.setattr(gpu_migration, "KV_BYTES", 4 << 20)
    with entered():
        bench = Bench(path, "cuda", 2)
        usual, copies, flips = bench.run()
        for layer, wanted in enumerate(bench.then):
            assert bench.peer.held(layer) == wanted
            for expert in wanted:
                theirs, own = (store.get(layer, expert) for store in (bench.peer, bench.worker.loaded.store))
                for name, tensor in theirs.items():
                    assert isinstance(tensor, OnDevice)
                    assert torch.equal(tensor.near, own[name].near)  # type: ignore[attr-defined]
        text = report(ceilings(bench.device, bench.expert_bytes), bench.expert_bytes, usual, copies, flips, None)
    assert f"bundles of 5, {AT_ONCE_ON_GPUS} at a time" in rows(text) or not copies[-1].steps_s
    assert Store.memory is None, "each thread has its own"
