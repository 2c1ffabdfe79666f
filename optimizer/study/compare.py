"""Runs every planner on one problem, judges them on tokens that none has seen, and writes CSV and Markdown.

Figures are in optimizer.study.figures.
"""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from elastic_moe.optimizer.core.cost import price
from elastic_moe.optimizer.core.problem import PlacementProblem
from elastic_moe.optimizer.core.result import PlanResult
from elastic_moe.optimizer.planner import plan
from elastic_moe.optimizer.study.caches import Replayed, replay_problem
from elastic_moe.optimizer.study.metrics import Metrics, measure
from elastic_moe.optimizer.study.traces import Trace


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """The result of one planner: metrics on the test tokens, and costs on the problem and on the test tokens."""

    planner: str
    status: str
    termination: str
    load_imbalance: float
    fan_out: float
    same_worker_transitions: float
    cross_node_fraction: float
    step_cost: float
    """Seconds per step under the problem that was given."""
    test_step_cost: float
    """Seconds per step under the test tokens' statistics, without risk, since their load is known."""
    load_imbalance_profiled: float
    """Load imbalance on the tokens that the planner has seen."""
    replayed_miss_rate: float
    """Share of the accesses of the test tokens that miss in the devices; 0 where every expert fits."""
    replayed_waits: float
    """Fetches of the slowest worker in a step of the test tokens, summed over layers."""
    gap: float
    moves: int
    bytes: int
    seconds: float
    reason: str
    subject_costs: dict[str, float]
    """Seconds per step under the statistics of each trace by itself, without risk; empty where there is one trace."""


def compare(
    problem: PlacementProblem,
    test: Trace,
    test_problem: PlacementProblem,
    planners: Sequence[str],
    *,
    deadline_s: float,
    subjects: Mapping[str, PlacementProblem] | None = None,
    solver: str = "highs",
    seed: int = 0,
    progress: Callable[[Row], None] | None = None,
) -> list[tuple[Row, PlanResult]]:
    """Run the planners one after another. Blocks for up to `deadline_s` each. `test_problem` has the statistics of
    `test`, and `subjects` those of each trace that is to be shown by itself."""
    answers = []
    for name in planners:
        result = plan(problem, planner=name, deadline_s=deadline_s, solver=solver, seed=seed)
        replayed = Replayed(miss_rate=0.0, fetches=0.0)
        if problem.tiering is not None:
            replayed = replay_problem(test, problem, result.placement)
        row = _row(name, result, measure(test, result.placement, problem.semantics), test_problem, replayed, subjects)
        answers.append((row, result))
        if progress is not None:
            progress(row)
    return answers


def _row(
    name: str,
    result: PlanResult,
    metrics: Metrics,
    test_problem: PlacementProblem,
    replayed: Replayed,
    subjects: Mapping[str, PlacementProblem] | None,
) -> Row:
    return Row(
        subject_costs={key: price(each, result.placement).realised_s for key, each in (subjects or {}).items()},
        planner=name,
        status=str(result.status),
        termination=str(result.termination),
        step_cost=result.cost.step_s,
        test_step_cost=price(test_problem, result.placement).realised_s,
        load_imbalance_profiled=result.imbalance,
        replayed_miss_rate=replayed.miss_rate,
        replayed_waits=replayed.fetches,
        gap=result.gap,
        moves=result.moves,
        bytes=result.bytes,
        seconds=result.seconds,
        reason=result.reason,
        **dataclasses.asdict(metrics),
    )


def write_csv(path: Path, rows: Iterable[Row]) -> None:
    """Write one line per planner, with every field, and a column for the cost on each trace."""
    flat = []
    for row in rows:
        fields = dataclasses.asdict(row)
        of_subjects = fields.pop("subject_costs")
        flat.append(fields | {f"step_cost on {name}": cost_s for name, cost_s in of_subjects.items()})
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(flat[0]) if flat else [], lineterminator="\n")
        writer.writeheader()
        writer.writerows(flat)


_COLUMNS: tuple[tuple[str, Callable[[Row], str]], ...] = (
    ("planner", lambda row: row.planner),
    ("load max/mean", lambda row: f"{row.load_imbalance:.3f}"),
    ("fan-out", lambda row: f"{row.fan_out:.2f}"),
    ("same worker", lambda row: f"{row.same_worker_transitions:.3f}"),
    ("cross node", lambda row: f"{row.cross_node_fraction:.3f}"),
    ("step, profiled (us)", lambda row: f"{row.step_cost * 1e6:.1f}"),
    ("step, test (us)", lambda row: f"{row.test_step_cost * 1e6:.1f}"),
    ("gap", lambda row: f"{row.gap:.1%}"),
    ("moves", lambda row: str(row.moves)),
    ("seconds", lambda row: f"{row.seconds:.2f}"),
    ("status", lambda row: row.status),
)


_TIER_COLUMNS: tuple[tuple[str, Callable[[Row], str]], ...] = (
    ("misses", lambda row: f"{row.replayed_miss_rate:.1%}"),
    ("fetches waited for", lambda row: f"{row.replayed_waits:.1f}"),
)
"""Replayed on the test tokens; only where experts do not all fit."""


def behind_on_unseen(rows: Sequence[Row], seen: Collection[str], planner: str = "auto") -> str:
    """Sentences about the subjects that no planner has seen, and on which another one than `planner` has the cheapest
    step; empty where there are none. seen: the subjects' names that were planned for."""
    mine = next((row for row in rows if row.planner == planner), None)
    if mine is None:
        return ""
    text = ""
    for name, cost_s in mine.subject_costs.items():
        best = min(rows, key=lambda row: row.subject_costs[name])
        if name in seen or best.subject_costs[name] >= cost_s:
            continue
        text += (
            f"On {name}, which no planner has seen, {best.planner} is {1 - best.subject_costs[name] / cost_s:.1%} "
            f"cheaper than {planner}, which has used what it saw of {', '.join(seen)}.\n"
        )
    return text + "With --scenarios the planners see further subjects.\n" if text else ""


def markdown(rows: Iterable[Row]) -> str:
    """The rows as a Markdown table; metrics are on the test tokens."""
    rows = list(rows)
    subjects = tuple(
        (f"step, {name} (us)", lambda row, name=name: f"{row.subject_costs[name] * 1e6:.1f}")
        for name in (rows[0].subject_costs if rows else ())
    )
    columns = _COLUMNS + subjects + (_TIER_COLUMNS if any(row.replayed_waits for row in rows) else ())
    lines = ["| " + " | ".join(name for name, _ in columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(cell(row) for _, cell in columns) + " |" for row in rows]
    return (
        "\n".join(lines) + "\n\n" + _explained(subjects=bool(subjects), tiers=len(columns) > len(_COLUMNS + subjects))
    )


def _explained(*, subjects: bool, tiers: bool) -> str:
    """What the columns are, in one line below the table."""
    text = (
        "load, fan-out (workers per token and layer), same worker (share of a token's transitions) and cross node"
        " (share of its hops) are counted on the test tokens; step: what a step costs by the cost model, in us"
        " (microseconds), on the tokens that the planner saw, with a margin for load that may shift (profiled), and on"
        " the test tokens, without (test)"
    )
    if subjects:
        text += ", and on each trace by itself"
    if tiers:
        text += "; misses: share of accesses; fetches waited for: per step, by the slowest worker"
    return text + "; gap: to the lower bound of the profiled cost; seconds: of planning.\n"
