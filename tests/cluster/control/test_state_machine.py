"""Random orders of events and faults: the invariants hold after each, and the cluster serves once faults end."""

import contextlib

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from elastic_moe.cluster.errors import ConflictError, NotReadyError, PlacementError
from elastic_moe.cluster.facts.events import (
    HomesSeen,
    LoadSeen,
    NodesDrain,
    PlaceRequested,
    RebalanceRequested,
    Reconfigured,
    ScaleRequested,
    StepFailed,
    Tick,
    Unpin,
)
from elastic_moe.cluster.facts.homes import SETTLED_S
from elastic_moe.cluster.messages.views import Phase
from tests.cluster.simulation import EXPERTS, LAYERS, Simulation, node_of, shuffled
from tests.properties import most


class Faults(RuleBasedStateMachine):
    sim: Simulation
    shrinks: set[str]
    """Operations by which workers were to leave."""

    @initialize(
        workers=st.integers(1, 4),
        redundant=st.integers(0, 4),
        interval_s=st.sampled_from([0.0, 3.0]),
        seed=st.integers(0, 99),
        settled=st.booleans(),
        limits=st.sampled_from([(None, None), (None, 5), (0, 5)]),
        capacity=st.sampled_from([None, LAYERS * EXPERTS, LAYERS * EXPERTS // 2, LAYERS * 2, LAYERS]),
        disk=st.sampled_from([None, 40.0, 400.0, 4000.0, 1e6]),
        nodes=st.booleans(),
    )
    def start(
        self,
        workers: int,
        redundant: int,
        interval_s: float,
        seed: int,
        settled: bool,
        limits: tuple[int | None, int | None],
        capacity: int | None,
        disk: float | None,
        nodes: bool,
    ) -> None:
        if disk is None and capacity is not None and workers * capacity < LAYERS * EXPERTS:
            capacity = None
        self.sim = Simulation(
            workers=workers,
            redundant=redundant,
            interval_s=interval_s,
            seed=seed,
            least=limits[0],
            most=limits[1],
            capacity=capacity,
            disk=disk,
            nodes=nodes,
        )
        self.shrinks = set()
        self.sim.feed(Tick())
        if settled:
            self.sim.settle()

    @invariant()
    def look(self) -> None:
        self.shrinks |= {op.operation_id for op in self.sim.state.operations.all() if op.retiring}

    @rule(seconds=st.sampled_from([0.1, 1.0, 10.0]))
    def time_passes(self, seconds: float) -> None:
        self.sim.now += seconds
        self.sim.count(self.sim.rng.integers(0, 50, (LAYERS, EXPERTS)))
        self.sim.feed(Tick())

    @precondition(lambda self: self.sim.todo)
    @rule(pick=st.integers(0, 20), fault=st.sampled_from([False, False, False, True]))
    def something_ends(self, pick: int, fault: bool) -> None:
        self.sim.finish(pick % len(self.sim.todo), fault=fault)

    @precondition(lambda self: self.sim.todo)
    @rule()
    def the_oldest_ends(self) -> None:
        self.sim.finish(0)

    @precondition(lambda self: any(simulated.alive for simulated in self.sim.workers.values()))
    @rule(pick=st.integers(0, 20), found=st.booleans())
    def a_worker_dies(self, pick: int, found: bool) -> None:
        alive = [worker for worker, simulated in self.sim.workers.items() if simulated.alive]
        worker = alive[pick % len(alive)]
        self.sim.kill(worker)
        if found:
            self.sim._find_lost([worker])

    @rule(suspects=st.integers(0, 2), stale=st.sampled_from([0, 0, 1]))
    def a_step_fails(self, suspects: int, stale: int) -> None:
        facts = self.sim.facts
        self.sim.feed(StepFailed(epoch=facts.epoch - stale, suspects=facts.ranks[:suspects], reason="aborted"))

    @rule()
    def the_engine_dies(self) -> None:
        self.sim.lose_engine()

    @rule(flipped=st.sampled_from([0.0, 0.5, 1.0]))
    def the_coordinator_is_restarted(self, flipped: float) -> None:
        self.sim.restart_coordinator(flipped=flipped)

    @rule()
    def somebody_wants_a_rebalance(self) -> None:
        with contextlib.suppress(ConflictError, NotReadyError):
            self.sim.feed(RebalanceRequested(planner="auto"))

    @rule(workers=st.integers(0, 6), name=st.sampled_from([None, "a", "b"]), replace=st.booleans())
    def somebody_wants_another_size(self, workers: int, name: str | None, replace: bool) -> None:
        with contextlib.suppress(ConflictError, NotReadyError, PlacementError):
            self.sim.feed(ScaleRequested(workers=workers, operation_id=name, replace=replace))

    @rule(workers=st.integers(0, 6), most=st.sampled_from([None, 4]), interval_s=st.sampled_from([0.0, 3.0]))
    def somebody_redeploys(self, workers: int, most: int | None, interval_s: float) -> None:
        with contextlib.suppress(PlacementError):
            self.sim.feed(
                Reconfigured(
                    workers=workers,
                    min_workers=None,
                    max_workers=most,
                    autoscale_window_s=15.0,
                    rebalance_interval_s=interval_s,
                    drain_timeout_s=30.0,
                )
            )

    @precondition(lambda self: self.sim.facts.records)
    @rule(pick=st.integers(0, 20), left_s=st.sampled_from([None, 2.0, 60.0]))
    def a_node_is_about_to_leave(self, pick: int, left_s: float | None) -> None:
        records = list(self.sim.facts.records)
        self.sim.feed(NodesDrain(nodes={node_of(records[pick % len(records)]): left_s}))

    @rule(number=st.integers(0, 3), cores=st.integers(0, 3), after_s=st.sampled_from([0.0, SETTLED_S]))
    def a_node_has_come(self, number: int, cores: int, after_s: float) -> None:
        self.sim.feed(HomesSeen(free={f"later{number}": cores} if cores else {}))
        self.sim.now += after_s
        self.sim.feed(Tick())

    @rule(pinned=st.sampled_from([None, True, False]), same=st.booleans())
    def somebody_brings_a_placement(self, pinned: bool | None, same: bool) -> None:
        if self.sim.facts.spec is not None:
            placement = self.sim.facts.spec.placement
            placement = placement if same else shuffled(placement, self.sim.rng)
            with contextlib.suppress(ConflictError, NotReadyError, PlacementError):
                self.sim.feed(PlaceRequested(placement=placement, pinned=pinned))

    @rule()
    def somebody_unpins(self) -> None:
        self.sim.feed(Unpin())
        assert not self.sim.facts.pinned

    @rule(
        seconds=st.sampled_from([1, 20, 150]),
        waiting=st.integers(0, 300),
        running=st.integers(0, 300),
        busy=st.integers(0, 3),
    )
    def the_engine_tells_its_load(self, seconds: int, waiting: int, running: int, busy: int) -> None:
        for _ in range(min(seconds, 20)):
            self.sim.now += seconds / 20
            workers = self.sim.facts.ranks[:busy]
            self.sim.feed(LoadSeen(waiting=waiting, running=running, kv_usage=running / 300, busy=workers))

    @rule(pick=st.integers(0, 5))
    def somebody_wants_a_worker_gone(self, pick: int) -> None:
        members = list(self.sim.facts.records)
        if members:
            with contextlib.suppress(ConflictError, NotReadyError, PlacementError):
                self.sim.feed(ScaleRequested(retire=(members[pick % len(members)],)))

    def teardown(self) -> None:
        if hasattr(self, "sim") and not self.sim.facts.fatal:
            self.sim.settle()
            assert not self.sim.draining, "a worker that stays gets requests"
            for operation in self.sim.state.operations.all():
                safe = self.sim.state.progress(operation).safe_to_terminate
                assert safe == bool(operation.retiring), "whoever was said to leave has left in the end"
                waits = operation.operation_id in self.shrinks and operation.phase is Phase.COMPLETED
                assert safe or not waits, "a scaling by which workers were to leave ends with machines that may go"


def test_the_cluster_serves_again_after_random_events_and_faults() -> None:
    run_state_machine_as_test(
        Faults,
        settings=settings(
            max_examples=most(150), stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )
