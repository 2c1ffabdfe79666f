from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from elastic_moe.cluster.facts.adaptation import adapt, choose_transport, slots_of
from elastic_moe.cluster.facts.membership import needs
from elastic_moe.cluster.facts.transfers import plan_transfers
from elastic_moe.cluster.placement import EMPTY, Worker, WorkerId
from tests.cluster.simulation import info

NONE = np.zeros((2, 8), dtype=np.int64)


def team(count: int, slots: int) -> list[Worker]:
    return [Worker(id=WorkerId(f"w{i}"), node="n", slots=slots) for i in range(count)]


@pytest.mark.parametrize(
    ("experts", "workers", "redundant", "slots"), [(8, 2, 0, 4), (8, 3, 0, 3), (8, 3, 2, 4), (8, 1, 5, 8), (8, 8, 0, 1)]
)
def test_slots(experts: int, workers: int, redundant: int, slots: int) -> None:
    assert slots_of([experts] * workers, experts, redundant) == (slots,) * workers


@pytest.mark.parametrize(
    ("limits", "redundant", "slots"),
    [
        ([4, 4], 0, (4, 4)),
        ([4, 4], 2, (4, 4)),
        ([2, 8], 0, (2, 6)),
        ([3, 6, 6], 4, (3, 5, 5)),
        ([3, 4], 0, None),
        ([0, 8], 0, None),
        ([], 0, None),
    ],
)
def test_slots_where_memory_is_short(limits: list[int], redundant: int, slots: tuple[int, ...] | None) -> None:
    assert slots_of(limits, 8, redundant) == slots


@settings(deadline=None)
@given(
    workers=st.integers(1, 5),
    redundant=st.integers(0, 6),
    seed=st.integers(0, 1000),
    density=st.sampled_from([0.0, 0.3, 0.9]),
)
def test_adapt_keeps_what_it_can(workers: int, redundant: int, seed: int, density: float) -> None:
    rng = np.random.default_rng(seed)
    slots = slots_of([8] * workers, 8, redundant)
    assert slots is not None
    members = team(workers, slots[0])
    has = {worker.id: rng.random((2, 8)) < density for worker in members}
    load = rng.integers(0, 9, (2, 8))
    placement = adapt(members, has, load)  # a Placement is verified when made
    transfers = plan_transfers(placement, has, has)
    for worker in members:
        missing = needs(placement, worker.id) & ~has[worker.id]
        brought = [m for m in transfers.copies if m.target == worker.id] + [
            r for r in transfers.reads if r[0] == worker.id
        ]
        assert len(brought) == missing.sum()
    for move in transfers.copies:
        assert has[move.source][move.layer, move.expert]
    assert adapt(members, has, load) == placement
    # where everything fits as it is, nothing moves
    again = {worker.id: needs(placement, worker.id) for worker in members}
    assert adapt(members, again, load) == adapt(members, again, NONE)
    assert not plan_transfers(adapt(members, again, load), again, again)


def one_by_one(
    workers: list[Worker], has: dict[WorkerId, np.ndarray], load: np.ndarray, served: dict[WorkerId, np.ndarray]
) -> list[list[set[int]]]:
    """By layer and worker, the experts that `adapt` is to give it."""
    layers = []
    for layer in range(len(load)):
        kept = [{int(e) for e in np.flatnonzero(has[worker.id][layer])} for worker in workers]
        for worker, mine in zip(workers, kept, strict=True):
            lost = [int(e) for e in np.flatnonzero(served[worker.id][layer]) if not any(e in other for other in kept)]
            mine |= set(lost[: max(0, worker.slots - len(mine))])
        copies = Counter(expert for mine in kept for expert in mine)
        for worker, mine in zip(workers, kept, strict=True):
            for expert in sorted(mine, key=lambda e: (-copies[e], -e))[: max(0, len(mine) - worker.slots)]:
                mine.remove(expert)
                copies[expert] -= 1
        weight = load[layer] + 1
        missing = sorted(set(range(load.shape[1])) - {e for mine in kept for e in mine}, key=lambda e: (-weight[e], e))
        given = [set(mine) for mine in kept]
        for expert in missing:
            room = [rank for rank, worker in enumerate(workers) if len(given[rank]) < worker.slots]
            if not room:
                # the first replica, in the order of workers and experts
                room = [rank for rank, mine in enumerate(kept) if any(copies[e] > 1 for e in mine)][:1]
                gone = min(e for e in kept[room[0]] if copies[e] > 1)
                kept[room[0]].remove(gone)
                given[room[0]].remove(gone)
                copies[gone] -= 1
            target = min(room, key=lambda rank: (sum(int(weight[e]) for e in given[rank]), rank))
            given[target].add(expert)
        layers.append(given)
    return layers


@settings(deadline=None, max_examples=300)
@given(
    limits=st.lists(st.integers(1, 8), min_size=1, max_size=5),
    redundant=st.integers(0, 6),
    seed=st.integers(0, 1000),
    densities=st.tuples(st.sampled_from([0.0, 0.3, 0.9]), st.sampled_from([0.0, 0.4])),
)
def test_all_layers_at_once_are_as_one_by_one(
    limits: list[int], redundant: int, seed: int, densities: tuple[float, float]
) -> None:
    rng = np.random.default_rng(seed)
    slots = slots_of(limits, 8, redundant)
    assume(slots is not None)
    assert slots is not None
    members = [Worker(id=WorkerId(f"w{rank}"), node="n", slots=count) for rank, count in enumerate(slots)]
    has, served = ({worker.id: rng.random((3, 8)) < density for worker in members} for density in densities)
    load = rng.integers(0, 9, (3, 8))
    placement = adapt(members, has, load, served)
    found = [[set(placement.experts_of(worker.id, n)) - {EMPTY} for worker in members] for n in range(3)]
    assert found == one_by_one(members, has, load, served)


def test_lost_experts_go_heaviest_first_to_the_least_loaded() -> None:
    members = team(2, 8)
    has = {members[0].id: np.zeros((1, 8), bool), members[1].id: np.zeros((1, 8), bool)}
    has[members[0].id][0, :3] = True
    has[members[1].id][0, 3:6] = True
    load = np.array([[1, 1, 1, 5, 5, 5, 9, 4]])
    placement = adapt(members, has, load)
    assert 6 in placement.experts_of(members[0].id, 0)
    assert 7 in placement.experts_of(members[0].id, 0)


def test_transport() -> None:
    cpu = [info(WorkerId("w0"), "n0"), info(WorkerId("w1"), "n0")]
    assert choose_transport(cpu[:1]) == "local"
    assert choose_transport(cpu) == "shm"
    assert choose_transport([cpu[0], info(WorkerId("w1"), "n1")]) == "tcp"


@pytest.mark.parametrize(
    ("places", "shared", "transport"),
    [
        ("n0:a n0:a", True, "ipc"),
        ("n0:a n0:a n0:a", True, "ipc"),
        ("n0:a n0:b", False, "nccl"),
        ("n0:a n1:b", False, "nccl"),
        ("n0:a n0:a n0:b", True, "tcp"),
        ("n0:a n1:a", True, "tcp"),
        ("n0:? n0:?", True, "tcp"),
        ("n0:? n0:?", False, "nccl"),
    ],
)
def test_transport_of_workers_with_gpus(places: str, shared: bool, transport: str) -> None:
    """Each worker's node and GPU; a GPU whose UUID is not known is '?'."""
    infos = []
    for number, place in enumerate(places.split()):
        node, gpu = place.split(":")
        one = info(WorkerId(f"w{number}"), node)
        infos.append(replace(one, device="NVIDIA H100", gpu=None if gpu == "?" else gpu))
    assert choose_transport(infos, shared_gpus=shared) == transport
