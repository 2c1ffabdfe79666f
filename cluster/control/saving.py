"""Saves the control plane's state so that a coordinator which starts again continues from it.

Workers' records and placements are most of its bytes, and a change makes few new ones. They never change themselves. So
those that no earlier save had are written once, as one part, and the state refers to them. A part is deleted when
nothing refers to it. The state is written after its parts and before any is deleted, so what can be read is whole.
"""

from __future__ import annotations

import io
import pickle
import time
import zlib
from typing import Any, Protocol

from elastic_moe.cluster.control.state import ControlState
from elastic_moe.cluster.facts.membership import WorkerRecord
from elastic_moe.cluster.messages.epochs import ModelSpec
from elastic_moe.cluster.placement import Placement

MOST_PARTS = 16
"""With more parts, everything is written again as one."""

_LARGE = (WorkerRecord, Placement)

Reference = tuple[str, int]
"""The part of an object, and its number there."""


class Store(Protocol):
    """Keeps bytes by name where they outlive the coordinator."""

    def save(self, state: bytes) -> None: ...

    def saved(self) -> bytes | None: ...

    def save_part(self, name: str, part: bytes) -> None: ...

    def saved_part(self, name: str) -> bytes | None: ...

    def drop_part(self, name: str) -> None: ...


class Saver:
    """The saved state of one coordinator."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._known: dict[int, tuple[Any, Reference]] = {}
        """By id, the objects that are written, which are kept here so that no other gets their id."""
        self._begun = time.time_ns()
        self._count = 0

    def save(self, state: ControlState, spec: ModelSpec) -> int:
        """Returns the number of bytes that were written."""
        written = self._write(state, spec)
        if len({part for _, (part, _) in self._known.values()}) > MOST_PARTS:
            old = {part for _, (part, _) in self._known.values()}
            self._known = {}
            written += self._write(state, spec)
            for name in old:
                self._store.drop_part(name)
        return written

    def _write(self, state: ControlState, spec: ModelSpec) -> int:
        self._count += 1
        name = f"{self._begun}-{self._count}"
        new: list[Any] = []
        used: dict[int, tuple[Any, Reference]] = {}

        def refer(value: Any) -> Reference | None:
            if not isinstance(value, _LARGE):
                return None
            if id(value) not in used:
                used[id(value)] = self._known.get(id(value)) or (value, (name, len(new)))
                if used[id(value)][1][0] == name:
                    new.append(value)
            return used[id(value)][1]

        main = _dump((state, spec), refer)
        part = zlib.compress(pickle.dumps(new), 1) if new else b""
        if new:
            self._store.save_part(name, part)
        self._store.save(main)
        before = {reference[0] for _, reference in self._known.values()}
        for old in before - {reference[0] for _, reference in used.values()}:
            self._store.drop_part(old)
        self._known = used
        return len(main) + len(part)

    def load(self) -> tuple[ControlState, ModelSpec] | None:
        """The saved state; None if there is none."""
        main = self._store.saved()
        if main is None:
            return None
        parts: dict[str, list[Any]] = {}

        def find(reference: Reference) -> Any:
            name, number = reference
            if name not in parts:
                data = self._store.saved_part(name)
                assert data is not None, f"part {name} of the saved state is missing"
                parts[name] = pickle.loads(zlib.decompress(data))
            value = parts[name][number]
            self._known[id(value)] = (value, reference)
            return value

        state, spec = _load(main, find)
        return state, spec


def _dump(value: Any, refer: Any) -> bytes:
    class Pickler(pickle.Pickler):
        def persistent_id(self, value: Any) -> Any:
            return refer(value)

    out = io.BytesIO()
    Pickler(out).dump(value)
    return out.getvalue()


def _load(data: bytes, find: Any) -> Any:
    class Unpickler(pickle.Unpickler):
        def persistent_load(self, reference: Any) -> Any:
            return find(reference)

    return Unpickler(io.BytesIO(data)).load()
