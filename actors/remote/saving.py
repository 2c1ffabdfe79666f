"""Saves a value, of which most stays the same from one save to the next, where it outlives this process.

Objects of some frozen classes make up most of the bytes, and a change makes few new ones. Those that no earlier save
had are written once, as one part, and the value refers to them. A part is deleted once nothing refers to it. The value
is written after its parts and before any is deleted, so what can be read is whole at any time.
"""

from __future__ import annotations

import io
import pickle
import time
import zlib
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

MOST_PARTS = 16
"""With more parts, everything is written again as one."""

Reference = tuple[str, int]
"""The part that an object is in, and its number there."""


class Store(Protocol):
    """Keeps bytes by name. What it keeps outlives the process."""

    def save(self, state: bytes) -> None: ...

    def saved(self) -> bytes | None: ...

    def save_part(self, name: str, part: bytes) -> None: ...

    def saved_part(self, name: str) -> bytes | None: ...

    def drop_part(self, name: str) -> None: ...


class Saver:
    """The saved value of one process. frozen: the classes whose objects never change and are written once."""

    def __init__(self, store: Store, frozen: tuple[type, ...]) -> None:
        self._store = store
        self._frozen = frozen
        self._written: dict[int, tuple[Any, Reference]] = {}
        """By id, the objects that are written. They are kept here so that no other object gets their id."""
        self._begun = time.time_ns()
        self._count = 0

    def save(self, value: Any) -> None:
        self._write(value)
        if len(self._parts()) > MOST_PARTS:
            old = self._parts()
            self._written = {}
            self._write(value)
            for name in old:
                self._store.drop_part(name)

    def load(self) -> Any | None:
        """The saved value; None if there is none."""
        state = self._store.saved()
        if state is None:
            return None
        parts: dict[str, list[Any]] = {}

        def find(reference: Reference) -> Any:
            name, number = reference
            if name not in parts:
                data = self._store.saved_part(name)
                assert data is not None, f"part {name} of the saved state is missing"
                parts[name] = pickle.loads(zlib.decompress(data))
            value = parts[name][number]
            self._written[id(value)] = (value, reference)
            return value

        return _load(state, find)

    def _parts(self) -> set[str]:
        return {name for _, (name, _) in self._written.values()}

    def _write(self, value: Any) -> None:
        self._count += 1
        name = f"{self._begun}-{self._count}"
        new: list[Any] = []
        used: dict[int, tuple[Any, Reference]] = {}

        def refer(found: Any) -> Reference | None:
            if not isinstance(found, self._frozen):
                return None
            known = used.get(id(found)) or self._written.get(id(found))
            if known is None:
                known = (found, (name, len(new)))
                new.append(found)
            used[id(found)] = known
            return known[1]

        state = _dump(value, refer)
        if new:
            self._store.save_part(name, zlib.compress(_dump(new), 1))
        self._store.save(state)
        before = self._parts()
        self._written = used
        for old in before - self._parts():
            self._store.drop_part(old)


def _referred(name: str, number: int) -> Any:
    """Stands in the written value for an object of a part. `_Unpickler` has its own in its place."""
    raise AssertionError(f"object {number} of part {name} was not looked up")


class _Pickler(pickle.Pickler):
    """Writes references to objects of parts, and arrays of bools as bits.

    Both by `reducer_override`: a `persistent_id` would be asked for every number and string, too.
    """

    def __init__(self, file: io.BytesIO, refer: Callable[[Any], Reference | None]) -> None:
        super().__init__(file, pickle.HIGHEST_PROTOCOL)
        self._refer = refer

    def reducer_override(self, value: Any) -> Any:
        if type(value) is np.ndarray and value.dtype == np.bool_:
            return _from_bits, (np.packbits(value).tobytes(), value.shape)
        reference = self._refer(value)
        return NotImplemented if reference is None else (_referred, reference)


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, find: Callable[[Reference], Any]) -> None:
        super().__init__(file)
        self._find = find

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == (_referred.__module__, _referred.__name__):
            return lambda part, number: self._find((part, number))
        return super().find_class(module, name)


def _from_bits(bits: bytes, shape: tuple[int, ...]) -> np.ndarray:
    count = int(np.prod(shape))
    return np.unpackbits(np.frombuffer(bits, np.uint8), count=count).astype(np.bool_).reshape(shape)


def _dump(value: Any, refer: Callable[[Any], Reference | None] = lambda value: None) -> bytes:
    file = io.BytesIO()
    _Pickler(file, refer).dump(value)
    return file.getvalue()


def _load(data: bytes, find: Callable[[Reference], Any]) -> Any:
    return _Unpickler(io.BytesIO(data), find).load()
