"""`emoe calibrate`: measures steps under placements from best to worst, fits the cost model's constants to some, and
checks what it predicts of the others."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import statistics
import sys
from dataclasses import dataclass

import numpy as np
import psutil

from elastic_moe.cluster.errors import ConfigError, UserError
from elastic_moe.cluster.facts.sampling import RoutingSample, as_choices
from elastic_moe.cluster.lines import counted
from elastic_moe.cluster.messages.epochs import ModelInfo
from elastic_moe.cluster.placement import EMPTY, Placement, Worker, contiguous
from elastic_moe.cluster.setting import check_file
from elastic_moe.deploy.calibrating.flags import STEPS, TURNS
from elastic_moe.deploy.launch.ray_environment import cluster_settings
from elastic_moe.model.checkpoints.checkpoint import open_checkpoint
from elastic_moe.model.measuring.group import LocalGroup, Measured, MeasuredGroup
from elastic_moe.model.measuring.process import Job
from elastic_moe.optimizer.constants import (
    Constants,
    Observation,
    calibration_file,
    fit,
    load_constants,
    observation,
    predicted_s,
    rank_correlation,
    save_constants,
)
from elastic_moe.optimizer.core.problem import PlacementProblem
from elastic_moe.optimizer.core.table import row_of, to_placement
from elastic_moe.optimizer.planner import plan
from elastic_moe.optimizer.study.graded import graded
from elastic_moe.optimizer.study.scenario import make_workers

CHECKED = tuple(number / 9 for number in range(10))
"""How uneven the placements are on which the prediction is checked, from best to worst."""

FITTED = (0.1, 0.1, 0.3, 0.3, 0.5, 0.5, 0.7, 0.7, 0.9, 0.9)
"""The same of the other ones, to which the constants are fitted: each twice, with few and with many workers busy beside
the busiest one."""

LEAST_CORRELATION = 0.5
"""Of predicted and measured steps, below which constants are not kept."""

BUSY = 1.5
"""Processes per core from which on the machine counts as busy. The measured workers are one per core or less."""

PLAN_S = 2.0
"""Seconds for a placement with little traffic, which is fitted to as well."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Checked:
    """How well steps were predicted that the constants were not fitted to."""

    predicted_s: tuple[float, ...]
    measured_s: tuple[float, ...]

    @property
    def rank_correlation(self) -> float:
        return rank_correlation(self.predicted_s, self.measured_s)

    @property
    def median_error(self) -> float:
        """Median of the relative errors."""
        pairs = zip(self.predicted_s, self.measured_s, strict=True)
        return statistics.median(abs(said / seen - 1) for said, seen in pairs)


def run_calibrate(args: argparse.Namespace) -> int:
    """Measure, fit, check, and write the constants. Returns the exit code."""
    info = open_checkpoint(args.model).info
    dtype = info.dtype if args.dtype == "auto" else args.dtype
    form = info.form(args.expert_dtype, dtype, "cpu")
    served = info.served_in(dtype, form, info.trunk_form(args.trunk_dtype, dtype, "cpu"))
    out = args.out or calibration_file(served, dtype, "cpu")
    check_file(args.out)
    numbers = list(dict.fromkeys(args.workers))
    for number in numbers:
        if not 2 <= number <= info.num_logical_experts:
            raise ConfigError(f"--workers: expected 2 to {info.num_logical_experts} (the experts), got {number}")
        if args.step_tokens < number:
            raise ConfigError(f"--step-tokens: expected one for each of {number} workers, got {args.step_tokens}")
    measured = []
    with _nodes_of(args.address) as node_ids:
        nodes = max(1, len(node_ids))
        if min(numbers) < nodes:
            raise ConfigError(f"--workers: expected one for each of {counted(nodes, 'node')}, got {min(numbers)}")
        for number in numbers:
            constants, checked = calibrate(args, served, dtype, number, node_ids)
            measured.append(constants)
            print(_as_json(constants, checked) if args.json else _as_text(constants, checked), flush=True)
            if not checked.rank_correlation >= LEAST_CORRELATION:
                load = 0.0 if node_ids else os.getloadavg()[0] / (os.cpu_count() or 1)
                raise UserError(
                    f"--workers {number}: the constants do not predict which placement is faster (rank correlation"
                    f" {checked.rank_correlation:.2f}, expected at least {LEAST_CORRELATION}), so they are not kept:"
                    f" {advice(args.steps * args.turns, load)}"
                )
    # what was measured before with other numbers of workers or of nodes stays
    before = load_constants(out) if out.exists() and args.out is None else ()
    save_constants(
        out, [*(one for one in before if (one.workers, one.nodes) not in [(n, nodes) for n in numbers]), *measured]
    )
    print(f"the constants are in {out}", file=sys.stderr)
    return 0


def advice(steps: int, load: float) -> str:
    """What to do where the constants predict little. steps: that each placement was measured in. load: processes per
    core that have run or waited in the last minute."""
    found = []
    if steps < STEPS * TURNS:
        found.append(f"measure each placement in more steps than {steps} (--steps, --turns)")
    if load > BUSY:
        found.append(f"run it while nothing else runs, since the machine was busy: {load:.1f} processes per core")
    elif not found:
        found.append("run it again while nothing else runs")
    return ", and ".join([*found, "give a model whose experts take most of a step"])


def _nodes_of(address: str | None) -> contextlib.AbstractContextManager[tuple[str, ...]]:
    """While it is open, this process has joined the Ray at `address`. Ray's ids of its nodes; none of this machine."""
    if address is None:
        return contextlib.nullcontext(())
    # Ray reads these when it is imported, which takes seconds
    settings = cluster_settings(os.environ)
    os.environ.clear()
    os.environ.update(settings)
    from elastic_moe.deploy.calibrating.cluster_group import joined

    return joined(address)


def _group(job: Job, node_ids: tuple[str, ...]) -> MeasuredGroup:
    if not node_ids:
        return LocalGroup(job)
    from elastic_moe.deploy.calibrating.cluster_group import ClusterGroup

    return ClusterGroup(job, node_ids)


def _free_bytes(node_ids: tuple[str, ...]) -> int:
    """Memory that is free on all nodes together."""
    if not node_ids:
        return int(psutil.virtual_memory().available)
    from elastic_moe.deploy.calibrating.cluster_group import free_bytes

    return free_bytes(node_ids)


def calibrate(
    args: argparse.Namespace, info: ModelInfo, dtype: str, number: int, node_ids: tuple[str, ...] = ()
) -> tuple[Constants, Checked]:
    """Measure with `number` workers, on this machine or spread over the nodes `node_ids` of the Ray that was joined.

    Raises ConfigError where nothing can be fitted, WorkerError where a worker ends.
    """
    spare = _spare(info, number, _free_bytes(node_ids))
    workers = make_workers(number, nodes=max(1, len(node_ids)), num_experts=info.num_logical_experts, redundant=spare)
    first = contiguous(info.num_layers, info.num_logical_experts, workers)
    job = Job(
        path=os.path.abspath(args.model),
        dtype=dtype,
        expert_dtype=args.expert_dtype,
        trunk_dtype=args.trunk_dtype,
        first=first,
        group="emoe-calibrate",
        tokens=args.step_tokens,
    )
    with _group(job, node_ids) as group:
        problem = problem_of(info, workers, group.measure(first, args.steps), args.step_tokens, dtype)
        rng = np.random.default_rng(0)
        fitted = [*graded(problem, FITTED, rng), _quiet(problem)]
        placements = [*fitted, *graded(problem, CHECKED, rng)]
        seen = _measured_in_turns(group, placements, args, problem)
    constants = fit(seen[: len(fitted)], workers=number, step_tokens=args.step_tokens)
    rest = seen[len(fitted) :]
    checked = Checked(
        predicted_s=tuple(predicted_s(constants, one) for one in rest), measured_s=tuple(one.step_s for one in rest)
    )
    return constants, checked


def _spare(info: ModelInfo, number: int, free: int) -> int:
    """Slots of a layer beyond one for each expert: as many as let one worker hold all experts but one for each other
    worker, if half of the `free` bytes hold them."""
    layer_bytes = info.num_layers * info.expert_bytes
    most = free // 2 // layer_bytes - info.num_logical_experts
    return max(0, min((number - 1) * (info.num_logical_experts - number), most))


def _quiet(problem: PlacementProblem) -> Placement:
    """A placement with little traffic, and without replicas."""
    nodes = problem.membership.shape[1]
    tight = make_workers(len(problem.workers), nodes=nodes, num_experts=problem.num_experts)
    asked = dataclasses.replace(problem, workers=tight, token_expert_s=1e-15)
    found = plan(asked, planner="local_search", deadline_s=PLAN_S).placement
    rows = [
        row_of(problem, [[e for e in found.experts_of(worker.id, layer) if e != EMPTY] for worker in tight])
        for layer in range(problem.num_layers)
    ]
    return to_placement(problem, np.stack(rows))


def problem_of(
    info: ModelInfo, workers: tuple[Worker, ...], seen: Measured, step_tokens: int, dtype: str
) -> PlacementProblem:
    """The problem of the steps that were measured."""
    sample = RoutingSample(
        num_layers=info.num_layers,
        num_experts=info.num_logical_experts,
        parts=((as_choices(seen.samples, info.num_logical_experts), int(seen.load[0].sum()) // info.top_k),),
    )
    transitions = sample.transitions()
    return PlacementProblem(
        loads=np.maximum(seen.load, 1e-9).astype(np.float64),
        workers=workers,
        top_k=info.top_k,
        transitions=transitions if transitions.any() else None,
        tokens_per_step=step_tokens,
        token_bytes=info.hidden_size * (4 if dtype == "float32" else 2),
    )


def _measured_in_turns(
    group: MeasuredGroup, placements: list[Placement], args: argparse.Namespace, problem: PlacementProblem
) -> list[Observation]:
    """Measure each placement in every turn, in another order each time, since the machine's speed changes. The step of
    a placement is the median of all."""
    rng, times = np.random.default_rng(1), [list[float]() for _ in placements]
    for _ in range(args.turns):
        for number in rng.permutation(len(placements)):
            times[number] += group.measure(placements[number], args.steps).steps_s
    return [
        observation(problem, placement, statistics.median(seconds))
        for placement, seconds in zip(placements, times, strict=True)
    ]


def _as_json(constants: Constants, checked: Checked) -> str:
    figures = {"rank_correlation": checked.rank_correlation, "median_error": checked.median_error}
    return json.dumps(dataclasses.asdict(constants) | dataclasses.asdict(checked) | figures)


def _as_text(constants: Constants, checked: Checked) -> str:
    on = "" if constants.nodes == 1 else f" on {constants.nodes} nodes"
    gbps = constants.worker_gbps or constants.node_gbps
    between = "workers" if constants.nodes == 1 else "nodes"
    link = "no cost of traffic" if gbps is None else f"{gbps:.1f} Gb/s between {between}"
    rows = "\n".join(
        f"  {1e3 * said:9.2f} {1e3 * seen:9.2f}  {said / seen - 1:+6.1%}"
        for said, seen in zip(checked.predicted_s, checked.measured_s, strict=True)
    )
    shared = (
        ""
        if constants.node_cores == constants.node_workers
        else f"\nthe workers of a node share cores, as if {constants.node_cores:g} of them computed at once"
    )
    return (
        f"{constants.workers} workers{on}, steps of {counted(constants.step_tokens, 'token')}:"
        f" {1e6 * constants.token_expert_s:.3f} us for a token in an expert, {1e3 * constants.base_s:.2f} ms of a step"
        f" beside that, {link}{shared}\n"
        f"placements that were not fitted, from best to worst, in ms:\n"
        f"  predicted  measured\n{rows}\n"
        f"rank correlation {checked.rank_correlation:.3f}, median error {checked.median_error:.1%}"
    )
