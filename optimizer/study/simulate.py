"""Replays a trace through the production code on a virtual clock, to see what re-placement would have gained.

The window (cluster.facts.routing.RoutingWindow), the planner (optimizer.plan) and the rule whether to act
(optimizer.decide) are those of the server; only the clock and the tokens are simulated. Planning takes no virtual time,
and a new placement serves from the next interval on.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

import numpy as np

from elastic_moe.cluster.control.rebalancing import SETTLING_S
from elastic_moe.cluster.decisions.trials import Trials
from elastic_moe.cluster.facts.routing import RoutingWindow
from elastic_moe.cluster.facts.sampling import as_choices
from elastic_moe.cluster.messages.epochs import PhaseCounts, RoutingCounts
from elastic_moe.cluster.placement import Placement, Worker, contiguous
from elastic_moe.optimizer.core.contract import Clock
from elastic_moe.optimizer.core.cost import moves_to, price
from elastic_moe.optimizer.core.estimate import RUN, expected_covariance
from elastic_moe.optimizer.core.problem import Links, PlacementProblem, Semantics
from elastic_moe.optimizer.core.result import PlanResult
from elastic_moe.optimizer.decision import MOVE_SHARE, RELIEF, Decision, Policy, decide
from elastic_moe.optimizer.planner import plan
from elastic_moe.optimizer.study.metrics import measure
from elastic_moe.optimizer.study.scenario import problem_from_trace
from elastic_moe.optimizer.study.traces import Trace, TraceError
from elastic_moe.optimizer.subjects.likeness import tells_subject
from elastic_moe.optimizer.subjects.memory import PRESENT_SHARE, SubjectMemory, scenarios
from elastic_moe.optimizer.subjects.watch import Sight, SubjectWatch


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulationSettings:
    """The settings of the simulated server."""

    planner: str = "auto"
    solver: str = "highs"
    deadline_s: float = 2.0
    """Real seconds that the planner may take at each check."""
    interval_s: float = 60.0
    """Virtual seconds between two checks of the placement."""
    window_s: float = 300.0
    """Virtual seconds for which statistics are kept."""
    tokens_per_s: float = 20.0
    """Tokens of the trace that are served in a virtual second."""
    move_share: float | None = MOVE_SHARE
    """Largest share of all experts that one change moves; None sets no limit."""
    memory: bool = True
    """Whether placements are planned for the subjects that came before, too."""
    prior: bool = True
    """Whether plans reckon with a change of subject that the window does not show."""
    requests: int = 16
    """Requests that are running, on each of which the prior is weaker."""
    quick: bool = True
    """Whether a change of subject is noticed in the counts, and answered by a few moves at once."""
    report_s: float = 5.0
    """Virtual seconds between two reports of the workers' counts."""
    policy: Policy = field(default_factory=Policy)
    semantics: Semantics = Semantics.HOME
    links: Links = field(default_factory=Links)
    expert_bytes: int = 17_301_504
    horizon_steps: float = 10_000.0
    seed: int = 0
    clock: Clock = time.monotonic
    """Counts the deadline; one that counts the processor's time does not depend on what else the machine does."""


class ChangeKind(StrEnum):
    """Why a placement was changed."""

    PLANNED = "planned"
    """A planner was asked at the end of an interval."""
    QUICK = "quick"
    """A change of subject was answered by a few moves at once."""
    UNDONE = "undone"
    """The change before had made steps longer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """A change of the placement."""

    kind: ChangeKind
    time_s: float
    """Virtual time from which `after` serves."""
    before: Placement
    after: Placement
    moves: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """One interval of the simulation."""

    time_s: float
    """Virtual time at the end of the interval."""
    imbalance: float
    """Load imbalance of the interval's tokens under the placement that served them."""
    imbalance_static: float
    """Load imbalance of the same tokens under the first placement."""
    fan_out: float
    fan_out_static: float
    step_cost: float
    """Seconds per step for the interval's tokens under the placement that served them, without risk."""
    step_cost_static: float
    changed: bool
    relieved: bool
    """Whether a change of subject within the interval was answered by a few moves at once."""
    undone: bool
    """Whether an earlier change was undone within the interval, because it had made steps longer."""
    moves: int
    bytes: int
    gain: float
    """Share of a step's cost that the plan at the end of the interval promises to save, after the cost of migration."""
    reason: str


def simulate(
    trace: Trace,
    workers: tuple[Worker, ...],
    settings: SimulationSettings,
    *,
    first: Placement | None = None,
    progress: Callable[[Look], None] | None = None,
    on_change: Callable[[Change], None] | None = None,
) -> list[Look]:
    """Serve the trace, beginning with the placement `first` (contiguous if None). Blocks: planning takes real time.
    `progress` hears of each interval, `on_change` of each change of the placement.

    Raises TraceError where the trace is shorter than one interval.
    """
    per_look = int(settings.interval_s * settings.tokens_per_s)
    if per_look < 1:
        raise TraceError(
            f"interval: expected at least 1 token, got {settings.interval_s:g} s of {settings.tokens_per_s:g} tokens/s"
        )
    if trace.num_tokens < per_look:
        raise TraceError(
            f"interval: an interval of {settings.interval_s:g} s takes {per_look} tokens at {settings.tokens_per_s:g} "
            f"tokens/s, and the trace has {trace.num_tokens}: lower --interval or --rate, or give more traces"
        )
    return _Run(trace, workers, settings, first, on_change).looks(per_look, progress)


class _Run:
    """The simulated server while it serves."""

    def __init__(
        self,
        trace: Trace,
        workers: tuple[Worker, ...],
        settings: SimulationSettings,
        first: Placement | None,
        on_change: Callable[[Change], None] | None,
    ) -> None:
        self._trace, self._settings, self._on_change = trace, settings, on_change
        self._static = first or contiguous(trace.num_layers, trace.num_experts, workers)
        self._placement = self._static
        self._window = RoutingWindow(trace.num_layers, trace.num_experts, window_s=settings.window_s)
        self._memory, self._part = SubjectMemory(trace.num_layers, trace.num_experts), -1
        self._watch = SubjectWatch()
        self._changed_at: float | None = None
        self._trials = Trials(settings.window_s)
        self._settling: tuple[float, ...] = ()
        """Virtual times of looks that the last change of subject asks for."""
        self._changes: list[Change] = []
        """Of the present interval."""

    def looks(self, per_look: int, progress: Callable[[Look], None] | None) -> list[Look]:
        looks = []
        for begin in range(0, self._trace.num_tokens - per_look + 1, per_look):
            looks.append(self._interval(begin, begin + per_look))
            if progress is not None:
                progress(looks[-1])
        return looks

    def _interval(self, begin: int, end: int) -> Look:
        """Serve the tokens begin .. end - 1, and look at the placement once they are served."""
        step = max(1, int(self._settings.report_s * self._settings.tokens_per_s))
        spans, self._changes = [(begin, self._placement)], []
        for at in range(begin, end, step):
            self._report(at, min(at + step, end))
            if self._placement is not spans[-1][1] and at + step < end:
                spans.append((at + step, self._placement))
        served = part_of(self._trace, begin, end)
        parts = [
            (part_of(self._trace, first, last), placement)
            for (first, placement), last in zip(spans, [*(at for at, _ in spans[1:]), end], strict=True)
        ]
        decision = self._look(end / self._settings.tokens_per_s)
        return self._seen(served, parts, decision, end / self._settings.tokens_per_s)

    def _look(self, now: float) -> Decision:
        """Look at the whole placement, unless a change is undone just now."""
        undone = self._undo(now)
        if undone is not None:
            return Decision(worthwhile=False, net_gain=0.0, seen_gain=0.0, reason=undone)
        return self._answer(ChangeKind.PLANNED, self._settings.policy, now)

    def _answer(self, kind: ChangeKind, policy: Policy, now: float) -> Decision:
        """Ask the planner for this kind of change, and carry its plan out if that is worth it."""
        planner = "relief" if kind is ChangeKind.QUICK else None
        result = _plan(
            self._window, self._memory, self._placement, self._trace.top_k, self._settings, now, planner=planner
        )
        decision = self._decide(result, policy, now)
        if decision.worthwhile:
            self._adopt(kind, result.placement, decision.reason, now)
        return decision

    def _seen(self, served: Trace, parts: Sequence[tuple[Trace, Placement]], decision: Decision, now: float) -> Look:
        """What the interval showed of the placements that served its parts."""
        there, settings = measure(served, self._static), self._settings
        share = [part.num_tokens / served.num_tokens for part, _ in parts]
        here = [measure(part, placement) for part, placement in parts]
        kinds, moves = {change.kind for change in self._changes}, sum(change.moves for change in self._changes)
        return Look(
            time_s=now,
            imbalance=sum(s * one.load_imbalance for s, one in zip(share, here, strict=True)),
            imbalance_static=there.load_imbalance,
            fan_out=sum(s * one.fan_out for s, one in zip(share, here, strict=True)),
            fan_out_static=there.fan_out,
            step_cost=sum(s * step_cost(*part, settings) for s, part in zip(share, parts, strict=True)),
            step_cost_static=step_cost(served, self._static, settings),
            changed=bool(kinds),
            relieved=ChangeKind.QUICK in kinds,
            undone=ChangeKind.UNDONE in kinds,
            moves=moves,
            bytes=moves * settings.expert_bytes,
            gain=decision.net_gain,
            # the last look may have come after the change, and say why there is no other
            reason=self._changes[-1].reason if self._changes else decision.reason,
        )

    def _report(self, begin: int, end: int) -> None:
        """Take the counts of some tokens, and answer at once what they show."""
        # a report arrives just before the check that reads it
        now = end / self._settings.tokens_per_s - 1e-6
        counts = count_routing(part_of(self._trace, begin, end))
        self._window.add(counts, now)
        for number, part_load in self._window.closed(self._part, now) if self._settings.memory else ():
            self._memory.add(part_load, now)
            self._part = number
        sight = self._watch.look(counts.load) if self._settings.quick else Sight.NOTHING_NEW
        if sight is Sight.CHANGED:
            # the memory keeps the old subject
            self._window.begin_with(self._watch.present, self._trace.top_k, now)
        if sight is not Sight.NOTHING_NEW:
            self._settling = tuple(now + after_s for after_s in SETTLING_S)
            self._answer(ChangeKind.QUICK, RELIEF, now)
        self._undo(now)
        self._settle(now)

    def _settle(self, now: float) -> None:
        """Look at the whole placement, if a change of subject asks for that."""
        due = [at for at in self._settling if at <= now]
        if due:
            self._settling = self._settling[len(due) :]
            self._answer(ChangeKind.PLANNED, dataclasses.replace(self._settings.policy, cooldown_s=0.0), now)

    def _decide(self, result: PlanResult, policy: Policy, now: float) -> Decision:
        return decide(
            result,
            tokens_per_expert=float(self._window.load(now).mean()),
            since_change_s=None if self._changed_at is None else now - self._changed_at,
            present_share=PRESENT_SHARE if len(result.each) > 1 else 1.0,
            policy=policy,
        )

    def _undo(self, now: float) -> str | None:
        """Go back to the placement before a change that has done harm. Returns the reason of that."""
        if not self._trials.is_due(now):
            return None
        load = self._window.load(now)
        # the old subjects do not count: these tokens have come
        problem = _problem(self._window, None, self._placement, self._trace.top_k, self._settings, now)
        costs = [price(problem, placement) for placement in (self._placement, *self._trials.placements)]
        undo = self._trials.weigh(
            costs[0].realised_s,
            [cost.realised_s + cost.migration_s for cost in costs[1:]],
            self._window.tokens(now) if tells_subject(load) else 0,
            now,
        )
        if undo is None:
            return None
        self._adopt(ChangeKind.UNDONE, undo.placement, undo.reason, now)
        return undo.reason

    def _adopt(self, kind: ChangeKind, placement: Placement, reason: str, now: float) -> None:
        before = self._placement
        problem = _problem(self._window, None, before, self._trace.top_k, self._settings, now)
        change = Change(
            kind=kind, time_s=now, before=before, after=placement, moves=moves_to(problem, placement), reason=reason
        )
        if kind is not ChangeKind.UNDONE:
            self._trials.begin(f"the {kind} change at {now:.0f} s", before, now)
        self._placement, self._changed_at = placement, now
        self._changes.append(change)
        if self._on_change is not None:
            self._on_change(change)


def _problem(
    window: RoutingWindow,
    memory: SubjectMemory | None,
    placement: Placement,
    top_k: int,
    settings: SimulationSettings,
    now: float,
) -> PlacementProblem:
    """The problem of the window. memory: what is remembered of other subjects, for which it is priced too."""
    load, parts = window.load(now), window.load_parts(now)
    loads, each, weights = scenarios(load, () if memory is None else memory.others(load, now))
    return PlacementProblem(
        loads=loads,
        scenario_loads=each,
        scenario_weights=weights,
        transitions=window.sample(now).transitions(),
        load_covariance=expected_covariance(
            load,
            parts,
            None if memory is None else memory.variation(now),
            window.sample(now).runs(RUN) if settings.prior else None,
            settings.requests,
        ),
        workers=placement.workers,
        top_k=top_k,
        current=placement,
        links=settings.links,
        semantics=settings.semantics,
        expert_bytes=settings.expert_bytes,
        horizon_steps=settings.horizon_steps,
        move_budget=None if settings.move_share is None else int(settings.move_share * load.size),
    )


def _plan(
    window: RoutingWindow,
    memory: SubjectMemory,
    placement: Placement,
    top_k: int,
    settings: SimulationSettings,
    now: float,
    planner: str | None = None,
) -> PlanResult:
    # the quick answer is to the present subject alone
    problem = _problem(window, None if planner == "relief" else memory, placement, top_k, settings, now)
    return plan(
        problem,
        planner=planner or settings.planner,
        solver=settings.solver,
        deadline_s=settings.deadline_s,
        seed=settings.seed,
        clock=settings.clock,
    )


def step_cost(served: Trace, placement: Placement, settings: SimulationSettings) -> float:
    """Seconds of a step that serves these tokens under a placement, without risk."""
    problem = problem_from_trace(served, placement.workers, semantics=settings.semantics, links=settings.links)
    return price(problem, placement).realised_s


def part_of(trace: Trace, begin: int, end: int) -> Trace:
    """Tokens begin .. end - 1, with the requests, or parts of requests, that they belong to."""
    ends = np.cumsum(trace.request_lengths)
    inside = np.minimum(ends, end) - np.maximum(ends - trace.request_lengths, begin)
    return Trace(topk_ids=trace.topk_ids[begin:end], request_lengths=inside[inside > 0], num_experts=trace.num_experts)


def count_routing(trace: Trace) -> RoutingCounts:
    """The counts that workers would report for these tokens."""
    layers, experts, ids = trace.num_layers, trace.num_experts, trace.topk_ids.astype(np.int64)
    load = np.stack([np.bincount(ids[:, layer].ravel(), minlength=experts) for layer in range(layers)])
    counted = PhaseCounts(tokens=trace.num_tokens, load=load.astype(np.int64))
    none = PhaseCounts(tokens=0, load=np.zeros_like(counted.load))
    return RoutingCounts(prefill=none, decode=counted, sample=as_choices(trace.topk_ids, experts))
