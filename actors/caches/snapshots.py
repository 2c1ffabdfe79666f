"""The snapshots of states that one worker keeps: which places are blank, and which are found by the tokens before them.

The scheduler keeps this record; the worker copies states to the places that it is given (model/states/store.py). A
snapshot has the key of the last block before it (`kv_blocks.next_key`), so equal keys mean equal tokens from the
beginning of the sequence. The least recently used snapshot is overwritten first.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence


class SnapshotPool:
    """Places 0 to num_places - 1.

    A place is *blank*; or a step in flight writes to it; or it has a key, and may be found. A place is pinned while a
    step that has not been committed reads it: that step may be run again.
    """

    __slots__ = ("_blank", "_keys", "_pins", "_places", "_writing", "num_places")

    def __init__(self, num_places: int) -> None:
        self.num_places = num_places
        self._blank = list(range(num_places - 1, -1, -1))
        self._writing: set[int] = set()
        self._places: dict[bytes, int] = {}
        """By key, the least recently used first."""
        self._keys: dict[int, bytes] = {}
        self._pins: Counter[int] = Counter()

    def longest(self, keys: Sequence[bytes]) -> int:
        """Number of the first keys up to the last one that has a snapshot; 0 if none has one."""
        return next((count for count in range(len(keys), 0, -1) if keys[count - 1] in self._places), 0)

    def pin(self, key: bytes) -> int:
        """The place of the snapshot with this key, which stays as it is until `unpin`."""
        place = self._places.pop(key)
        self._places[key] = place
        self._pins[place] += 1
        return place

    def unpin(self, place: int) -> None:
        self._pins[place] -= 1
        if not self._pins[place]:
            del self._pins[place]
            if place not in self._keys:
                self._blank.append(place)

    def write(self) -> int | None:
        """A place to write a snapshot to; None if all places are in use."""
        if not self._blank:
            oldest = next((key for key, place in self._places.items() if place not in self._pins), None)
            if oldest is None:
                return None
            self.retire(oldest)
        place = self._blank.pop()
        self._writing.add(place)
        return place

    def publish(self, place: int, key: bytes) -> bool:
        """Give a place that has been written its key. Returns False if another place has this key and keeps it."""
        self._writing.remove(place)
        if key in self._places:
            self._blank.append(place)
            return False
        self._places[key] = place
        self._keys[place] = key
        return True

    def give_back(self, place: int) -> None:
        """The step that was to write to this place is not committed."""
        self._writing.remove(place)
        self._blank.append(place)

    def retire(self, key: bytes) -> None:
        """Let nobody find the snapshot with this key any more, if there is one."""
        place = self._places.pop(key, None)
        if place is not None:
            del self._keys[place]
            if place not in self._pins:
                self._blank.append(place)

    def validate(self, *, pinned: Sequence[int], writing: Sequence[int]) -> None:
        """Assert that exactly these places are pinned and written to, and that no place is lost."""
        assert self._pins == Counter(pinned), "a snapshot is pinned by nobody, or not pinned by its reader"
        assert sorted(self._writing) == sorted(writing), "a place for a snapshot is leaked"
        lent = {place for place in self._pins if place not in self._keys}
        everywhere = [*self._blank, *self._writing, *self._keys, *lent]
        assert sorted(everywhere) == list(range(self.num_places))
        assert {place: key for key, place in self._places.items()} == self._keys
