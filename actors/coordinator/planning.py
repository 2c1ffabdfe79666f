"""From the control plane to the planners and back: makes a problem of the cluster's state, and an event of a plan."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from elastic_moe.actors import liveness
from elastic_moe.actors.coordinator.fleet import Fleet
from elastic_moe.actors.remote.calls import CALL_ERRORS, one_line, within
from elastic_moe.cluster.config import ServeConfig
from elastic_moe.cluster.decisions.replacing import room, with_tiers
from elastic_moe.cluster.errors import ConfigError
from elastic_moe.cluster.facts.events import PlanReady, Solve, Weigh, Weighed
from elastic_moe.cluster.facts.facts import Facts
from elastic_moe.cluster.facts.links import Rates, port_rates, uplink_rates
from elastic_moe.cluster.facts.routing import RoutingWindow, weighted_load
from elastic_moe.cluster.facts.tiering import cache_slots_of
from elastic_moe.cluster.messages.epochs import ModelInfo, TransportKind
from elastic_moe.cluster.messages.views import RebalancePreview, SubjectPreview
from elastic_moe.cluster.placement import Placement, Worker
from elastic_moe.optimizer import PlacementProblem, PlanResult
from elastic_moe.optimizer.constants import Constants, calibration_file, load_constants, nearest
from elastic_moe.optimizer.core.cost import expected_fetches, price
from elastic_moe.optimizer.core.estimate import RUN, expected_covariance
from elastic_moe.optimizer.core.problem import DEFAULT_STEP_TOKENS, Links
from elastic_moe.optimizer.decision import MOVE_SHARE, RELIEF, SETTLING, Decision, Policy, decide
from elastic_moe.optimizer.residency.memory import WorkerMemory
from elastic_moe.optimizer.subjects.likeness import tells_subject
from elastic_moe.optimizer.subjects.memory import PRESENT_SHARE, Remembered, SubjectMemory, Variation, scenarios

logger = logging.getLogger(__name__)

Counts = npt.NDArray[np.int64]
Loads = npt.NDArray[np.float64]

ACTIVATION_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def build_problem(
    model: ModelInfo,
    placement: Placement,
    load: Loads,
    transitions: Loads,
    *,
    dtype: str,
    parts: Counts | None = None,
    runs: Loads | None = None,
    requests: int = 1,
    remembered: Sequence[Remembered] = (),
    variation: Variation | None = None,
    room: int | None = None,
    memory: tuple[WorkerMemory, ...] = (),
    links: Links | None = None,
    tokens_per_step: int = DEFAULT_STEP_TOKENS,
    constants: Constants | None = None,
    dealt: bool = False,
    shared_disk: bool = False,
) -> PlacementProblem:
    """The problem of placing `model`'s experts on the workers of `placement`.

    load: [L, E] tokens of the window for each expert, which may be weighted by their cost. A layer without any token
    counts as evenly loaded.
    transitions: [L-1, E, E] of the window, estimated from a sample of its tokens. The problem estimates co-activation
    from them, since it is not counted.
    parts: [P, L, E] loads of P parts of the window, from which their variation is estimated; None: no variation.
    runs: [Q, L, E] loads of short runs of the window's tokens, of at least `requests` requests: how experts rise
    together there tells what a change of subject may bring. None: no change is reckoned with.
    remembered: subjects that the traffic has had before, for which the placement is planned too.
    variation: how their stretches varied; None: unknown.
    room: experts that each worker has memory for beside its own, while experts move; None: not limited.
    memory: [W] the tiers of each worker; empty if every expert fits.
    links: bandwidths; None: those of eight H100.
    tokens_per_step: of the whole cluster.
    constants: what `emoe calibrate` has measured; None: those of an H100, and every worker has cores of its own.
    dealt: whether workers deal the misses of each step. shared_disk: whether they read from one disk.
    """
    counted = np.where(load.sum(axis=1, keepdims=True) > 0, load, 1).astype(np.float64)
    loads, each, weights = scenarios(counted, remembered)
    crowds = Counter(worker.node for worker in placement.workers)
    return PlacementProblem(
        loads=loads,
        scenario_loads=each,
        scenario_weights=weights,
        workers=placement.workers,
        top_k=model.top_k,
        transitions=transitions if transitions.any() else None,
        load_covariance=expected_covariance(counted, parts, variation, runs, requests),
        current=placement,
        expert_bytes=model.expert_bytes,
        token_bytes=model.hidden_size * ACTIVATION_BYTES[dtype],
        memory=memory,
        links=links or Links(),
        tokens_per_step=tokens_per_step,
        token_expert_s=PlacementProblem.token_expert_s if constants is None else constants.token_expert_s,
        node_cores=math.inf if constants is None else constants.cores_for(max(crowds.values())),
        dealt=dealt,
        shared_disk=shared_disk,
        move_budget=min(max(1, round(MOVE_SHARE * counted.size)), counted.size if room is None else room),
    )


def links_of(
    config: ServeConfig, workers: Sequence[Worker], measured: Rates, constants: Constants | None = None
) -> Links:
    """The bandwidths to plan with: the settings', what was measured, what `emoe calibrate` found, or else those of
    eight H100."""
    usual = Links()
    if constants is not None:
        usual = Links(
            worker_gbps=constants.worker_gbps or usual.worker_gbps, node_gbps=constants.node_gbps or usual.node_gbps
        )
    ports, uplinks = port_rates(workers, measured), uplink_rates(workers, measured)
    return Links(
        worker_gbps=config.worker_gbps or usual.worker_gbps,
        node_gbps=config.node_gbps or usual.node_gbps,
        ports_gbps=() if config.worker_gbps else ports,
        uplinks_gbps=() if config.node_gbps else uplinks,
    )


def constants_for(config: ServeConfig, model: ModelInfo, dtype: str, device: str) -> tuple[Constants, ...]:
    """What `emoe calibrate` has measured of the model: in the named file, or else in the one for this model on this
    machine, if there is one. A file that cannot be read is told of in the log."""
    path = calibration_file(model, dtype, device) if config.calibration is None else Path(config.calibration)
    if config.calibration is None and not path.exists():
        return ()
    try:
        return load_constants(path)
    except ConfigError as error:
        logger.warning("planners reckon with the usual constants: %s", error)
        return ()


def memory_of_members(facts: Facts) -> tuple[WorkerMemory, ...]:
    """[W] the tiers of each member, in rank order; empty where they have memory for all that they serve."""
    rooms = facts.rooms([facts.records[worker] for worker in facts.ranks])
    layers, expert_bytes = facts.model.num_layers, facts.model.expert_bytes
    memory = []
    for worker, has in rooms.items():
        info = facts.records[worker].info
        if has is None or info is None:
            return ()
        memory.append(
            WorkerMemory(
                device_experts=has.device,
                host_experts=has.host,
                disk_fetch_s=expert_bytes / has.disk_bytes_per_s,
                host_fetch_s=expert_bytes / info.host_bytes_per_s if info.host_bytes_per_s else 0.0,
                host_token_s=info.host_token_s,
                cache_slots=cache_slots_of(has.device // layers),
            )
        )
    return tuple(memory)


def deals(facts: Facts) -> bool:
    """Whether the members deal the misses of each step: those of several nodes do on CPUs."""
    infos = [facts.records[worker].info for worker in facts.ranks]
    on_cpu = all(info is not None and info.device == "cpu" for info in infos)
    return on_cpu and facts.spec is not None and facts.spec.transport == TransportKind.TCP


def share_disk(facts: Facts) -> bool:
    """Whether all members are on one node."""
    return len({info.node for worker in facts.ranks if (info := facts.records[worker].info) is not None}) == 1


def judge(result: PlanResult, *, load: Counts, since_change_s: float | None, policy: Policy | None = None) -> Decision:
    # at least 1.0: if nothing was counted, the gain that `decide` requires is large, but finite
    tokens = max(1.0, float(load.mean()))
    share = PRESENT_SHARE if len(result.each) > 1 else 1.0
    decision = decide(
        result, tokens_per_expert=tokens, since_change_s=since_change_s, present_share=share, policy=policy
    )
    if not load.any():
        return replace(decision, reason=f"no tokens are counted yet: {decision.reason}")
    return decision


def weighed(problem: PlacementProblem, before: Sequence[Placement]) -> tuple[float, tuple[float, ...]]:
    """Seconds of a step that computes what the problem has counted: under its current placement, and under each of
    `before`, with what going there costs. Risk does not count, since the tokens have come."""
    assert problem.current is not None
    costs = [price(problem, placement) for placement in (problem.current, *before)]
    return costs[0].realised_s, tuple(cost.realised_s + cost.migration_s for cost in costs[1:])


def to_event(ticket: int, result: PlanResult, decision: Decision) -> PlanReady:
    before = result.cost_before
    return PlanReady(
        ticket=ticket,
        placement=result.placement,
        worthwhile=decision.worthwhile,
        no_worse=before is None or result.cost.step_s <= before.step_s,
        reason=f"{decision.reason} ({result.planner}: {result.reason})",
    )


def preview(
    problem: PlacementProblem, result: PlanResult, decision: Decision, remembered: Sequence[Remembered] = ()
) -> RebalancePreview:
    """`remembered` are the subjects of the problem, the heaviest first."""
    before = result.cost_before or result.cost
    assert problem.current is not None
    misses_before = expected_fetches(problem, problem.current).experts
    misses_after = expected_fetches(problem, result.placement).experts
    return RebalancePreview(
        planner=result.planner,
        worthwhile=decision.worthwhile,
        reason=f"{decision.reason} ({result.reason})",
        load_imbalance_before=result.imbalance if result.imbalance_before is None else result.imbalance_before,
        load_imbalance_after=result.imbalance,
        cost_before=before.step_s,
        cost_after=result.cost.step_s,
        moves=result.moves,
        bytes=result.bytes,
        subjects=tuple(
            SubjectPreview(age_s=subject.age_s, weight=weight, cost_before=before_s, cost_after=after_s)
            for subject, weight, before_s, after_s in zip(
                remembered, problem.scenario_weights[1:], result.each_before[1:], result.each[1:], strict=False
            )
        ),
        misses_before=misses_before,
        misses_after=misses_after,
        fetch_bytes_before=misses_before * problem.expert_bytes,
        fetch_bytes_after=misses_after * problem.expert_bytes,
        solver_status=str(result.status),
        gap=result.gap,
        seconds=result.seconds,
        placement=result.placement,
    )


class Planners:
    """Asks planners for a placement that suits the window of routing statistics. They run at a low priority."""

    def __init__(
        self,
        fleet: Fleet,
        config: ServeConfig,
        model: ModelInfo,
        dtype: str,
        window: RoutingWindow,
        memory: SubjectMemory,
        running_requests: Callable[[], int],
        link_gbps: Callable[[], Rates],
    ) -> None:
        """`running_requests` returns how many run now. A step has as many tokens if none of them is new.
        `link_gbps` returns what was measured of the links between workers."""
        self._fleet = fleet
        self._running_requests = running_requests
        self._link_gbps = link_gbps
        self._config = config
        self._model = model
        self._dtype = dtype
        self._window = window
        self._memory = memory

        self._constants = constants_for(config, model, dtype, fleet.device())

    def configure(self, config: ServeConfig) -> None:
        """Use the settings of a redeploy from now on."""
        self._config = config
        self._constants = constants_for(config, self._model, self._dtype, self._fleet.device())

    async def preview(self, planner: str, facts: Facts) -> RebalancePreview:
        """What a re-placement would do. Raises CALL_ERRORS."""
        remembered = self._remembered()
        problem, result, decision = await self.solve(planner, facts, remembered, urgent=True)
        return preview(problem, replace(result, placement=with_tiers(facts, result.placement)), decision, remembered)

    def _remembered(self) -> list[Remembered]:
        """The subjects that the traffic has had, other than the present one."""
        now = time.monotonic()
        return self._memory.others(self._window.load(now), now)

    async def solve(
        self,
        planner: str,
        facts: Facts,
        remembered: Sequence[Remembered],
        policy: Policy | None = None,
        *,
        urgent: bool = False,
    ) -> tuple[PlacementProblem, PlanResult, Decision]:
        """Returns the problem as it is now, a plan for the workers in force, and whether it is worthwhile by `policy`.

        urgent: somebody waits for the answer. Raises CALL_ERRORS.
        """
        now = time.monotonic()
        load = self._window.load(now)
        problem = await self._problem(facts, remembered, now)
        deadline_s = self._config.plan_deadline
        work = self._fleet.solve(problem, planner, deadline_s, self._config.solver, urgent=urgent)
        result = await within(work, liveness.plan_timeout_s(deadline_s))
        since_s = now - facts.epoch_since if facts.epoch > 1 else None
        return problem, result, judge(result, load=load, since_change_s=since_s, policy=policy)

    async def _problem(self, facts: Facts, remembered: Sequence[Remembered], now: float) -> PlacementProblem:
        """The problem of the workers in force and the present window."""
        assert facts.spec is not None
        prefill, decode = self._window.phases(now)
        sample, parts = self._window.sample(now), self._window.load_parts(now)
        memory, running = memory_of_members(facts), max(1, self._running_requests())
        nodes = len({worker.node for worker in facts.spec.placement.workers})
        constants = nearest(self._constants, len(facts.ranks), nodes)
        links = links_of(self._config, facts.spec.placement.workers, self._link_gbps(), constants)
        variation, placement = self._memory.variation(now), facts.spec.placement

        def build() -> PlacementProblem:
            return build_problem(
                self._model,
                placement,
                weighted_load(prefill, decode),
                sample.transitions(),
                dtype=self._dtype,
                parts=parts,
                runs=sample.runs(RUN),
                requests=running,
                remembered=remembered,
                variation=variation,
                room=room(facts),
                memory=memory,
                links=links,
                # how many tokens a step has decides how many experts it needs
                tokens_per_step=running if memory else DEFAULT_STEP_TOKENS,
                constants=constants,
                dealt=deals(facts),
                shared_disk=share_disk(facts) and not any(each.host_experts for each in memory),
            )

        # covariances of a large model take a good part of a second
        return await asyncio.to_thread(build)

    async def weigh(self, command: Weigh, facts: Facts) -> list[Weighed]:
        """Carry out the command to price placements on the window. Returns one event."""
        now = time.monotonic()
        counted = tells_subject(self._window.load(now))
        problem = await self._problem(facts, (), now)
        present_s, before_s = await asyncio.to_thread(weighed, problem, command.before)
        tokens = self._window.tokens(now) if counted else 0
        return [Weighed(ticket=command.ticket, present_s=present_s, before_s=before_s, tokens=tokens)]

    async def answer(self, command: Solve, facts: Facts) -> list[PlanReady]:
        """Carry out the command to ask a planner. Returns one event, also if the planner failed."""
        try:
            # the quick answer is to the present subject alone
            quick = command.planner == "relief"
            policy = RELIEF if quick else SETTLING if command.settling else None
            planner, remembered = command.planner or self._config.planner, [] if quick else self._remembered()
            _, result, decision = await self.solve(planner, facts, remembered, policy)
        except CALL_ERRORS as error:
            reason = one_line(error)
            return [PlanReady(ticket=command.ticket, placement=None, worthwhile=False, no_worse=False, reason=reason)]
        return [to_event(command.ticket, result, decision)]
