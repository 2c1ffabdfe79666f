"""What the page shows: the state of the cluster as JSON of two levels, and the changes of it. Pure.

A state is {section: {key: value}}. A change is of the same form: it has the keys that are new or different, and null
for those that are gone (RFC 7396 for two levels). So a page keeps the state with four lines of code, and a change is
as small as what has happened. Legend: L MoE layers, E logical experts, S slots.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from elastic_moe.cluster.messages.views import ClusterView, EngineStatus, Operation, PlacementView, WorkerView
from elastic_moe.cluster.placement import Placement

Section = dict[str, Any]
State = dict[str, Section]

LOAD_STEPS = 16
"""The byte that stands for the mean load of a layer's experts. So a byte can express up to 16 times the mean."""
MAX_MOVES = 2000
"""Most copies under way that are listed one by one."""


def change(before: State, after: State) -> State:
    """The sections and keys of `after` that differ from `before`; None for a key that is gone."""
    changes: State = {}
    for name in before.keys() | after.keys():
        old, new = before.get(name, {}), after.get(name, {})
        if old is new:
            # sections that were not made anew; large ones would take long to compare
            continue
        keys: Section = {key: value for key, value in new.items() if key not in old or old[key] != value}
        keys |= dict.fromkeys(old.keys() - new.keys())
        if keys:
            changes[name] = keys
    return changes


def load_rows(load: npt.NDArray[np.number[Any]]) -> Section:
    """load: [L, E] tokens. One string for each layer: base64 of E bytes, LOAD_STEPS for the layer's mean."""
    mean = load.mean(axis=1, keepdims=True)
    ratio = np.divide(load, mean, out=np.zeros(load.shape), where=mean > 0)
    steps = np.minimum(np.rint(ratio * LOAD_STEPS), 255).astype(np.uint8)
    return {str(layer): base64.b64encode(row.tobytes()).decode("ascii") for layer, row in enumerate(steps)}


def placement_sections(view: PlacementView) -> State:
    moves = [[move.layer, move.expert, move.source, move.target] for move in view.moves[:MAX_MOVES]]
    return {
        "placement": {"epoch": view.epoch, "pinned": view.pinned, "pinned_by": view.pinned_by},
        "moves": {"list": moves, "count": len(view.moves)} if moves else {},
        **map_sections(view.placement),
    }


def map_sections(placement: Placement) -> State:
    """The members in rank order, and the expert (or -1) of every slot, layer by layer."""
    members = [{"id": worker.id, "node": worker.node, "slots": worker.slots} for worker in placement.workers]
    rows = {str(layer): row for layer, row in enumerate(placement.physical_to_logical_map.tolist())}
    return {"members": {"list": members, "experts": placement.num_logical_experts}, "map": rows}


def worker_rows(workers: Sequence[WorkerView]) -> Section:
    rows: Section = {}
    for worker in workers:
        # dataclasses.asdict() of 64 workers, called once a second, would take a percent of a core
        row = msgspec.to_builtins(worker)
        fit = None if worker.fit is None else row["fit"]["rows"]
        rows[worker.id] = row | {"fit": fit, "kv_usage": round(worker.kv_usage, 3)}
    return rows


def operation_rows(operations: Sequence[Operation]) -> Section:
    return {operation.operation_id: msgspec.to_builtins(operation) for operation in operations}


def marks(before: State, after: State) -> list[list[str]]:
    """[kind, reason] of every operation that has begun between two states, if the first one has operations at all."""
    if "operations" not in before:
        return []
    known = before["operations"]
    return [[row["kind"], row["reason"]] for name, row in after.get("operations", {}).items() if name not in known]


@dataclass(frozen=True, slots=True, kw_only=True)
class Totals:
    """Counters at one moment. Those of an engine begin at zero again with the next engine."""

    at_s: float
    """Seconds of a monotonic clock."""
    generation_tokens: int
    prompt_tokens: int
    steps: int
    first_tokens: int
    """First tokens of answers that this API sent. The next field is the sum of the waits for them, in seconds."""
    first_tokens_s: float
    next_tokens: int
    """Later tokens of answers. The next field is the sum of the waits for them, in seconds."""
    next_tokens_s: float


def sections(view: ClusterView) -> State:
    """The sections that an answer of the cluster makes new; the others stay as they are."""
    state: State = {
        "workers": worker_rows(view.workers),
        "operations": operation_rows(view.operations),
        "order": {"operations": [operation.operation_id for operation in view.operations]},
        "scale": {name: value for name, value in msgspec.to_builtins(view.scale).items() if value is not None},
        "counters": {
            "recoveries": view.recoveries,
            "experts_moved": view.experts_moved,
            "bytes_moved": view.bytes_moved,
            "requests_moved": view.requests_moved,
        },
    }
    if view.placement is not None:
        state |= placement_sections(view.placement)
    if view.load is not None:
        state["load"] = load_rows(view.load.load)
        state["window"] = {"tokens": view.load.tokens, "window_s": view.load.window_s}
    return state


def sample(before: Totals | None, after: Totals, status: EngineStatus, unix_s: float) -> Section:
    """One point of every curve: rates and mean waits between two moments. A key without a value is left out."""
    point: Section = {
        "time_s": round(unix_s, 1),
        "running": sum(status.running.values()),
        "waiting": status.waiting,
        "kv": round(max(status.kv_usage.values(), default=0.0), 4),
    }
    if before is None or after.at_s <= before.at_s:
        return point
    elapsed_s = after.at_s - before.at_s
    for name in ("generation_tokens", "prompt_tokens", "steps"):
        count = max(0, getattr(after, name) - getattr(before, name))
        point[f"{name}_per_s"] = round(count / elapsed_s, 1)
    for name, key in (("first_tokens", "ttft_s"), ("next_tokens", "itl_s")):
        count = getattr(after, name) - getattr(before, name)
        if count > 0:
            waited_s = getattr(after, f"{name}_s") - getattr(before, f"{name}_s")
            point[key] = round(max(0.0, waited_s) / count, 5)
    return point
