"""Which worker serves which expert, and in which tier the expert lies there: the value, its checks and its JSON.

Legend: L MoE layers, E logical experts, W workers, S slots (physical experts) over all workers.
Every layer has the same slots.

A worker's slots are consecutive: worker 0 has slots 0..slots_0-1, worker 1 the next ones, and so on.
`physical_to_logical_map[l, s]` is the logical expert that slot s holds in layer l, or EMPTY. `tiers[l, s]` is the tier
of the worker in which that expert lies. A worker may have more slots than its device has room for.
"""

from __future__ import annotations

import json
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple, NewType

import numpy as np
import numpy.typing as npt

from elastic_moe.cluster.errors import PlacementError, why
from elastic_moe.cluster.lines import counted, in_json, json_fault

WorkerId = NewType("WorkerId", str)

EMPTY = -1
"""Marks a slot that holds no expert."""

IntArray = npt.NDArray[np.int32]
TierArray = npt.NDArray[np.int8]


class Tier(IntEnum):
    """Where an expert lies on the worker that serves it, the fastest first."""

    DEVICE = 0
    """The memory in which the worker computes: a GPU's, or a CPU worker's, in the layout of the kernels."""
    HOST = 1
    """Pinned memory of the node. Only GPU workers have this tier."""
    DISK = 2
    """A record in the expert cache directory, or the checkpoint itself. It takes no memory."""

    @property
    def word(self) -> str:
        """The tier's name in JSON and in labels of metrics."""
        return self.name.lower()


@dataclass(frozen=True, slots=True, kw_only=True)
class Worker:
    """A member of the group: its name, the node it runs on, and how many experts per layer it has room for."""

    id: WorkerId
    node: str
    slots: int


# a tuple: a change of large clusters makes and saves thousands at once
class Move(NamedTuple):
    """Copy logical `expert` of `layer` to `target`; `source` already holds it."""

    layer: int
    expert: int
    source: WorkerId
    target: WorkerId


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Placement:
    """What each slot of each worker holds, in every layer. It is checked when it is made, so it is always valid.

    Raises PlacementError, which names the rule, if the map does not fit the workers, an id is out of range, an expert
    has no slot, or a worker holds an expert of a layer twice.
    """

    num_logical_experts: int
    workers: tuple[Worker, ...]
    physical_to_logical_map: IntArray
    """[L, S] logical expert of each slot, or EMPTY."""
    tiers: TierArray = field(default_factory=lambda: np.zeros((0, 0), dtype=np.int8))
    """[L, S] tier of each slot's expert, a value of Tier. An EMPTY slot is DEVICE, and so are all if none is given."""
    first_slot: tuple[int, ...] = field(init=False)
    """[W] the number of each worker's first slot."""
    _ranks: dict[WorkerId, int] = field(init=False, repr=False)
    """Index into `workers`."""

    def __post_init__(self) -> None:
        table = np.array(self.physical_to_logical_map, dtype=np.int32)
        given = np.asarray(self.tiers)
        tiers = np.array(given if given.size else np.zeros_like(table), dtype=np.int8)
        if tiers.shape == table.shape:
            tiers[table == EMPTY] = Tier.DEVICE
        for name, array in (("physical_to_logical_map", table), ("tiers", tiers)):
            array.flags.writeable = False
            object.__setattr__(self, name, array)
        # decisions about large clusters ask for them for every worker
        firsts = accumulate((worker.slots for worker in self.workers), initial=0)
        object.__setattr__(self, "first_slot", tuple(firsts)[:-1])
        object.__setattr__(self, "_ranks", {worker.id: rank for rank, worker in enumerate(self.workers)})
        self._verify()

    @property
    def num_layers(self) -> int:
        return int(self.physical_to_logical_map.shape[0])

    @property
    def num_slots(self) -> int:
        return sum(worker.slots for worker in self.workers)

    @property
    def slot_to_worker(self) -> IntArray:
        """[S] index into `workers` of each slot's owner."""
        return np.repeat(np.arange(len(self.workers), dtype=np.int32), [worker.slots for worker in self.workers])

    def rank_of(self, worker: WorkerId) -> int:
        """Index of `worker` in `workers`. Raises PlacementError if it is not there."""
        rank = self._ranks.get(worker)
        if rank is None:
            raise PlacementError(f"worker {worker!r} is not a member of this placement")
        return rank

    def experts_of(self, worker: WorkerId, layer: int) -> tuple[int, ...]:
        """[slots] logical experts (or EMPTY) in the slots of `worker`, in slot order."""
        return tuple(self.physical_to_logical_map[layer, self._slots_of(worker)].tolist())

    def tiers_of(self, worker: WorkerId, layer: int) -> tuple[Tier, ...]:
        """[slots] tier of each slot of `worker`, in slot order."""
        return tuple(map(Tier, self.tiers[layer, self._slots_of(worker)].tolist()))

    def resident(self, worker: WorkerId, layer: int) -> tuple[int, ...]:
        """Logical experts that lie in the device of `worker`, in slot order."""
        slots = self._slots_of(worker)
        experts = self.physical_to_logical_map[layer, slots]
        # a flip asks this of every layer while no step runs
        here = (experts != EMPTY) & (self.tiers[layer, slots] == Tier.DEVICE)
        return tuple(experts[here].tolist())

    def _slots_of(self, worker: WorkerId) -> slice:
        rank = self.rank_of(worker)
        start = int(self.first_slot[rank])
        return slice(start, start + self.workers[rank].slots)

    @property
    def all_resident(self) -> bool:
        """Whether every expert lies in the device of each worker that serves it."""
        return not self.tiers.any()

    @property
    def resident_share(self) -> float:
        """Share of the served experts that lie in a device, 0..1. Replicas count as experts of their own."""
        served = int((self.physical_to_logical_map != EMPTY).sum())
        return 1.0 - int((self.tiers != Tier.DEVICE).sum()) / max(1, served)

    def holders(self, layer: int, expert: int) -> tuple[WorkerId, ...]:
        """Workers that hold `expert` in `layer`, in rank order."""
        owners = self.slot_to_worker[np.nonzero(self.physical_to_logical_map[layer] == expert)[0]]
        return tuple(self.workers[int(rank)].id for rank in owners)

    def to_dict(self) -> dict[str, Any]:
        """The JSON form of `GET /admin/placement` and of `emoe plan`, without the epoch.

        `tiers` is there only if some expert does not lie in a device.
        """
        words = [tier.word for tier in Tier]
        tiers = {} if self.all_resident else {"tiers": [[words[tier] for tier in row] for row in self.tiers.tolist()]}
        return {
            "num_layers": self.num_layers,
            "num_logical_experts": self.num_logical_experts,
            "workers": [{"id": w.id, "node": w.node, "slots": w.slots} for w in self.workers],
            "slot_to_worker": self.slot_to_worker.tolist(),
            "physical_to_logical_map": self.physical_to_logical_map.tolist(),
            **tiers,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Placement:
        """Inverse of `to_dict`. Raises PlacementError that names the key which is missing or wrong."""
        workers = tuple(
            Worker(
                id=WorkerId(_name(worker, "id", f"workers.{number}.")),
                node=_name(worker, "node", f"workers.{number}."),
                slots=_integer(worker, "slots", f"workers.{number}."),
            )
            for number, worker in enumerate(_list(data, "workers"))
        )
        experts = _integer(data, "num_logical_experts")
        try:
            table = np.asarray(_list(data, "physical_to_logical_map"))
        except (ValueError, TypeError, OverflowError):
            # rows of different lengths
            table = np.zeros(0)
        owners = None if data.get("slot_to_worker") is None else _list(data, "slot_to_worker")
        layers = data.get("num_layers")
        words = data.get("tiers")
        if table.dtype.kind != "i" or table.ndim != 2:
            raise PlacementError("placement: physical_to_logical_map: expected equally long lists of integers")
        if int(table.min(initial=0)) < -(2**31) or int(table.max(initial=0)) >= 2**31:
            raise PlacementError("placement: physical_to_logical_map: holds a number that is no expert id")
        placement = cls(
            num_logical_experts=experts,
            workers=workers,
            physical_to_logical_map=table.astype(np.int32),
            tiers=_tiers_of_words(words, table.shape),
        )
        if owners is not None and owners != placement.slot_to_worker.tolist():
            raise PlacementError("placement: slot_to_worker: expected each worker's slots one after another, in order")
        if layers is not None and layers != placement.num_layers:
            raise PlacementError(
                f"placement: num_layers: expected {placement.num_layers}, the map's rows, got {in_json(layers)}"
            )
        return placement

    @classmethod
    def load(cls, path: Path) -> Placement:
        """Read a placement file. Raises PlacementError that names the file."""
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise PlacementError(f"{path}: {why(error)}") from None
        except (ValueError, RecursionError) as error:
            raise PlacementError(f"{path}: not JSON: {json_fault(error)}") from None
        if not isinstance(data, dict):
            raise PlacementError(f"{path}: expected a JSON object, as `emoe plan --out` writes it")
        try:
            return cls.from_dict(data)
        except PlacementError as error:
            raise PlacementError(f"{path}: {error}") from None

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Placement):
            return NotImplemented
        return (
            self.num_logical_experts == other.num_logical_experts
            and self.workers == other.workers
            and np.array_equal(self.physical_to_logical_map, other.physical_to_logical_map)
            and np.array_equal(self.tiers, other.tiers)
        )

    def __hash__(self) -> int:
        tables = (self.physical_to_logical_map.tobytes(), self.tiers.tobytes())
        return hash((self.num_logical_experts, self.workers, *tables))

    def _verify(self) -> None:
        table, where = self.physical_to_logical_map, "placement: physical_to_logical_map"
        if not self.workers:
            raise PlacementError("placement: workers: none given")
        if len({worker.id for worker in self.workers}) != len(self.workers):
            raise PlacementError("placement: workers: one is listed twice")
        if any(worker.slots < 1 for worker in self.workers):
            raise PlacementError("placement: workers: every worker needs at least one slot")
        if table.ndim != 2 or table.shape[1] != self.num_slots:
            raise PlacementError(f"{where}: expected [layers, {self.num_slots}], got {list(table.shape)}")
        if self.tiers.shape != table.shape:
            raise PlacementError(f"placement: tiers: expected {list(table.shape)}, got {list(self.tiers.shape)}")
        if self.tiers.size and (self.tiers.min() < min(Tier) or self.tiers.max() > max(Tier)):
            raise PlacementError(f"placement: tiers: expected {min(Tier):d} to {max(Tier):d}")
        if not 1 <= self.num_logical_experts <= self.num_slots:
            raise PlacementError(
                f"placement: num_logical_experts: expected 1 to {self.num_slots}, one for each slot at most, "
                f"got {self.num_logical_experts}"
            )
        if table.size and (table.min() < EMPTY or table.max() >= self.num_logical_experts):
            raise PlacementError(f"{where}: expected expert ids from -1 to {self.num_logical_experts - 1}")
        placed = np.zeros((self.num_layers, self.num_logical_experts + 1), dtype=np.bool_)
        # what is EMPTY counts in the last column, beside the experts
        placed[np.arange(self.num_layers)[:, None], table] = True
        for at in np.flatnonzero(~placed[:, : self.num_logical_experts])[:1].tolist():
            layer, expert = divmod(at, self.num_logical_experts)
            raise PlacementError(f"{where}: layer {layer} has no slot for expert {expert}")
        held = self.slot_to_worker.astype(np.int64) * self.num_logical_experts + table
        held[table == EMPTY] = EMPTY
        held.sort(axis=1)
        twice = (held[:, 1:] == held[:, :-1]) & (held[:, 1:] != EMPTY)
        for first in np.flatnonzero(twice)[:1].tolist():
            layer, at = divmod(first, twice.shape[1])
            worker = self.workers[int(held[layer, at]) // self.num_logical_experts]
            raise PlacementError(f"{where}: worker {worker.id} holds an expert of layer {layer} twice")


def _value(data: Any, key: str, where: str) -> Any:
    """`data[key]`. `where`: the path to `data` as messages have it, with a dot at its end, or empty."""
    if not isinstance(data, Mapping):
        raise PlacementError(f"placement: {where.removesuffix('.')}: expected an object, got {in_json(data)}")
    if key not in data:
        raise PlacementError(f"placement: {where}{key}: the key is missing")
    return data[key]


def _list(data: Any, key: str, where: str = "") -> list[Any]:
    value = _value(data, key, where)
    if not isinstance(value, list | tuple):
        raise PlacementError(f"placement: {where}{key}: expected a list, got {in_json(value)}")
    return list(value)


def _name(data: Any, key: str, where: str) -> str:
    value = _value(data, key, where)
    if not isinstance(value, str | int) or isinstance(value, bool):
        raise PlacementError(f"placement: {where}{key}: expected a text, got {in_json(value)}")
    return str(value)


def _integer(data: Any, key: str, where: str = "") -> int:
    value = _value(data, key, where)
    whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
    if not whole or isinstance(value, bool):
        raise PlacementError(f"placement: {where}{key}: expected a whole number, got {in_json(value)}")
    return int(value)


def _tiers_of_words(words: Any, shape: tuple[int, ...]) -> TierArray:
    """[L, S] of the JSON form. Raises PlacementError for other words or another shape."""
    if words is None:
        return np.zeros((0, 0), dtype=np.int8)
    known = {tier.word: tier.value for tier in Tier}
    if not isinstance(words, list) or any(not isinstance(row, list) for row in words):
        raise PlacementError("placement: tiers: expected a list of lists")
    for word in (word for row in words for word in row):
        if not isinstance(word, str) or word not in known:
            raise PlacementError(f"placement: tiers: expected one of {', '.join(known)}, got {reprlib.repr(word)}")
    lengths = {len(row) for row in words}
    if len(words) != shape[0] or lengths - {shape[1]}:
        raise PlacementError("placement: tiers: expected a word for each slot of physical_to_logical_map")
    return np.array([[known[word] for word in row] for row in words], dtype=np.int8).reshape(shape)


def contiguous(num_layers: int, num_logical_experts: int, workers: Sequence[Worker]) -> Placement:
    """The experts in order, spread over the workers as evenly as their slots allow. It needs no loads.

    Raises PlacementError if the workers have fewer slots than there are experts.
    """
    room = sum(worker.slots for worker in workers)
    if room < num_logical_experts:
        raise PlacementError(
            f"{num_logical_experts} experts do not fit the {counted(room, 'slot')} of {counted(len(workers), 'worker')}"
        )
    row: list[int] = []
    given = 0
    for rank, worker in enumerate(workers):
        later_room = sum(w.slots for w in workers[rank + 1 :])
        fair = -(-(num_logical_experts - given) // (len(workers) - rank))
        take = min(worker.slots, max(fair, num_logical_experts - given - later_room))
        row += [*range(given, given + take), *[EMPTY] * (worker.slots - take)]
        given += take
    return Placement(
        num_logical_experts=num_logical_experts,
        workers=tuple(workers),
        physical_to_logical_map=np.tile(np.array(row, dtype=np.int32), (num_layers, 1)),
    )
