"""Notices that the subject of the traffic has changed, from counts as they come in: a test, and not a timer.

Counts are gathered until they could tell a subject, and compared with what came since the last change. They are of
another subject if twice in a row they are unlike it beyond chance, and beyond what its own stretches usually are: few
requests differ more from one another than tokens drawn at random would.

Legend: L MoE layers, E logical experts.
"""

from __future__ import annotations

from enum import Enum, auto

import numpy as np
import numpy.typing as npt

from elastic_moe.optimizer.subjects.likeness import UNLIKE, tells_subject, unlikeness

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

FORGETTING = 0.9
"""Share of the reference that remains when counts like it join: so it follows a slow drift, which is no change."""

USUAL = 2.0
"""Multiple of the usual unlikeness of a subject's stretches that is no sign of a change."""

LEARNING = 0.3
"""Weight of the newest stretch in what is usual."""

IN_A_ROW = 2
"""Number of stretches in a row that must be unlike."""


class Sight(Enum):
    """What a look has seen."""

    NOTHING_NEW = auto()
    FIRST = auto()
    """Enough was counted to tell a subject, for the first time."""
    CHANGED = auto()


class SubjectWatch:
    """Compares what comes with what came since the last change."""

    def __init__(self) -> None:
        self._reference: FloatArray | None = None
        self._recent: FloatArray | None = None
        """[L, E] counts that do not yet tell a subject."""
        self._strange: FloatArray | None = None
        """[L, E] counts that were unlike the reference so far."""
        self._in_a_row = 0
        self._usual = UNLIKE
        """Unlikeness of the stretches of one subject; learned, from a cautious beginning."""

    @property
    def present(self) -> IntArray:
        """[L, E] counts of the new subject, when it has just been seen."""
        assert self._reference is not None
        return np.rint(self._reference).astype(np.int64)

    def look(self, loads: npt.ArrayLike) -> Sight:
        """Take the counts [L, E] since the last look. Where the subject has changed, what was unlike the old one is the
        new reference."""
        given = np.asarray(loads, dtype=np.float64)
        stretch = given if self._recent is None else self._recent + given
        self._recent = None
        if not tells_subject(stretch):
            self._recent = stretch
            return Sight.NOTHING_NEW
        if self._reference is None:
            self._reference = stretch
            return Sight.FIRST
        apart = float(unlikeness(stretch, self._reference))
        if apart <= UNLIKE + USUAL * self._usual:
            self._usual += LEARNING * (apart - self._usual)
            self._reference = FORGETTING * self._reference + stretch
            self._strange, self._in_a_row = None, 0
            return Sight.NOTHING_NEW
        self._strange = stretch if self._strange is None else self._strange + stretch
        self._in_a_row += 1
        if self._in_a_row < IN_A_ROW:
            return Sight.NOTHING_NEW
        self._reference, self._strange, self._in_a_row = self._strange, None, 0
        return Sight.CHANGED
