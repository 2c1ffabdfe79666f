"""What decode graphs read: the rows of a step, and empty rows after them. tests/model/test_cuda.py records graphs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from elastic_moe.cluster.messages.seats import LiveBlocks
from elastic_moe.model.experts.store import ExpertStore
from elastic_moe.model.graph_pieces import GraphTerms
from elastic_moe.model.graphs.decode_graphs import GraphInputs, graph_sizes
from elastic_moe.model.graphs.recordings import RecordingFailed
from elastic_moe.model.trunk.attention_path import KVShape
from elastic_moe.model.trunk.kv_cache import KVCache
from elastic_moe.model.trunk.step_batch import SequenceSlice
from elastic_moe.model.trunk.windows import window_group
from tests.model.families import tiny_checkpoint
from tests.model.lockstep import Lockstep, request

CPU = torch.device("cpu")
LENGTH, BLOCK = 4096, 16


def inputs(windows: dict[int, int | None], rows: int = 8) -> GraphInputs:
    shapes = {n: KVShape(num_heads=1, key_size=16, value_size=16, window=window) for n, window in windows.items()}
    group = window_group(shapes, max_model_len=LENGTH)
    cache = KVCache(
        shapes,
        num_blocks=4,
        block_size=BLOCK,
        dtype=torch.bfloat16,
        device=CPU,
        windows=group,
        num_window_blocks=4,
    )
    return GraphInputs(rows, cache, LENGTH, CPU)


def single(token: int, position: int, first: int, windows: LiveBlocks | None = None) -> SequenceSlice:
    blocks = list(range(first, first + position // BLOCK + 1))
    return SequenceSlice(token_ids=[token], start=position, block_ids=blocks, prompt_length=1, windows=windows)


class Broken:
    """Stands for graphs of which none can be recorded."""

    keeps = True

    def find(self, slices: Sequence[SequenceSlice], terms: GraphTerms) -> None:
        raise RecordingFailed("CUDA out of memory")


def test_without_graphs_a_worker_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tiny_checkpoint("qwen3_moe", tmp_path)
    want = Lockstep(path, [8]).run([request("one", [5, 6, 7], max_tokens=5)])
    monkeypatch.setattr(ExpertStore, "graph_memory", [])
    cluster = Lockstep(path, [8])
    runner = cluster.workers_runner()
    runner._graphs = [Broken()]  # type: ignore[list-item]
    assert cluster.run([request("one", [5, 6, 7], max_tokens=5)]) == want
    assert not runner._graphs


@pytest.mark.parametrize("most", [1, 2, 3, 7, 64, 100, 1000])
def test_sizes_leave_few_rows_empty(most: int) -> None:
    sizes = graph_sizes(most)
    assert sizes == sorted(set(sizes))
    assert min(most, 256) <= sizes[-1] <= 256
    for number in range(1, min(most, 256) + 1):
        size = next(size for size in sizes if size >= number)
        assert size - number <= (7 if size <= 64 else 15)


def test_rows_of_a_step_and_empty_ones() -> None:
    found = inputs({0: None})
    found.put([single(5, 0, 3), single(6, 40, 7), single(7, LENGTH - 1, 100)], 4)
    tokens, positions, keys, tables = found.parts(4)
    assert tokens.tolist()[:3] == [5, 6, 7]
    assert positions.tolist()[:3] == [0, 40, LENGTH - 1]
    assert keys.tolist() == [1, 41, LENGTH, 0]
    assert tables.shape == (4, LENGTH // BLOCK)
    assert [row[: -(-count // BLOCK)].tolist() for row, count in zip(tables, keys.tolist(), strict=True)] == [
        [3],
        [7, 8, 9],
        list(range(100, 100 + LENGTH // BLOCK)),
        [],
    ]
    # a step that is smaller than the last one leaves no row of it behind
    found.put([single(9, 2, 0)], 4)
    assert found.parts(4)[2].tolist() == [3, 0, 0, 0]


@pytest.mark.parametrize("start", [0, 5, 300, 4095])
def test_layers_with_a_window_have_tables_of_their_own(start: int) -> None:
    """They begin shortly before the window, and hold the blocks that are not given back."""
    found = inputs({0: None, 1: 64})
    first = max(0, start - 63) // BLOCK
    live = LiveBlocks()
    live.first, live.ids = first, list(range(500, 500 + start // BLOCK + 1 - first))
    found.put([single(5, start, 0, live)], 1)
    _, positions, keys, _, window_keys, window_tables = found.parts(1)
    assert positions.tolist() == [start]
    assert keys.tolist() == [start + 1]
    skipped = start + 1 - int(window_keys)
    assert skipped % 256 == 0
    assert skipped <= max(0, start - 63)
    used = window_tables[0, : -(-int(window_keys) // BLOCK)].tolist()
    assert used[len(used) - len(live.ids) :] == live.ids
    assert window_tables.shape[1] < LENGTH // BLOCK


def test_layers_that_all_have_windows_need_one_kind_of_table() -> None:
    found = inputs({0: 64, 1: 64})
    found.put([single(5, 10, 0, None)], 1)
    tokens, positions, keys, tables = found.parts(1)
    assert (tokens.tolist(), positions.tolist(), keys.tolist(), tables[0, 0].tolist()) == ([5], [10], [11], 0)
