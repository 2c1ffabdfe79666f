"""The min-max load ILP of one layer as a Pyomo model. The planner `load_ilp` and MoETuner's first step use it.

Sets        items i (an expert, or one replica of it), workers w
Parameters  weight_i tokens, speed_w, room_w slots
Variables   x[i, w] in {0, 1}: item i sits on w; peak >= 0
Objective   min peak
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyomo.environ as pyo

from elastic_moe.optimizer.core.problem import FloatArray, IntArray


def build_load_model(
    weights: FloatArray, speeds: FloatArray, room: Sequence[int], expert_of: IntArray
) -> pyo.ConcreteModel:
    """The model for items [I] of experts `expert_of` [I], on workers with `speeds` [W] and `room` [W]."""
    model = pyo.ConcreteModel()
    model.each = pyo.RangeSet(0, len(weights) - 1)
    model.workers = pyo.RangeSet(0, len(room) - 1)
    model.x = pyo.Var(model.each, model.workers, domain=pyo.Binary)
    model.peak = pyo.Var(bounds=(float(weights.sum() / speeds.sum()), None))
    _assign_once(model)
    _respect_room(model, room)
    _keep_replicas_apart(model, expert_of)
    _bound_by_peak(model, weights, speeds)
    model.objective = pyo.Objective(expr=model.peak)
    return model


def _assign_once(model: pyo.ConcreteModel) -> None:
    """sum_w x[i, w] = 1 for every item."""
    model.once = pyo.Constraint(model.each, rule=lambda m, i: sum(m.x[i, w] for w in m.workers) == 1)


def _respect_room(model: pyo.ConcreteModel, room: Sequence[int]) -> None:
    """sum_i x[i, w] <= room_w for every worker."""
    model.slots = pyo.Constraint(model.workers, rule=lambda m, w: sum(m.x[i, w] for i in m.each) <= room[w])


def _keep_replicas_apart(model: pyo.ConcreteModel, expert_of: IntArray) -> None:
    """sum over the replicas i of one expert of x[i, w] <= 1 for every worker."""
    groups = [np.flatnonzero(expert_of == e).tolist() for e in np.unique(expert_of)]
    replicated = [group for group in groups if len(group) > 1]
    model.apart = pyo.Constraint(
        range(len(replicated)), model.workers, rule=lambda m, g, w: sum(m.x[i, w] for i in replicated[g]) <= 1
    )


def _bound_by_peak(model: pyo.ConcreteModel, weights: FloatArray, speeds: FloatArray) -> None:
    """sum_i weight_i x[i, w] / speed_w <= peak for every worker."""
    model.ends = pyo.Constraint(
        model.workers,
        rule=lambda m, w: sum(float(weights[i] / speeds[w]) * m.x[i, w] for i in m.each) <= m.peak,
    )


def start_from(model: pyo.ConcreteModel, worker_of: IntArray, peak: float) -> None:
    """Offer an assignment [I] as the incumbent."""
    for i in model.each:
        for w in model.workers:
            model.x[i, w].value = float(worker_of[i] == w)
    model.peak.value = peak


def chosen_workers(model: pyo.ConcreteModel) -> IntArray:
    """[I] worker of each item in the incumbent."""
    table = np.array([[model.x[i, w].value for w in model.workers] for i in model.each])
    return np.asarray(table.argmax(axis=1), dtype=np.int32)
