"""Replays a trace through the production code on a virtual clock, to see what re-placement would have gained.

The window (cluster.facts.routing.RoutingWindow), the planner (optimizer.plan) and the rule whether to act
(optimizer.decide) are those of the server; only the clock and the tokens are simulated. Planning takes no virtual time,
and a new placement serves from the next interval on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from elastic_moe.cluster.facts.routing import RoutingWindow
from elastic_moe.cluster.facts.sampling import as_choices
from elastic_moe.cluster.messages.epochs import PhaseCounts, RoutingCounts
from elastic_moe.cluster.placement import Placement, Worker, contiguous
from elastic_moe.optimizer.core.cost import price
from elastic_moe.optimizer.core.estimate import expected_covariance
from elastic_moe.optimizer.core.problem import Links, PlacementProblem, Semantics
from elastic_moe.optimizer.core.result import PlanResult
from elastic_moe.optimizer.decision import MOVE_SHARE, RELIEF, Decision, Policy, decide
from elastic_moe.optimizer.planner import plan
from elastic_moe.optimizer.study.metrics import measure
from elastic_moe.optimizer.study.scenario import problem_from_trace
from elastic_moe.optimizer.study.traces import Trace, TraceError
from elastic_moe.optimizer.subjects.memory import PRESENT_SHARE, SubjectMemory, scenarios
from elastic_moe.optimizer.subjects.watch import SubjectWatch
from elastic_moe.optimizer.trial import Trial, Verdict


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
    """Whether the change before was undone, because it had made steps longer."""
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
) -> list[Look]:
    """Serve the trace, beginning with the placement `first` (contiguous if None). Blocks: planning takes real time.

    Raises TraceError where the trace is shorter than one interval.
    """
    per_look = int(settings.interval_s * settings.tokens_per_s)
    if per_look < 1 or trace.num_tokens < per_look:
        raise TraceError(f"trace: {trace.num_tokens} tokens are less than one interval of {per_look}")
    return _Run(trace, workers, settings, first).looks(per_look, progress)


class _Run:
    """The simulated server while it serves."""

    def __init__(
        self, trace: Trace, workers: tuple[Worker, ...], settings: SimulationSettings, first: Placement | None
    ) -> None:
        self._trace, self._settings = trace, settings
        self._static = first or contiguous(trace.num_layers, trace.num_experts, workers)
        self._placement = self._static
        self._window = RoutingWindow(trace.num_layers, trace.num_experts, window_s=settings.window_s)
        self._memory, self._part = SubjectMemory(trace.num_layers, trace.num_experts), -1
        self._watch = SubjectWatch()
        self._changed_at: float | None = None
        self._trial: Trial | None = None

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
        spans, relieved = [(begin, self._placement)], None
        for at in range(begin, end, step):
            relieved = self._report(at, min(at + step, end)) or relieved
            if self._placement is not spans[-1][1] and at + step < end:
                spans.append((at + step, self._placement))
        now = end / self._settings.tokens_per_s
        served = _slice(self._trace, begin, end)
        parts = [
            (measure(_slice(self._trace, first, last), placement), (last - first) / (end - begin))
            for (first, placement), last in zip(spans, [*(at for at, _ in spans[1:]), end], strict=True)
        ]
        there = measure(served, self._static)
        serving = self._placement
        self._try(served, now)
        undone = self._undo(now)
        result = _plan(self._window, self._memory, self._placement, self._trace.top_k, self._settings, now)
        decision = self._decide(result, self._settings.policy, now)
        change = decision.worthwhile and undone is None
        if change:
            self._adopt(result.placement, now)
        return Look(
            time_s=now,
            imbalance=sum(one.load_imbalance * share for one, share in parts),
            imbalance_static=there.load_imbalance,
            fan_out=sum(one.fan_out * share for one, share in parts),
            fan_out_static=there.fan_out,
            step_cost=_step_cost(served, serving, self._settings),
            step_cost_static=_step_cost(served, self._static, self._settings),
            changed=change or relieved is not None or undone is not None,
            relieved=relieved is not None,
            undone=undone is not None,
            moves=(result.moves if change else 0) + (relieved.moves if relieved else 0) + (undone or 0),
            bytes=self._settings.expert_bytes
            * ((result.moves if change else 0) + (relieved.moves if relieved else 0) + (undone or 0)),
            gain=decision.net_gain,
            reason=decision.reason if undone is None else "the last change had made steps longer, and is undone",
        )

    def _report(self, begin: int, end: int) -> PlanResult | None:
        """Take the counts of some tokens. Returns the plan of a quick answer that was carried out."""
        # a report arrives just before the check that reads it
        now = end / self._settings.tokens_per_s - 1e-6
        counts = count_routing(_slice(self._trace, begin, end))
        self._window.add(counts, now)
        for number, part_load in self._window.closed(self._part, now) if self._settings.memory else ():
            self._memory.add(part_load, now)
            self._part = number
        if not self._settings.quick:
            return None
        if not self._watch.look(counts.load):
            return None
        # the memory keeps the old subject
        self._window.begin_with(counts.load, self._trace.top_k, now)
        result = _plan(
            self._window, self._memory, self._placement, self._trace.top_k, self._settings, now, planner="relief"
        )
        if not self._decide(result, RELIEF, now).worthwhile:
            return None
        self._adopt(result.placement, now)
        return result

    def _decide(self, result: PlanResult, policy: Policy, now: float) -> Decision:
        return decide(
            result,
            tokens_per_expert=float(self._window.load(now).mean()),
            since_change_s=None if self._changed_at is None else now - self._changed_at,
            present_share=PRESENT_SHARE if len(result.each) > 1 else 1.0,
            policy=policy,
        )

    def _adopt(self, placement: Placement, now: float) -> None:
        if self._trial is None:
            self._trial = Trial(before=self._placement, begun_s=now, window_s=self._settings.window_s)
        self._placement, self._changed_at = placement, now

    def _try(self, served: Trace, now: float) -> None:
        """Price the interval under the placement before the last change, too."""
        if self._trial is not None:
            old_s = _step_cost(served, self._trial.before, self._settings)
            new_s = _step_cost(served, self._placement, self._settings)
            self._trial.add(old_s=old_s, new_s=new_s, tokens=served.num_tokens)

    def _undo(self, now: float) -> int | None:
        """Go back to the placement before a change that has done harm. Returns the moves of that."""
        if self._trial is None:
            return None
        verdict, before = self._trial.verdict(now), self._trial.before
        if verdict is not Verdict.OPEN:
            self._trial = None
        if verdict is not Verdict.HARMFUL:
            return None
        moved = int((before.physical_to_logical_map != self._placement.physical_to_logical_map).sum())
        self._placement, self._changed_at = before, now
        return moved


def _plan(
    window: RoutingWindow,
    memory: SubjectMemory,
    placement: Placement,
    top_k: int,
    settings: SimulationSettings,
    now: float,
    planner: str | None = None,
) -> PlanResult:
    load, parts = window.load(now), window.load_parts(now)
    # the quick answer is to the present subject alone
    loads, each, weights = scenarios(load, () if planner == "relief" else memory.others(load, now))
    budget = None if settings.move_share is None else int(settings.move_share * load.size)
    problem = PlacementProblem(
        loads=loads,
        scenario_loads=each,
        scenario_weights=weights,
        transitions=window.sample(now).transitions(),
        load_covariance=expected_covariance(load, parts, memory.variation(now)),
        workers=placement.workers,
        top_k=top_k,
        current=placement,
        links=settings.links,
        semantics=settings.semantics,
        expert_bytes=settings.expert_bytes,
        horizon_steps=settings.horizon_steps,
        move_budget=budget,
    )
    return plan(
        problem,
        planner=planner or settings.planner,
        solver=settings.solver,
        deadline_s=settings.deadline_s,
        seed=settings.seed,
    )


def _step_cost(served: Trace, placement: Placement, settings: SimulationSettings) -> float:
    problem = problem_from_trace(served, placement.workers, semantics=settings.semantics, links=settings.links)
    return price(problem, placement).realised_s


def _slice(trace: Trace, begin: int, end: int) -> Trace:
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
