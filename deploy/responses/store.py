"""Where responses are kept: in a store that all API replicas share and that outlives each of them.

    open/ID              a response in progress: its record without an outcome
    done/ID              a response that has ended
    index/TIME/ID/SIZE   one for each of those, with the time of its end in ms (16 hex digits) and its size in bytes
    gone/ID              one that was deleted: whoever still follows it must not put it back

What has ended is bounded in number, bytes and age; what is in progress by the requests that the engine takes.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from elastic_moe.actors.remote.key_value import KeyValue
from elastic_moe.deploy.responses.record import Record, decode, encode

logger = logging.getLogger(__name__)

TRIM_S = 1.0
"""Least seconds between two looks at what is too much or too old."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    most: int
    """Number of responses; 0 keeps none."""
    most_bytes: int
    oldest_s: float


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class Entry:
    """An entry of the index."""

    ended_ms: int
    id: str
    size_bytes: int

    @property
    def key(self) -> str:
        return f"index/{self.ended_ms:016x}/{self.id}/{self.size_bytes}"

    @classmethod
    def parse(cls, key: str) -> Entry:
        _, ended, name, size = key.split("/")
        return cls(ended_ms=int(ended, 16), id=name, size_bytes=int(size))


def superfluous(entries: Sequence[Entry], bounds: Bounds, now_s: float) -> list[Entry]:
    """The entries to drop, the oldest ones first, so that the rest is within the bounds."""
    kept = sorted(entries)
    total_bytes = sum(entry.size_bytes for entry in kept)
    dropped: list[Entry] = []
    for number, entry in enumerate(kept):
        too_old = now_s - entry.ended_ms / 1000 > bounds.oldest_s
        if not too_old and len(kept) - number <= bounds.most and total_bytes <= bounds.most_bytes:
            break
        dropped.append(entry)
        total_bytes -= entry.size_bytes
    return dropped


class Store:
    """The store as one replica uses it. Calls run in threads, since each waits for another process."""

    def __init__(self, values: KeyValue, bounds: Bounds, clock: Callable[[], float] = time.time) -> None:
        self.bounds = bounds
        self._values = values
        self._clock = clock
        self._trimmed_at = -TRIM_S

    async def begin(self, record: Record) -> None:
        """Keep a response that is about to run."""
        await asyncio.to_thread(self._values.put, f"open/{record.id}", encode(record))

    async def finish(self, record: Record) -> None:
        """Keep a response that has ended, unless it was deleted. Several replicas may do so for the same one."""
        await asyncio.to_thread(self._finish, record)

    async def find(self, response_id: str) -> Record | None:
        return await asyncio.to_thread(self._find, response_id)

    async def delete(self, response_id: str) -> None:
        await asyncio.to_thread(self._delete, response_id)

    async def unfinished(self) -> list[str]:
        """The ids of all responses in progress."""
        keys = await asyncio.to_thread(self._values.keys, "open/")
        return [key.removeprefix("open/") for key in keys]

    # --- In a thread --------------------------------------------------------------------------------------------

    def _finish(self, record: Record) -> None:
        assert record.outcome is not None
        if self._values.get(f"done/{record.id}") is not None:
            self._values.delete(f"open/{record.id}")
            return
        data = encode(record)
        entry = Entry(ended_ms=int(record.outcome.ended_at_s * 1000), id=record.id, size_bytes=len(data))
        self._values.put(f"done/{record.id}", data)
        self._values.put(entry.key, b"")
        self._values.delete(f"open/{record.id}")
        # whoever deletes writes gone/ first and deletes done/ afterwards: one of the two sees the other
        if self._values.get(f"gone/{record.id}") is not None:
            self._drop(entry)
        self._trim()

    def _find(self, response_id: str) -> Record | None:
        data = self._values.get(f"done/{response_id}") or self._values.get(f"open/{response_id}")
        # it may have ended between the two looks
        data = data or self._values.get(f"done/{response_id}")
        record = None if data is None else decode(data)
        if record is None or record.outcome is None:
            return record
        return record if self._clock() - record.outcome.ended_at_s <= self.bounds.oldest_s else None

    def _delete(self, response_id: str) -> None:
        if self._values.get(f"open/{response_id}") is not None:
            # its content stands for the time, so that the mark does not stay for ever
            self._values.put(f"gone/{response_id}", str(self._clock()).encode())
        self._values.delete(f"done/{response_id}")
        self._values.delete(f"open/{response_id}")
        for entry in self._index():
            if entry.id == response_id:
                self._values.delete(entry.key)

    def _trim(self) -> None:
        now_s = self._clock()
        if now_s - self._trimmed_at < TRIM_S:
            return
        self._trimmed_at = now_s
        for entry in superfluous(self._index(), self.bounds, now_s):
            self._drop(entry)
        for key in self._values.keys("gone/"):
            if now_s - float(self._values.get(key) or b"0") > self.bounds.oldest_s:
                self._values.delete(key)

    def _index(self) -> list[Entry]:
        return [Entry.parse(key) for key in self._values.keys("index/")]

    def _drop(self, entry: Entry) -> None:
        self._values.delete(f"done/{entry.id}")
        self._values.delete(entry.key)
