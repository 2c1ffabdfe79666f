"""Copies of experts between workers: a damaged copy is refused, and none of its memory is kept."""

from dataclasses import replace

import pytest

from elastic_moe.cluster.errors import PlacementError, UserError
from elastic_moe.cluster.placement import WorkerId
from elastic_moe.model.native import unavailable
from tests.model.families import tiny_checkpoint
from tests.model.lockstep import Lockstep, request


def test_a_copy_is_one_unit_with_its_digest(tmp_path_factory: pytest.TempPathFactory) -> None:
    workers = list(Lockstep(tiny_checkpoint("olmoe", tmp_path_factory), [4, 4]).workers.values())
    source, target = workers
    expert = min(set(range(8)) - set(target.loaded.store.held(0)))
    copy = source.export_experts([(0, expert)])[0]
    assert len(copy.tensors) > 1
    for name, raw in copy.tensors.items():
        damaged = raw.copy()
        damaged[len(raw) // 2] ^= 1
        with pytest.raises(PlacementError, match=f"expert {expert} of layer 0 arrived damaged"):
            target.import_experts([replace(copy, tensors={**copy.tensors, name: damaged})])
        assert expert not in target.loaded.store.held(0)
    # tensors of two experts, each whole
    other = source.export_experts([(0, expert + 1)])[0]
    first = next(iter(copy.tensors))
    with pytest.raises(PlacementError, match="damaged"):
        target.import_experts([replace(copy, tensors={**copy.tensors, first: other.tensors[first]})])
    target.import_experts([copy])
    again = target.export_experts([(0, expert)])[0]
    assert again.digest == copy.digest
    assert set(again.tensors) == set(copy.tensors)


@pytest.mark.parametrize(
    ("family", "dtype", "expert_dtype"),
    [("gpt_oss", "float32", "auto"), ("gpt_oss", "bfloat16", "auto"), ("olmoe", "bfloat16", "int8")],
)
def test_nothing_is_kept_of_the_memory_that_a_copy_came_in(
    tmp_path_factory: pytest.TempPathFactory, family: str, dtype: str, expert_dtype: str
) -> None:
    if expert_dtype == "int8" and unavailable() is not None:
        pytest.skip(f"no native library: {unavailable()}")
    cluster = Lockstep(tiny_checkpoint(family, tmp_path_factory), [4, 4], dtype=dtype, expert_dtype=expert_dtype)
    source, target = cluster.workers.values()
    expert = min(set(range(8)) - set(target.loaded.store.held(0)))
    copy = source.export_experts([(0, expert)])[0]
    arrived = {name: raw.copy() for name, raw in copy.tensors.items()}
    target.import_experts([replace(copy, tensors=arrived)])
    for raw in arrived.values():
        raw[:] = 255
    assert target.export_experts([(0, expert)])[0].digest == copy.digest


def test_memory_is_counted_in_experts(tmp_path_factory: pytest.TempPathFactory) -> None:
    cluster = Lockstep(tiny_checkpoint("olmoe", tmp_path_factory), [4, 4])
    worker = cluster.workers[WorkerId("w0")]
    assert worker.capacity > 4 * cluster.info.num_layers
    given = replace(worker.spec, expert_memory_bytes=5 * cluster.info.expert_bytes)
    assert replace(worker.loaded.memory, spec=given).expert_capacity(None, cache_bytes=0) == 5


@pytest.mark.skipif(unavailable() is not None, reason=f"no native library: {unavailable()}")
def test_experts_in_8_bits_travel_as_they_are(tmp_path_factory: pytest.TempPathFactory) -> None:
    cluster = Lockstep(tiny_checkpoint("olmoe", tmp_path_factory), [4, 4], dtype="bfloat16", expert_dtype="int8")
    before = {w: worker.export_experts([(0, 4 * n)])[0] for n, (w, worker) in enumerate(cluster.workers.items())}
    tokens = cluster.run([request("a", [5, 6, 7], max_tokens=12)])
    assert cluster.replace(cluster.shuffled(4), [4, 4]) > 0
    after = [worker.export_experts([(0, 4 * (1 - n))])[0] for n, worker in enumerate(cluster.workers.values())]
    assert [copy.digest for copy in after] == [copy.digest for copy in reversed(before.values())]
    assert after[0].dtypes["down_proj"] == "int8"
    # the same experts on two workers: every layer's sums are of the same parts
    assert cluster.run([request("b", [5, 6, 7], max_tokens=12)])["b"] == tokens["a"]


def test_8_bits_are_for_bfloat16(tmp_path_factory: pytest.TempPathFactory) -> None:
    with pytest.raises(UserError, match="expert_dtype: int8 needs dtype bfloat16, and float32 is served"):
        Lockstep(tiny_checkpoint("olmoe", tmp_path_factory), [8], dtype="float32", expert_dtype="int8")
