"""One look at a server for `emoe top`: the answers of its admin calls and of /metrics as values, and rates between two.

Legend: L MoE layers, E logical experts, S slots, W workers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import msgspec
import numpy as np
import numpy.typing as npt
from prometheus_client.parser import text_string_to_metric_families

from elastic_moe.cluster.errors import PlacementError, UserError
from elastic_moe.cluster.messages.views import Operation, Readiness, ScaleView, WorkerState
from elastic_moe.cluster.placement import EMPTY, Placement, WorkerId

T = TypeVar("T")
FloatArray = npt.NDArray[np.float64]

READY, WORKERS, PLACEMENT = "/ready", "/admin/workers", "/admin/placement"
ROUTING, OPERATIONS, SCALE, METRICS = "/admin/routing", "/admin/operations", "/admin/scale", "/metrics"
PATHS = (READY, WORKERS, PLACEMENT, ROUTING, OPERATIONS, SCALE, METRICS)
"""The paths that are asked at every look."""


_SHARES = ("vllm:kv_cache_usage_perc", "emoe:balancedness", "emoe:ready")
"""Metrics that are averaged over groups, since their sum means nothing."""


class NotAServer(UserError):
    """The answer is not one of a server that this version of the command knows. The message names the path."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SeenPath:
    """A row of a worker's report on which code serves the model."""

    part: str
    path: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SeenWorker:
    id: WorkerId
    state: WorkerState
    node: str
    device: str
    running_requests: int
    kv_usage: float
    fit: tuple[SeenPath, ...] | None = None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Look:
    """The answers of one moment. A field is None or empty if the server did not know it."""

    at_s: float
    ready: Readiness
    workers: tuple[SeenWorker, ...] = ()
    operations: tuple[Operation, ...] = ()
    """Operations, the newest first."""
    scale: ScaleView | None = None
    placement: Placement | None = None
    epoch: int | None = None
    pinned: bool = False
    load: FloatArray | None = None
    """[L, E] tokens of the routing window."""
    model_name: str = ""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Name of a sample -> its value. Samples that differ only in their labels are added up; shares are averaged."""
    groups: int = 1
    """Number of groups of workers."""
    engine: int | None = None
    """The group that is shown. None: figures are of all groups, and workers, placement and operations of the first."""


def asked_path(path: str, engine: int | None) -> str:
    """One of PATHS as it is asked for a group."""
    return f"{path}?engine={engine}" if engine is not None and path.startswith("/admin/") else path


def read_look(answers: Mapping[str, bytes | None], at_s: float, engine: int | None = None) -> Look:
    """Read the bodies of all PATHS; None is a body that the server cannot make yet. Raises NotAServer.

    engine: number of the group that was asked, if one was.
    """
    placement, load = _placement(answers[PLACEMENT]), _load(answers[ROUTING])
    if placement is None or load is None or load.shape != (placement.num_layers, placement.num_logical_experts):
        load = None
    where = _json(PLACEMENT, answers[PLACEMENT]) or {}
    model_name, metrics, groups = _metrics(answers[METRICS], engine)
    return Look(
        at_s=at_s,
        ready=_as(Readiness, READY, answers[READY]) or Readiness(ready=False, reason="the server does not say"),
        workers=_as(tuple[SeenWorker, ...], WORKERS, answers[WORKERS]) or (),
        operations=_as(tuple[Operation, ...], OPERATIONS, answers[OPERATIONS]) or (),
        scale=_as(ScaleView, SCALE, answers[SCALE]),
        placement=placement,
        epoch=where.get("epoch"),
        pinned=bool(where.get("pinned")),
        load=load,
        model_name=model_name,
        metrics=metrics,
        groups=groups,
        engine=engine,
    )


def _json(path: str, body: bytes | None) -> Any:
    if body is None:
        return None
    try:
        return json.loads(body)
    except ValueError:
        raise NotAServer(f"{path}: expected JSON; is it a server of this project?") from None


def _as(kind: type[T], path: str, body: bytes | None) -> T | None:
    if body is None:
        return None
    try:
        return msgspec.convert(_json(path, body), kind)
    except msgspec.ValidationError as error:
        raise NotAServer(f"{path}: not the answer of a server of this version ({error})") from None


def _placement(body: bytes | None) -> Placement | None:
    if body is None:
        return None
    try:
        return Placement.from_dict(_json(PLACEMENT, body))
    except (PlacementError, TypeError) as error:
        raise NotAServer(f"{PLACEMENT}: {error}") from None


def _load(body: bytes | None) -> FloatArray | None:
    if body is None:
        return None
    try:
        load: FloatArray = np.array(_json(ROUTING, body)["load"], dtype=np.float64)
    except (KeyError, TypeError, ValueError):
        load = np.zeros(0)
    if load.ndim != 2:
        raise NotAServer(f"{ROUTING}: expected a number for every layer and expert at 'load'")
    return load


def _metrics(body: bytes | None, engine: int | None) -> tuple[str, dict[str, float], int]:
    """The name of the model, the samples of one group or of all, and the number of groups."""
    values: dict[str, list[float]] = {}
    name, engines = "", set[str]()
    try:
        for family in text_string_to_metric_families((body or b"").decode()):
            for sample in family.samples:
                name = sample.labels.get("model_name", name)
                engines.add(sample.labels.get("engine", "0"))
                if engine is None or sample.labels.get("engine", str(engine)) == str(engine):
                    values.setdefault(sample.name, []).append(sample.value)
    except ValueError:
        raise NotAServer(f"{METRICS}: expected the text form of Prometheus") from None
    merged = {key: sum(found) / (len(found) if key in _SHARES else 1) for key, found in values.items()}
    return name, merged, max(1, len(engines))


def relative_load(look: Look) -> FloatArray | None:
    """[W, L] load of each worker over the mean of its layer, in the order of the placement's workers. An expert's load
    is split evenly between its replicas. 0 where a layer has no load."""
    if look.placement is None or look.load is None:
        return None
    table, owners = look.placement.physical_to_logical_map, look.placement.slot_to_worker
    loads: FloatArray = np.zeros((len(look.placement.workers), len(table)))
    for layer, experts in enumerate(table):
        held = experts != EMPTY
        replicas = np.bincount(experts[held], minlength=look.placement.num_logical_experts)
        np.add.at(loads[:, layer], owners[held], (look.load[layer] / np.maximum(replicas, 1))[experts[held]])
    mean = loads.mean(axis=0)
    relative: FloatArray = np.divide(loads, mean, out=np.zeros_like(loads), where=mean > 0)
    return relative


def rate(before: Look | None, now: Look, name: str) -> float | None:
    """Growth of a counter per second; None if it is unknown, or if the server was restarted between the looks."""
    grown = growth(before, now, name)
    if before is None or grown is None or now.at_s <= before.at_s:
        return None
    return grown / (now.at_s - before.at_s)


def mean_s(before: Look | None, now: Look, name: str) -> float | None:
    """Mean in seconds of a histogram's values between two looks; None if there were none."""
    total, count = growth(before, now, f"{name}_sum"), growth(before, now, f"{name}_count")
    return total / count if total is not None and count else None


def growth(before: Look | None, now: Look, name: str) -> float | None:
    if before is None or name not in before.metrics or name not in now.metrics:
        return None
    grown = now.metrics[name] - before.metrics[name]
    return grown if grown >= 0 else None
