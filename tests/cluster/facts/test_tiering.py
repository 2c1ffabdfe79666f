"""Which experts lie in devices that are too small for all, and how a placement's tiers are reached in steps."""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic_moe.cluster.facts.adaptation import adapt, tiered_slots_of
from elastic_moe.cluster.facts.membership import needs, serves
from elastic_moe.cluster.facts.tiering import (
    Room,
    assign_tiers,
    expected_stall_s,
    fits_in,
    memory_of,
    next_step,
    pins_of,
)
from elastic_moe.cluster.placement import Placement, Tier, Worker, WorkerId, contiguous
from tests.cluster.simulation import MODEL

A, B = WorkerId("a"), WorkerId("b")
LAYERS, EXPERTS = 2, 8
NOTHING = {worker: np.zeros((LAYERS, EXPERTS), dtype=bool) for worker in (A, B)}
EVEN = np.zeros((LAYERS, EXPERTS), dtype=np.int64)
RISING = np.tile(np.arange(EXPERTS), (LAYERS, 1))
ALONE = contiguous(LAYERS, EXPERTS, [Worker(id=A, node="n", slots=EXPERTS)])


@pytest.mark.parametrize(("device", "pins"), [(1, 0), (2, 1), (4, 3), (8, 6), (64, 48)])
def test_a_part_of_a_device_is_the_cache_area(device: int, pins: int) -> None:
    assert pins_of(device) == pins


@pytest.mark.parametrize(
    ("limits", "slots"), [([4, 4], (4, 4)), ([2, 2], (4, 4)), ([1], (8,)), ([1, 4], (3, 6)), ([2, 1, 1], (4, 3, 3))]
)
def test_slots_where_the_rest_lies_on_disk(limits: list[int], slots: tuple[int, ...]) -> None:
    assert tiered_slots_of(limits, EXPERTS) == slots


@pytest.mark.parametrize("limits", [[], [0, 8]])
def test_a_device_holds_at_least_one_expert_of_each_layer(limits: list[int]) -> None:
    assert tiered_slots_of(limits, EXPERTS) is None


def test_the_heaviest_lie_in_the_device_the_next_in_pinned_memory_and_the_rest_on_disk() -> None:
    tiered = assign_tiers(ALONE, {A: Room(device=4 * LAYERS, host=2 * LAYERS)}, NOTHING, RISING)
    assert tiered.tiers_of(A, 0) == (*[Tier.DISK] * 3, *[Tier.HOST] * 2, *[Tier.DEVICE] * 3)


def test_where_everything_fits_every_expert_lies_in_a_device() -> None:
    assert assign_tiers(ALONE, {A: Room(device=8 * LAYERS)}, NOTHING, RISING).all_resident
    assert assign_tiers(ALONE, {A: None}, NOTHING, RISING).all_resident, "a worker without a disk tier"


def test_what_lies_in_a_device_stays_unless_another_is_clearly_heavier() -> None:
    has = {A: np.zeros((LAYERS, EXPERTS), dtype=bool)}
    has[A][:, :3] = True
    load = np.full((LAYERS, EXPERTS), 100)
    load[:, 3], load[1, 4] = 110, 200
    tiered = assign_tiers(ALONE, {A: Room(device=4 * LAYERS)}, has, load)
    assert tiered.resident(A, 0) == (0, 1, 2)
    assert tiered.resident(A, 1) == (0, 1, 4)


def test_a_step_brings_only_what_fits_beside_what_is_there() -> None:
    goal = assign_tiers(ALONE, {A: Room(device=4 * LAYERS)}, NOTHING, RISING)
    has = {A: np.zeros((LAYERS, EXPERTS), dtype=bool)}
    has[A][:, :2] = True
    step = next_step(goal, None, {A: Room(device=4 * LAYERS)}, has, has, RISING, most_new={A: None})
    assert step.resident(A, 0) == (7,), "two lie there and one slot is for the cache"
    after = {A: needs(step, A)}
    assert next_step(goal, step, {A: Room(device=4 * LAYERS)}, after, after, RISING, most_new={A: None}) == goal


def test_a_step_brings_no_more_than_it_has_time_for_and_the_heaviest_first() -> None:
    goal = assign_tiers(ALONE, {A: Room(device=8 * LAYERS)}, NOTHING, RISING)
    step = next_step(goal, None, {A: Room(device=8 * LAYERS)}, NOTHING, NOTHING, RISING, most_new={A: 3})
    assert (step.resident(A, 0), step.resident(A, 1)) == ((6, 7), (7,))
    assert Room(device=8 * LAYERS, disk_bytes_per_s=4000.0).affordable(0.5, 1000) == 2
    assert Room(device=8 * LAYERS).affordable(None, 1000) is None


def test_what_may_still_lie_in_a_device_takes_room() -> None:
    """After a flip of unknown outcome."""
    goal, room = assign_tiers(ALONE, {A: Room(device=8 * LAYERS)}, NOTHING, RISING), {A: Room(device=8 * LAYERS)}
    perhaps = {A: np.zeros((LAYERS, EXPERTS), dtype=bool)}
    perhaps[A][:, :6] = True
    step = next_step(goal, None, room, NOTHING, perhaps, RISING, most_new={A: None})
    assert (step.resident(A, 0), step.resident(A, 1)) == ((7,), (7,))
    assert next_step(goal, None, room, NOTHING, NOTHING, RISING, most_new={A: None}) == goal


def test_what_a_worker_may_still_serve_takes_a_slot_in_each_layer() -> None:
    """It began an epoch that others did not, and has no part in the one in force."""
    two = contiguous(LAYERS, EXPERTS, [Worker(id=A, node="n", slots=1), Worker(id=B, node="n", slots=7)])
    room = {A: Room(device=LAYERS), B: None}
    lately = {A: np.ones((LAYERS, EXPERTS), dtype=bool)}
    most = {A: None, B: None}
    assert next_step(two, None, room, NOTHING, NOTHING, RISING, most_new=most) == two
    step = next_step(two, None, room, NOTHING, NOTHING, RISING, lately=lately, most_new=most)
    assert (step.resident(A, 0), step.resident(A, 1)) == ((), ())


@settings(deadline=None)
@given(
    workers=st.integers(1, 4),
    limit=st.integers(1, 8),
    most=st.sampled_from([None, 1, 3]),
    seed=st.integers(0, 1000),
)
def test_every_goal_is_reached_within_memory(workers: int, limit: int, most: int | None, seed: int) -> None:
    """From whatever lies in the devices, in steps that each fit, and each brings something or makes room for it."""
    rng = np.random.default_rng(seed)
    slots = tiered_slots_of([limit] * workers, EXPERTS)
    assert slots is not None
    members = [Worker(id=WorkerId(f"w{n}"), node="n", slots=count) for n, count in enumerate(slots)]
    rooms: Mapping[WorkerId, Room | None] = {w.id: Room(device=limit * LAYERS) for w in members}
    load = rng.integers(0, 50, (LAYERS, EXPERTS))
    has = {w.id: _some(rng, min(w.slots, pins_of(limit) if w.slots > limit else limit)) for w in members}
    goal = assign_tiers(adapt(members, has, load), rooms, has, load)
    step: Placement | None = None
    for _ in range(3 + 2 * LAYERS * EXPERTS):
        step = next_step(goal, step, rooms, has, has, load, most_new=dict.fromkeys(has, most))
        for worker in members:
            both = has[worker.id] | needs(step, worker.id)
            if (needs(step, worker.id) & ~has[worker.id]).any():
                assert memory_of(both, serves(step, worker.id)) <= limit * LAYERS
            assert fits_in(step, worker.id, Room(device=limit * LAYERS))
        has = {w.id: needs(step, w.id) for w in members}
        if step == goal:
            return
    raise AssertionError("the goal was not reached")


def _some(rng: np.random.Generator, count: int) -> np.ndarray[tuple[int, int], np.dtype[np.bool_]]:
    mask = np.zeros((LAYERS, EXPERTS), dtype=bool)
    for layer in range(LAYERS):
        mask[layer, rng.permutation(EXPERTS)[:count]] = True
    return mask


HALVES = contiguous(LAYERS, EXPERTS, [Worker(id=w, node="n", slots=4) for w in (A, B)])


def halves_on_disk() -> Placement:
    """A has two experts of each layer in its device and two on disk, B all four in its device."""
    tiers = np.zeros((LAYERS, EXPERTS), dtype=np.int8)
    tiers[:, 2:4] = Tier.DISK
    return replace(HALVES, tiers=tiers)


def rooms(device: int, **rates: float) -> dict[WorkerId, Room | None]:
    return {A: Room(device=device * LAYERS, disk_bytes_per_s=1e6, **rates), B: Room(device=4 * LAYERS)}


def test_the_stall_of_a_step() -> None:
    """Each layer waits for the worker with most to bring; of 8 experts with top 2, a token needs a quarter of them."""
    tiered = halves_on_disk()
    assert expected_stall_s(HALVES, rooms(3), MODEL, EVEN, tokens=1) == 0.0
    assert expected_stall_s(tiered, rooms(3), MODEL, EVEN, tokens=1) == pytest.approx(LAYERS * 2 * 0.25 * 1e-3)
    assert expected_stall_s(tiered, rooms(3), MODEL, EVEN, tokens=1000) == pytest.approx(LAYERS * 2 * 1e-3)
    assert expected_stall_s(replace(tiered, tiers=HALVES.tiers), rooms(3), MODEL, EVEN, tokens=9) == 0.0


def test_the_stall_follows_the_popularity_of_experts() -> None:
    """Experts 2 and 3 lie on disk; of 16 choices, one in eight or none falls on them."""
    tiered, rare, never = halves_on_disk(), EVEN + 4, EVEN + 4
    rare[:, 2:4] = 2
    rare[:, 4:] = 2 + 2
    never[:, 2:4] = 0
    chance = 2 * 2 / rare[0].sum()
    assert expected_stall_s(tiered, rooms(3), MODEL, rare, tokens=1) == pytest.approx(LAYERS * 2 * chance * 1e-3)
    assert expected_stall_s(tiered, rooms(3), MODEL, never, tokens=1) == 0.0


def test_the_cache_area_holds_the_most_popular_of_what_passes() -> None:
    popular = EVEN + 1
    popular[:, 3] = 3
    alone, both = (expected_stall_s(halves_on_disk(), rooms(n), MODEL, popular, tokens=1) for n in (3, 4))
    assert (alone, both) == (pytest.approx(LAYERS * (1 + 3) * 2 / 10 * 1e-3), 0.0)
    tiers = halves_on_disk().tiers.copy()
    tiers[:, 1] = Tier.DISK
    three = expected_stall_s(replace(HALVES, tiers=tiers), rooms(3), MODEL, popular, tokens=1)
    assert three == pytest.approx(LAYERS * (1 + 1) * 2 / 10 * 1e-3), "two slots: one for expert 3, one to pass through"


def test_pinned_memory_and_replicas_in_devices_make_the_stall_shorter() -> None:
    tiers = halves_on_disk().tiers.copy()
    tiers[:, 2:4] = Tier.HOST
    hosted = replace(HALVES, tiers=tiers)
    assert expected_stall_s(hosted, rooms(3, host_bytes_per_s=1e7), MODEL, EVEN, tokens=1) == pytest.approx(
        LAYERS * 2 * 0.25 * 1e-4
    )
    table = HALVES.physical_to_logical_map.copy()
    table[:, 7] = 3
    elsewhere = replace(halves_on_disk(), physical_to_logical_map=table, num_logical_experts=7)
    model = replace(MODEL, num_logical_experts=7)
    assert expected_stall_s(elsewhere, rooms(2), model, EVEN[:, :7], tokens=1) == pytest.approx(LAYERS * 2 / 7 * 1e-3)
