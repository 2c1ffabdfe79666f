"""A cluster whose devices are too small for the model, or become so: it serves at once, and then becomes faster."""

from dataclasses import replace

import numpy as np
import pytest

from elastic_moe.cluster.decisions.reconcile import shares
from elastic_moe.cluster.decisions.replacing import too_much, with_tiers
from elastic_moe.cluster.errors import ConflictError, PlacementError
from elastic_moe.cluster.facts.events import (
    Abandon,
    PlaceRequested,
    RebalanceRequested,
    Reconfigured,
    ScaleRequested,
    Solve,
    StartWorker,
    Tick,
    Transfer,
    WorkerLost,
)
from elastic_moe.cluster.messages.views import OperationKind, Phase
from elastic_moe.cluster.placement import Tier
from tests.cluster.simulation import EXPERTS, LAYERS, Simulation, info, shuffled
from tests.cluster.stories import PART, W0, W1, W2, facts_of, member, newest, sent, serving

SLOW = 400.0
"""Bytes/s of a disk that reads no expert in the time before survivors serve, and four in a promotion's."""
FAST = 1e6


def share(sim: Simulation) -> float:
    assert sim.facts.spec is not None
    return sim.facts.spec.placement.resident_share


def redeployed(workers: int) -> Reconfigured:
    return Reconfigured(
        workers=workers,
        min_workers=None,
        max_workers=None,
        autoscale_window_s=15.0,
        rebalance_interval_s=0.0,
        drain_timeout_s=30.0,
    )


def test_a_start_with_too_little_memory_serves_with_what_fits() -> None:
    sim = serving(2, capacity=2 * LAYERS, disk=FAST)
    assert sim.facts.spec is not None
    assert sim.facts.spec.placement.tiers_of(W0, 0) == (Tier.DEVICE, Tier.DISK, Tier.DISK, Tier.DISK)
    told = sim.state.readiness()
    assert (told.ready, told.resident) == (True, 0.25)
    assert "degraded: 25% of the experts are in memory" in told.reason


def test_with_one_slot_per_layer_every_expert_lies_on_disk() -> None:
    sim = serving(1, capacity=LAYERS, disk=FAST)
    assert (share(sim), sim.state.readiness().ready) == (0.0, True)


def test_survivors_serve_at_once_without_the_memory_for_all() -> None:
    sim = serving(2, capacity=PART, disk=SLOW)
    assert (share(sim), sim.state.readiness().reason) == (1.0, "serving")
    sim.kill(W1)
    sim.feed(WorkerLost(worker=W1, reason="died"))
    while not sim.facts.serves:
        sim.finish(0)
    assert not sent(sim, Transfer), "nothing is read before they serve"
    assert sim.facts.ranks == (W0,)
    # three of the four that it holds: the fourth slot is for the five others
    assert share(sim) == 3 / 8
    sim.settle()
    assert (share(sim), sim.facts.ranks) == (1.0, (W0, W2))


def test_survivors_with_the_memory_for_all_serve_at_once_and_then_bring_them_in() -> None:
    sim = serving(2, disk=SLOW, capacity=LAYERS * EXPERTS)
    sim.feed(ScaleRequested(workers=1))
    assert len(sent(sim, Transfer)) == 1, "a worker that leaves in order hands its experts over"
    sim.settle()
    sim = serving(2, disk=SLOW, capacity=LAYERS * EXPERTS, interval_s=0.0)
    sim.kill(W1)
    sim.feed(WorkerLost(worker=W1, reason="died"))
    while not sim.facts.serves:
        sim.finish(0)
    assert share(sim) == 0.5
    assert "100% will be" in sim.state.readiness().reason
    # the replacement that loads will have them
    sim.settle()
    assert share(sim) == 1.0


def test_promotions_bring_in_what_fits_while_a_replacement_does_not_come() -> None:
    sim = serving(2, disk=SLOW, capacity=LAYERS * EXPERTS)
    sim.kill(W1)
    sim.feed(WorkerLost(worker=W1, reason="died"))
    shares = []
    for _ in range(40):
        # the replacement never comes
        todo = next((n for n, c in enumerate(sim.todo) if not isinstance(c, StartWorker)), None)
        if todo is None:
            sim.now += 1.0
            sim.feed(Tick())
        else:
            sim.finish(todo)
        shares.append(share(sim))
    assert [round(24 * n) for n in sorted(set(shares[5:]))] == [12, 16, 20, 24]
    promotions = [op for op in sim.state.operations.all() if op.kind is OperationKind.PROMOTE]
    assert [op.phase for op in promotions] == [Phase.COMPLETED] * 3
    assert sim.state.readiness().reason == "serving"


def test_an_expert_that_takes_longer_to_read_than_a_promotion_may_last_comes_in_too() -> None:
    """Found by test_state_machine.py: five workers share a disk that brings an expert to each in 12.5 seconds."""
    sim = Simulation(workers=3, capacity=PART // 2, disk=SLOW)
    sim.feed(Tick())
    sim.feed(redeployed(2))
    while not sim.facts.serves:
        sim.finish(0)
    sim.feed(redeployed(3))
    sim.finish(0)
    sim.feed(redeployed(5))
    sim.lose_engine()
    sim.settle()
    assert (len(sim.facts.ranks), share(sim)) == (5, 1.0)
    promotions = [op for op in sim.state.operations.all() if op.kind is OperationKind.PROMOTE]
    assert len(promotions) == LAYERS, "one worker lacks an expert of each layer, and reads one at a time"


def test_a_few_lost_experts_are_read_before_survivors_serve() -> None:
    sim = serving(2, disk=FAST, capacity=LAYERS * EXPERTS)
    sim.kill(W1)
    sim.feed(WorkerLost(worker=W1, reason="died"))
    while not sim.facts.serves:
        sim.finish(0)
    assert share(sim) == 1.0


def promoting(**settings: float) -> Simulation:
    """A survivor of two is about to bring experts in, and the replacement has not come."""
    sim = serving(2, disk=SLOW, capacity=LAYERS * EXPERTS, **settings)
    sim.feed(ScaleRequested(workers=1, retire=(W1,)))
    sim.kill(W1)
    sim.feed(WorkerLost(worker=W1, reason="died"))
    while not (sim.facts.change is not None and sim.facts.change.kind is OperationKind.PROMOTE):
        sim.finish(0)
    sim.log.clear()
    return sim


def test_a_promotion_gives_way_to_whatever_is_asked_for() -> None:
    sim = promoting()
    promotion = newest(sim).operation_id
    sim.feed(RebalanceRequested(planner="auto"))
    operation = sim.state.operations.get(promotion)
    assert operation is not None
    assert (operation.phase, operation.error) == (Phase.FAILED, "it gave way: a planner was asked for")
    assert sent(sim, Abandon)
    assert sent(sim, Solve)
    sim.settle()
    assert share(sim) == 1.0


def test_a_scaling_is_taken_beside_a_promotion() -> None:
    sim = promoting()
    sim.feed(ScaleRequested(workers=2))
    assert sim.facts.target == 2
    sim.settle()
    assert (share(sim), len(sim.facts.ranks)) == (1.0, 2)


def test_a_promotion_gives_way_to_a_given_placement_but_not_to_one_that_is_refused() -> None:
    sim = promoting()
    assert sim.facts.spec is not None
    change, placement = sim.facts.change, sim.facts.spec.placement
    with pytest.raises(PlacementError):
        sim.feed(PlaceRequested(placement=replace(placement, workers=(replace(placement.workers[0], id=W2),))))
    assert sim.facts.change == change
    on_disk = replace(placement, tiers=np.full_like(placement.tiers, Tier.DISK))
    sim.feed(PlaceRequested(placement=on_disk))
    sim.settle()
    assert (share(sim), sim.facts.spec.placement) == (0.0, on_disk), "no promotion changes what was asked for"


def test_a_promotion_that_is_being_prepared_ends_before_what_is_asked_for() -> None:
    sim = promoting()
    promotion = newest(sim).operation_id
    sim.finish(next(n for n, c in enumerate(sim.todo) if isinstance(c, Transfer)))
    with pytest.raises(ConflictError, match=promotion):
        sim.feed(RebalanceRequested(planner="auto"))
    sim.feed(ScaleRequested(workers=2))
    scaling = newest(sim).operation_id
    sim.settle()
    ended = [sim.state.operations.get(name) for name in (promotion, scaling)]
    assert [operation.phase for operation in ended if operation is not None] == [Phase.COMPLETED, Phase.COMPLETED]
    assert (share(sim), len(sim.facts.ranks)) == (1.0, 2)


def test_a_promotion_that_fails_is_tried_again_after_a_pause() -> None:
    sim = promoting()
    sim.finish(next(n for n, c in enumerate(sim.todo) if isinstance(c, Transfer)), fault=True)
    assert newest(sim).phase is Phase.FAILED
    assert sim.facts.serves
    sim.settle()
    assert share(sim) == 1.0


def test_scaling_down_is_limited_by_disk_alone_and_residency_grows_back() -> None:
    sim = serving(4, capacity=2 * LAYERS, disk=FAST)
    assert share(sim) == 1.0
    sim.feed(ScaleRequested(workers=1))
    sim.settle()
    assert (sim.facts.ranks, share(sim)) == ((W0,), 1 / 8)
    sim.feed(ScaleRequested(workers=4))
    sim.settle()
    assert (len(sim.facts.ranks), share(sim)) == (4, 1.0)


def test_the_heaviest_experts_come_in() -> None:
    sim = serving(2, capacity=PART, disk=FAST)
    load = np.zeros((LAYERS, EXPERTS), dtype=np.int64)
    load[:, 5:] = 100
    sim.count(load)
    sim.kill(W1)
    sim.feed(WorkerLost(worker=W1, reason="died"))
    for _ in range(40):
        todo = next((n for n, c in enumerate(sim.todo) if not isinstance(c, StartWorker)), None)
        sim.now += 1.0
        sim.feed(Tick()) if todo is None else sim.finish(todo)
    assert sim.facts.spec is not None
    assert sorted(sim.facts.spec.placement.resident(W0, 0)) == [5, 6, 7]


def test_a_given_placement_without_tiers_gets_them_where_not_everything_fits() -> None:
    sim = serving(2, capacity=2 * LAYERS, disk=FAST)
    assert sim.facts.spec is not None
    placement = shuffled(sim.facts.spec.placement, sim.rng)
    assert placement.all_resident
    sim.feed(PlaceRequested(placement=placement))
    sim.settle()
    assert np.array_equal(sim.facts.spec.placement.physical_to_logical_map, placement.physical_to_logical_map)
    assert share(sim) == 0.25
    given = sim.facts.spec.placement
    assert with_tiers(sim.facts, given) == given
    assert too_much(sim.facts, placement) is None


def test_given_tiers_that_do_not_fit_are_refused() -> None:
    sim = serving(2, capacity=2 * LAYERS, disk=FAST)
    assert sim.facts.spec is not None
    placement = sim.facts.spec.placement
    tiers = placement.tiers.copy()
    for tier in (Tier.DEVICE, Tier.HOST):
        tiers[0, 1] = tier
        with pytest.raises(PlacementError, match=r"w0 has room for 6 experts in its device, .* for 0 in pinned memory"):
            sim.feed(PlaceRequested(placement=replace(placement, tiers=tiers)))


def test_a_worker_that_is_started_loads_the_heaviest_that_fit() -> None:
    load = np.tile(np.arange(EXPERTS), (LAYERS, 1))
    held = np.zeros((LAYERS, EXPERTS), dtype=bool)
    held[:, 7] = True
    members = [member(W0, held=held, capacity=3 * LAYERS, disk=FAST)]
    (share,) = shares(facts_of(members, [W0], load=load, target=2), 1)
    assert [np.flatnonzero(row).tolist() for row in share] == [[5, 6]] * LAYERS
    (share,) = shares(
        facts_of([replace(members[0], info=info(W0, capacity=PART, disk=FAST))], [W0], load=load, target=2), 1
    )
    assert [np.flatnonzero(row).tolist() for row in share] == [[3, 4, 5, 6]] * LAYERS, "an even share fits"
