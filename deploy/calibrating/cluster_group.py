"""A group of workers on the nodes of a Ray cluster, whose steps are measured."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Awaitable, Iterable, Iterator
from typing import Any, TypeVar, cast

import psutil
import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from elastic_moe.actors.remote.addresses import node_address
from elastic_moe.actors.remote.ask import Remote, ask, kill
from elastic_moe.actors.remote.calls import one_line
from elastic_moe.actors.remote.ray_nodes import nodes
from elastic_moe.cluster.errors import UserError, WorkerError
from elastic_moe.cluster.messages.requests import Endpoint
from elastic_moe.cluster.placement import Placement
from elastic_moe.deploy.launch.local_ray import join_ray
from elastic_moe.deploy.launch.run_directory import RunDirectory
from elastic_moe.model.measuring.group import MeasuredGroup, named
from elastic_moe.model.measuring.process import Job, Member, Steps

T = TypeVar("T")


class RemoteMember:
    """A worker of the group, as a Ray actor."""

    def __init__(self, job: Job, rank: int) -> None:
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        self._member = Member(job, rank)

    def open_door(self) -> Endpoint:
        return self._member.open_door(node_address())

    def place(self, placement: Placement, doors: tuple[Endpoint, ...] = ()) -> None:
        self._member.place(placement, doors)

    def run(self, steps: int) -> Steps:
        return self._member.run(steps)


class ClusterGroup(MeasuredGroup):
    """Workers on nodes of the Ray that this process has joined. Raises WorkerError where one cannot begin."""

    def __init__(self, job: Job, node_ids: tuple[str, ...]) -> None:
        """`node_ids`: Ray's ids of the nodes, in the order in which the workers of `job.first` name them."""
        job = named(job)
        names = list(dict.fromkeys(worker.node for worker in job.first.workers))
        on = dict(zip(names, node_ids, strict=True))
        self._members = [
            Remote[RemoteMember](_made_on(on[worker.node], job, rank)) for rank, worker in enumerate(job.first.workers)
        ]
        try:
            doors = tuple(_answers(ask(member, RemoteMember.open_door) for member in self._members))
            _answers(ask(member, RemoteMember.place, job.first, doors) for member in self._members)
        except WorkerError:
            self.close()
            raise

    def close(self) -> None:
        for member in self._members:
            kill(member)

    def _place(self, placement: Placement) -> None:
        _answers(ask(member, RemoteMember.place, placement) for member in self._members)

    def _run(self, steps: int) -> list[Steps]:
        return _answers(ask(member, RemoteMember.run, steps) for member in self._members)


def _made_on(node_id: str, job: Job, rank: int) -> Any:
    return ray.remote(RemoteMember).options(num_cpus=0, scheduling_strategy=_there(node_id)).remote(job, rank)


def _answers(calls: Iterable[Awaitable[T]]) -> list[T]:
    """The answers to calls that have all begun. Blocks; raises WorkerError where a worker has ended or failed."""
    try:
        return list(ray.get(cast(Any, list(calls))))
    except RayError as error:
        raise WorkerError(f"a worker of the cluster: {one_line(error)}") from None


@contextlib.contextmanager
def joined(address: str) -> Iterator[tuple[str, ...]]:
    """Join the Ray at `address`, and leave it at the end. Gives Ray's ids of the nodes with CPUs, in a fixed order.

    Raises UserError where that cannot be joined, or no node has a CPU.
    """
    # Ray puts the current directory first in its workers' search path for modules. The directory of a run is removed by
    # the next one where this one is killed
    directory = RunDirectory.create()
    try:
        with contextlib.chdir(directory.temporary):
            join_ray(address, logging_level=logging.ERROR)
    finally:
        directory.remove()
    try:
        found = tuple(sorted(node.id for node in nodes() if node.total.get("CPU", 0) > 0))
        if not found:
            raise UserError(f"--address: no node of the cluster at {address} has a CPU")
        yield found
    finally:
        ray.shutdown()


def free_bytes(node_ids: tuple[str, ...]) -> int:
    """Memory that is free on the nodes: on the one with least, for each of them."""
    asked = ray.remote(_available_bytes)
    calls = [asked.options(num_cpus=0, scheduling_strategy=_there(node)).remote() for node in node_ids]
    return len(node_ids) * int(min(ray.get(calls)))


def _available_bytes() -> int:
    return int(psutil.virtual_memory().available)


def _there(node_id: str) -> NodeAffinitySchedulingStrategy:
    return NodeAffinitySchedulingStrategy(node_id=node_id, soft=False)
