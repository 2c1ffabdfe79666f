"""A small memory of the subjects that the traffic has had: what each loaded, how it varied, and how long ago that was.

Stretches of the traffic that are alike become one subject (leader clustering, Hartigan 1975). A subject's weight is the
number of its stretches, each of which counts half as much after HALF_LIFE_S. Its variation is kept as the strongest
directions of its stretches' deviations (frequent directions, Liberty 2013). The memory has a bound in bytes.

Legend: L MoE layers, E logical experts, D directions.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from elastic_moe.optimizer.subjects.likeness import UNLIKE, mixes, tells_subject, unlikeness
from elastic_moe.optimizer.subjects.scenarios import mean_of_scenarios

FloatArray = npt.NDArray[np.float64]
Stored = npt.NDArray[np.float32]

HALF_LIFE_S = 4 * 3600.0
"""Seconds after which a stretch of the traffic counts half."""

MOST_BYTES = 1 << 20
"""Most bytes of the memory when it is saved."""

MOST_SUBJECTS = 12

DIRECTIONS = 2
"""Number of directions in which each subject's variation is kept."""

MOST_CHOICES = 1e6
"""Number of choices beyond which a subject's mix follows new stretches as if it had been counted on so many."""


PRESENT_SHARE = 0.85
"""Weight of the present window among the subjects that a placement is planned for; what is remembered has the rest. A
placement serves another subject only from a change until it is answered, which is a small share of the time."""

MOST_PRICED = 6
"""Most remembered subjects that a placement is planned for, the heaviest ones; each takes planning time."""


@dataclass(slots=True, eq=False)
class _Subject:
    mix: Stored
    """[L, E] shares of each layer's tokens."""
    choices: float
    """Choices of an average layer from which the mix is known."""
    stretches: float
    """Stretches of the traffic that it stands for, aged to `seen_s`."""
    seen_s: float
    factors: Stored
    """[D, L, E] deviations of the mix, whose outer products sum to those of all stretches, along D directions."""
    varied: float
    """Number of stretches in `factors`."""

    def weight(self, now: float) -> float:
        return float(self.stretches * 0.5 ** (max(now - self.seen_s, 0.0) / HALF_LIFE_S))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Remembered:
    """A subject that the traffic has had, other than the present one."""

    mix: FloatArray
    """[L, E] shares of each layer's tokens."""
    weight: float
    """Number of stretches of the traffic that it stands for, aged."""
    age_s: float
    """Seconds since it was last seen."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Variation:
    """How stretches of the traffic vary about their subjects."""

    covariance: FloatArray
    """[L, E, E] of a stretch's mix."""
    stretches: float
    """Number of stretches that show it."""

    def of_window(self, loads: npt.ArrayLike, parts: int) -> FloatArray:
        """[L, E, E] covariance of a window's loads [L, E], in tokens squared, if its parts vary like that."""
        choices = np.asarray(loads, dtype=np.float64).sum(axis=1)
        return np.asarray(self.covariance * (choices**2 / max(parts, 1))[:, None, None])


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedSubjects:
    """A memory as it is saved."""

    content: bytes
    """What `SubjectMemory.to_bytes` gave; empty for a memory that has seen nothing."""


def scenarios(
    present: npt.ArrayLike, remembered: Sequence[Remembered]
) -> tuple[FloatArray, FloatArray | None, tuple[float, ...]]:
    """([L, E] mean loads, [C, L, E] loads, [C] weights) of what a placement is planned for: the present window [L, E]
    first, then what is remembered. The present loads, None and () where nothing is."""
    loads = np.asarray(present, dtype=np.float64)
    heaviest = sorted(remembered, key=lambda each: -each.weight)[:MOST_PRICED]
    total = sum(each.weight for each in heaviest)
    if total <= 0:
        return loads, None, ()
    each_loads = np.stack([loads, *(each.mix for each in heaviest)])
    weights = (PRESENT_SHARE, *((1 - PRESENT_SHARE) * each.weight / total for each in heaviest))
    return mean_of_scenarios(each_loads, weights, loads.sum(axis=1)), each_loads, weights


class SubjectMemory:
    """The subjects of a model's traffic."""

    def __init__(self, num_layers: int, num_experts: int) -> None:
        self._shape = (num_layers, num_experts)
        # as saved: in 16 bits
        subject_bytes = 2 * (1 + DIRECTIONS) * num_layers * num_experts + 64
        self._most = int(np.clip(MOST_BYTES // subject_bytes, 2, MOST_SUBJECTS))
        self._subjects: list[_Subject] = []

    def __len__(self) -> int:
        return len(self._subjects)

    def add(self, loads: npt.ArrayLike, now: float) -> None:
        """Take a stretch of the traffic: `loads` [L, E] tokens that chose each expert. Nothing is taken of an empty
        one, or of one too short to tell its subject."""
        given = np.asarray(loads, dtype=np.float64)
        assert given.shape == self._shape, f"loads are {given.shape}, expected {self._shape}"
        if not tells_subject(given):
            return
        subject = self._like(given)
        if subject is None:
            self._subjects.append(_new(given, now))
            self._keep_to_bound(now)
        else:
            _follow(subject, given, now)

    def others(self, present: npt.ArrayLike, now: float) -> list[Remembered]:
        """What is remembered besides the subject of `present` [L, E], the heaviest first."""
        given = np.asarray(present, dtype=np.float64)
        found = [
            Remembered(mix=mixes(subject.mix), weight=subject.weight(now), age_s=float(max(now - subject.seen_s, 0.0)))
            for subject in self._subjects
            if unlikeness(given, subject.mix * subject.choices) > UNLIKE
        ]
        return sorted(found, key=lambda each: -each.weight)

    def variation(self, now: float) -> Variation | None:
        """How stretches vary about their subjects, on average over what is remembered; None where no subject was seen
        twice."""
        known = [(subject, subject.weight(now)) for subject in self._subjects if subject.varied >= 1]
        if not known:
            return None
        layers, experts = self._shape
        total = np.zeros((layers, experts, experts))
        for subject, weight in known:
            by_layer = subject.factors.transpose(1, 2, 0).astype(np.float64)
            total += weight / subject.varied * np.matmul(by_layer, by_layer.transpose(0, 2, 1))
        weights = sum(weight for _, weight in known)
        return Variation(covariance=total / max(weights, 1e-300), stretches=sum(each.varied for each, _ in known))

    def to_bytes(self, now: float) -> bytes:
        """The whole memory, with ages in place of times; at most about MOST_BYTES."""
        stream, subjects = io.BytesIO(), self._subjects
        np.savez(
            stream,
            mix=np.array([s.mix for s in subjects], dtype=np.float16),
            factors=np.array([s.factors for s in subjects], dtype=np.float16),
            figures=np.array([(s.choices, s.stretches, now - s.seen_s, s.varied) for s in subjects], dtype=np.float64),
        )
        return stream.getvalue()

    def restore(self, saved: bytes, now: float) -> None:
        """Take over what `to_bytes` gave. What is damaged, or of another model, is ignored."""
        try:
            with np.load(io.BytesIO(saved), allow_pickle=False) as arrays:
                mix, factors, figures = (arrays[name] for name in ("mix", "factors", "figures"))
        except (ValueError, KeyError, OSError, EOFError, zipfile.BadZipFile):
            return
        if mix.shape[1:] != self._shape or factors.shape != (len(mix), DIRECTIONS, *self._shape):
            return
        self._subjects = [
            _Subject(
                mix=mixes(one).astype(np.float32),
                choices=float(choices),
                stretches=float(stretches),
                seen_s=now - float(age_s),
                factors=directions.astype(np.float32),
                varied=float(varied),
            )
            for one, directions, (choices, stretches, age_s, varied) in zip(mix, factors, figures, strict=True)
        ]

    def _like(self, loads: FloatArray) -> _Subject | None:
        """The subject that the loads are of, if it is known."""
        if not self._subjects:
            return None
        known = np.array([subject.mix * subject.choices for subject in self._subjects])
        apart = unlikeness(np.broadcast_to(loads, known.shape), known)
        nearest = int(apart.argmin())
        return self._subjects[nearest] if apart[nearest] <= UNLIKE else None

    def _keep_to_bound(self, now: float) -> None:
        """Forget the lightest subject but the newest where there are too many."""
        if len(self._subjects) > self._most:
            self._subjects.remove(min(self._subjects[:-1], key=lambda each: each.weight(now)))


def _new(loads: FloatArray, now: float) -> _Subject:
    return _Subject(
        mix=mixes(loads).astype(np.float32),
        choices=float(loads.sum(axis=1).mean()),
        stretches=1.0,
        seen_s=now,
        factors=np.zeros((DIRECTIONS, *loads.shape), dtype=np.float32),
        varied=0.0,
    )


def _follow(subject: _Subject, loads: FloatArray, now: float) -> None:
    """Count a further stretch of a known subject."""
    choices = float(loads.sum(axis=1).mean())
    share = choices / (choices + min(subject.choices, MOST_CHOICES))
    deviation = mixes(loads) - subject.mix
    subject.mix = (subject.mix + share * deviation).astype(np.float32)
    subject.choices += choices
    subject.stretches, subject.seen_s = subject.weight(now) + 1.0, now
    subject.factors = _with_direction(subject.factors, deviation)
    subject.varied += 1.0


def _with_direction(factors: Stored, deviation: FloatArray) -> Stored:
    """[D, L, E] the D strongest directions of `factors` [D, L, E] and one more deviation [L, E]."""
    rows = np.concatenate([factors, deviation[None]]).reshape(len(factors) + 1, -1).astype(np.float64)
    strength, turn = np.linalg.eigh(rows @ rows.T)
    # what the weakest direction had is taken off all, so that no direction is believed for what chance gives each
    kept = np.sqrt(np.clip(strength[1:] - strength[0], 0.0, None) / np.maximum(strength[1:], 1e-300))
    return np.asarray((kept[:, None] * (turn[:, 1:].T @ rows)).reshape(factors.shape), dtype=np.float32)
