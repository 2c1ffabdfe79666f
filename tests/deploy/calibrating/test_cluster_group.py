"""Workers of a Ray cluster run the steps that workers of one machine run."""

import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import ray

from elastic_moe.cluster.errors import WorkerError
from elastic_moe.cluster.placement import Placement, contiguous
from elastic_moe.deploy.calibrating.cluster_group import ClusterGroup, free_bytes
from elastic_moe.model.checkpoints.checkpoint import open_checkpoint
from elastic_moe.model.measuring.group import LocalGroup
from elastic_moe.model.measuring.process import Job
from elastic_moe.optimizer.study.scenario import make_workers
from tests.model.families import tiny_checkpoint

pytestmark = [
    pytest.mark.ray,
    # Ray leaves sockets and subprocesses to the interpreter's end
    pytest.mark.filterwarnings("default::ResourceWarning"),
    pytest.mark.filterwarnings("default::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture
def node(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The only node of a Ray."""
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    ray.init(address="local", include_dashboard=False, num_cpus=2, log_to_driver=False, logging_level=logging.ERROR)
    yield ray.nodes()[0]["NodeID"]
    ray.shutdown()


def test_workers_on_a_cluster_run_the_same_steps_as_on_one_machine(node: str, tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint("qwen3_moe", tmp_path)
    info = open_checkpoint(checkpoint).info
    # two names of one node: their workers talk as those of two nodes do
    workers = make_workers(2, nodes=2, num_experts=info.num_logical_experts)
    first = contiguous(info.num_layers, info.num_logical_experts, workers)
    turned = Placement(
        num_logical_experts=info.num_logical_experts,
        workers=workers,
        physical_to_logical_map=first.physical_to_logical_map[:, ::-1],
    )
    job = Job(
        path=str(checkpoint), dtype="float32", expert_dtype="auto", trunk_dtype="auto", first=first,
        group="emoe-test", tokens=40,
    )  # fmt: skip
    with ClusterGroup(job, (node, node)) as group:
        spread = [group.measure(placement, 2) for placement in (first, turned)]
    beside = replace(first, workers=make_workers(2, nodes=1, num_experts=info.num_logical_experts))
    with LocalGroup(replace(job, first=beside)) as local:
        alone = local.measure(beside, 2)
    assert [len(one.steps_s) for one in spread] == [2, 2]
    assert all(np.array_equal(one.load, alone.load) for one in spread)
    assert free_bytes((node, node)) > 0
    with pytest.raises(WorkerError, match="a worker of the cluster"):
        ClusterGroup(replace(job, path=str(tmp_path / "elsewhere")), (node, node))
