"""Checks a PlacementProblem. Each error is one line that names the field and what was expected."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from elastic_moe.cluster.errors import PlacementError
from elastic_moe.cluster.lines import counted
from elastic_moe.cluster.placement import Worker
from elastic_moe.optimizer.residency.memory import WorkerMemory
from elastic_moe.optimizer.subjects.scenarios import mean_of_scenarios

if TYPE_CHECKING:
    from elastic_moe.optimizer.core.problem import FloatArray, PlacementProblem


def validated_fields(problem: PlacementProblem) -> dict[str, Any]:
    """The fields that are stored in another form than they were given (arrays of float64). Raises PlacementError."""
    from elastic_moe.optimizer.core.problem import Semantics

    loads = counts("loads", problem.loads, None)
    layers, experts = loads.shape
    fields: dict[str, Any] = {"loads": loads, "workers": tuple(problem.workers), "speeds": tuple(problem.speeds)}
    fields["memory"] = tuple(problem.memory)
    if problem.transitions is not None:
        fields["transitions"] = counts("transitions", problem.transitions, (layers - 1, experts, experts))
    if problem.coactivation is not None:
        fields["coactivation"] = _coactivation(problem.coactivation, layers, experts)
    if problem.load_covariance is not None:
        fields["load_covariance"] = _covariance(problem.load_covariance, layers, experts)
    if problem.scenario_loads is not None:
        fields["scenario_loads"] = _scenarios(problem, loads)
    elif problem.scenario_weights:
        raise PlacementError("scenario_weights: there are no scenario_loads")
    try:
        fields["semantics"] = Semantics(problem.semantics)
    except ValueError:
        raise PlacementError(f"semantics: expected home or follow, got {problem.semantics!r}") from None
    _check_numbers(problem, experts)
    _check_workers(fields["workers"], fields["speeds"], experts)
    _check_memory(fields["memory"], len(fields["workers"]), layers)
    current = problem.current
    if current is not None and (current.num_layers, current.num_logical_experts) != (layers, experts):
        raise PlacementError(
            f"current: a placement of {current.num_layers} layers x {current.num_logical_experts} experts, "
            f"the loads have {layers} x {experts}"
        )
    return fields


def counts(name: str, array: object, shape: tuple[int, ...] | None) -> FloatArray:
    """A read-only float64 copy of an array of counts. Raises PlacementError, which names the field."""
    try:
        values = np.array(array, dtype=np.float64)
    except (TypeError, ValueError):
        raise PlacementError(f"{name}: expected an array of numbers") from None
    if shape is None and (values.ndim != 2 or 0 in values.shape):
        raise PlacementError(f"{name}: expected [layers, experts], got shape {list(values.shape)}")
    if shape is not None and values.shape != shape:
        raise PlacementError(f"{name}: expected shape {list(shape)}, got {list(values.shape)}")
    if not np.isfinite(values).all():
        raise PlacementError(f"{name}: holds a value that is not finite")
    if (values < 0).any():
        raise PlacementError(f"{name}: holds a negative count")
    if shape is None and not values.sum(axis=1).all():
        empty = int(np.flatnonzero(values.sum(axis=1) == 0)[0])
        raise PlacementError(f"{name}: layer {empty} counted no token; a longer window is needed")
    values.flags.writeable = False
    return values


def _coactivation(array: object, layers: int, experts: int) -> FloatArray:
    values = counts("coactivation", array, (layers, experts, experts))
    if not np.allclose(values, values.transpose(0, 2, 1)):
        raise PlacementError("coactivation: must be symmetric in its two experts")
    values.flags.writeable = True
    values[:, np.arange(experts), np.arange(experts)] = 0.0
    values.flags.writeable = False
    return values


def _covariance(array: object, layers: int, experts: int) -> FloatArray:
    values = np.array(array, dtype=np.float64)
    if values.shape != (layers, experts, experts):
        raise PlacementError(f"load_covariance: expected {[layers, experts, experts]}, got {list(values.shape)}")
    if not np.isfinite(values).all() or (values[:, np.arange(experts), np.arange(experts)] < 0).any():
        raise PlacementError("load_covariance: holds a value that is not finite, or a negative variance")
    values.flags.writeable = False
    return values


def _scenarios(problem: PlacementProblem, loads: FloatArray) -> FloatArray:
    values = np.array(problem.scenario_loads, dtype=np.float64)
    if values.ndim != 3 or values.shape[1:] != loads.shape or not len(values):
        raise PlacementError(f"scenario_loads: expected [scenarios, {loads.shape[0]}, {loads.shape[1]}]")
    for each in values:
        counts("scenario_loads", each, None)
    mean = mean_of_scenarios(values, problem.scenario_weights, loads.sum(axis=1))
    if not np.allclose(mean, loads, rtol=1e-6, atol=1e-9 * loads.max()):
        raise PlacementError("scenario_loads: loads must be their mean by scenario_weights; see mean_of_scenarios")
    values.flags.writeable = False
    return values


def _check_numbers(problem: PlacementProblem, experts: int) -> None:
    if not 1 <= problem.top_k <= experts:
        raise PlacementError(f"top_k: expected 1 to {experts}, got {problem.top_k}")
    for name in ("horizon_steps", "tokens_per_step", "token_bytes", "token_expert_s"):
        value = getattr(problem, name)
        # written so that a NaN fails too
        if not 0 < value < np.inf:
            raise PlacementError(f"{name}: expected a positive number, got {value!r}")
    for name in ("expert_bytes", "affinity", "caution"):
        value = getattr(problem, name)
        if not 0 <= value < np.inf:
            raise PlacementError(f"{name}: expected at least 0, got {value!r}")
    if not problem.node_cores >= 1:
        raise PlacementError(f"node_cores: expected at least 1, got {problem.node_cores!r}")
    if not 0 <= problem.tail <= 1:
        raise PlacementError(f"tail: expected 0 to 1, got {problem.tail!r}")
    if problem.move_budget is not None and problem.move_budget < 0:
        raise PlacementError(f"move_budget: expected at least 0, got {problem.move_budget}")
    for name in ("worker_gbps", "node_gbps"):
        value = getattr(problem.links, name)
        if not 0 < value < np.inf:
            raise PlacementError(f"links.{name}: expected a positive number, got {value!r}")
    wanted = {"ports_gbps": len(problem.workers), "uplinks_gbps": len({worker.node for worker in problem.workers})}
    for name, count in wanted.items():
        values = getattr(problem.links, name)
        if values and len(values) != count:
            raise PlacementError(f"links.{name}: expected {counted(count, 'number')}, got {len(values)}")
        if not all(0 < value < np.inf for value in values):
            raise PlacementError(f"links.{name}: expected positive numbers, got {values!r}")


def _check_workers(workers: tuple[Worker, ...], speeds: tuple[float, ...], experts: int) -> None:
    if not workers:
        raise PlacementError("workers: none given")
    if len({worker.id for worker in workers}) != len(workers):
        raise PlacementError("workers: one is listed twice")
    if any(worker.slots < 1 for worker in workers):
        raise PlacementError("workers: every worker needs at least one slot")
    room = sum(min(worker.slots, experts) for worker in workers)
    if room < experts:
        raise PlacementError(
            f"workers: {experts} experts do not fit the {counted(room, 'slot')} of {counted(len(workers), 'worker')}; "
            f"every layer needs at least {counted(experts - room, 'more slot')}"
        )
    if speeds and len(speeds) != len(workers):
        raise PlacementError(f"speeds: expected {counted(len(workers), 'number')}, one per worker, got {len(speeds)}")
    if not all(0 < speed < np.inf for speed in speeds):
        raise PlacementError("speeds: every worker's speed must be a positive number")


def _check_memory(memory: tuple[WorkerMemory, ...], workers: int, layers: int) -> None:
    if memory and len(memory) != workers:
        raise PlacementError(f"memory: expected {counted(workers, 'number')}, one per worker, got {len(memory)}")
    for each in memory:
        if each.device_experts < layers:
            raise PlacementError(
                f"memory.device_experts: expected at least {layers}, one for each layer, got {each.device_experts}"
            )
        for name, least in (("host_experts", 0), ("cache_slots", 1)):
            if getattr(each, name) < least:
                raise PlacementError(f"memory.{name}: expected at least {least}, got {getattr(each, name)}")
        for name in ("disk_fetch_s", "host_fetch_s", "host_token_s", "resident_s"):
            value = getattr(each, name)
            # written so that a NaN fails too
            if value is not None and not 0 <= value < np.inf:
                raise PlacementError(f"memory.{name}: expected at least 0 seconds, got {value!r}")
