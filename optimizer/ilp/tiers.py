"""The tiers in the integer programs: which experts lie in fast memory, and what fetching the others takes.

Variables   inside[i] in {0, 1}: an expert lies in the device of the worker that serves it; hosted[i] alike, in the
            host's memory; passing[j] in {0, 1}: one slot of a layer of a worker is for experts that pass through
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyomo.environ as pyo

from elastic_moe.cluster.placement import Tier


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """One expert that a worker may serve in one layer."""

    key: tuple[int, ...]
    """The index of its variables."""
    served: Any
    """The variable that is 1 where the worker serves it."""
    passing: tuple[int, ...]
    """The index of its layer's passing slot."""
    disk: float
    """Price of a step in which the expert is on disk."""
    host: float
    """Price of a step in which it is in the host's memory."""


def add_tiers(model: pyo.ConcreteModel, items: Sequence[Served], passing: Sequence[tuple[int, ...]]) -> None:
    """Add the variables, and inside + hosted <= served, and served - inside <= passing."""
    keys = [item.key for item in items]
    model.inside = pyo.Var(keys, domain=pyo.Binary)
    model.hosted = pyo.Var(keys, domain=pyo.Binary)
    model.passing = pyo.Var(passing, domain=pyo.Binary)
    model.tiers = pyo.ConstraintList()
    model.both = pyo.VarList(bounds=(0, 1))
    for item in items:
        model.tiers.add(model.inside[item.key] + model.hosted[item.key] <= item.served)
        model.tiers.add(item.served - model.inside[item.key] <= model.passing[item.passing])


def fetched(model: pyo.ConcreteModel, items: Sequence[Served]) -> Any:
    """The seconds of fetching: disk (served - inside - hosted) + host hosted."""
    return sum(
        item.disk * (item.served - model.inside[item.key]) - (item.disk - item.host) * model.hosted[item.key]
        for item in items
    )


def on_disk(model: pyo.ConcreteModel, item: Served) -> Any:
    """1 where the worker serves the expert and has it in no memory."""
    return item.served - model.inside[item.key] - model.hosted[item.key]


def both(model: pyo.ConcreteModel, one: Any, two: Any) -> Any:
    """A new variable that is the product of two expressions of 0 or 1."""
    product = model.both.add()
    model.tiers.add(product <= one)
    model.tiers.add(product <= two)
    model.tiers.add(product >= one + two - 1)
    return product


def fit(
    model: pyo.ConcreteModel, items: Sequence[Served], passing: Sequence[tuple[int, ...]], device: int, host: int
) -> None:
    """sum inside + sum passing <= device and sum hosted <= host, for one worker."""
    inside = sum(model.inside[item.key] for item in items) + sum(model.passing[each] for each in passing)
    model.tiers.add(inside <= device)
    model.tiers.add(sum(model.hosted[item.key] for item in items) <= host)


def start_tiers(model: pyo.ConcreteModel, items: Sequence[Served], levels: Sequence[int]) -> None:
    """Offer tiers of one layer of one worker as the incumbent: a Tier for each expert, or NOT_HELD."""
    for item in items:
        model.passing[item.passing].value = 0.0
    for item, level in zip(items, levels, strict=True):
        model.inside[item.key].value = float(level == Tier.DEVICE)
        model.hosted[item.key].value = float(level == Tier.HOST)
        if level > Tier.DEVICE:
            model.passing[item.passing].value = 1.0
