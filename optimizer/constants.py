"""The cost model's constants as they were measured on a machine, and how they are fitted to measured steps.

A step is predicted as  base_s + token_expert_s * U + bytes_s * B,  with U the tokens that the slowest worker computes,
summed over layers, and B the bytes of the busiest link, both as the cost model counts them (optimizer/core/cost.py).
`base_s` is the rest of the step, which placements do not change.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import math
import reprlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from elastic_moe.cluster.config import cache_directory
from elastic_moe.cluster.errors import ConfigError
from elastic_moe.cluster.messages.epochs import ModelInfo
from elastic_moe.cluster.placement import Placement
from elastic_moe.optimizer.core.cost import price
from elastic_moe.optimizer.core.problem import BITS, GIGA, Links, PlacementProblem

_MOST = sys.float_info.max
"""JSON has integers that no float holds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Constants:
    """What `emoe calibrate` measures of a model on a machine, with a number of workers."""

    workers: int
    step_tokens: int
    """Tokens of the steps that were measured, of all workers."""
    base_s: float
    """Seconds of a step beside its experts and their traffic."""
    token_expert_s: float
    """Seconds that one token takes in one expert."""
    worker_gbps: float | None = None
    """Bandwidth of a worker's link; None where steps did not show that traffic costs anything."""

    def __post_init__(self) -> None:
        for name in ("workers", "step_tokens", "token_expert_s"):
            if not 0 < getattr(self, name) <= _MOST:
                raise ConfigError(
                    f"calibration: {name}: expected a positive number, got {reprlib.repr(getattr(self, name))}"
                )
        if not 0 <= self.base_s <= _MOST:
            raise ConfigError(f"calibration: base_s: expected a number of at least 0, got {reprlib.repr(self.base_s)}")
        if self.worker_gbps is not None and not 0 < self.worker_gbps <= _MOST:
            raise ConfigError(f"calibration: worker_gbps: expected a positive number or null, got {self.worker_gbps!r}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Observation:
    """A measured step, and what the cost model counts of it."""

    compute_tokens: float
    """U: tokens that the slowest worker of each layer computes, over its speed, summed over layers."""
    link_bytes: float
    """B: bytes of the busiest link of each layer, summed over layers."""
    step_s: float


def observation(problem: PlacementProblem, placement: Placement, step_s: float) -> Observation:
    """What the cost model counts of a step that `problem` has counted, under `placement`."""
    unit = dataclasses.replace(
        problem, token_expert_s=1.0, links=Links(worker_gbps=BITS / GIGA, node_gbps=BITS / GIGA), affinity=0.0
    )
    cost = price(unit, placement)
    return Observation(compute_tokens=cost.compute_s, link_bytes=cost.traffic_s, step_s=step_s)


def fit(seen: Sequence[Observation], *, workers: int, step_tokens: int) -> Constants:
    """The constants that predict `seen` best: least squares of relative errors, none below 0.

    Raises ConfigError where steps do not grow with the slowest worker's tokens.
    """
    rows = np.array([[1.0, one.compute_tokens, one.link_bytes] for one in seen])
    times = np.array([one.step_s for one in seen])
    scale = np.maximum(rows.max(axis=0), 1e-300)
    found, least = np.zeros(3), math.inf
    for size in (1, 2, 3):
        for columns in itertools.combinations(range(3), size):
            part = (rows / scale)[:, columns] / times[:, None]
            solved = np.linalg.lstsq(part, np.ones(len(times)), rcond=None)[0]
            left = float(((part @ solved - 1) ** 2).sum())
            # a further constant must explain something
            if (solved >= 0).all() and left < least * 0.98:
                found, least = np.zeros(3), left
                found[list(columns)] = solved
    base_s, token_expert_s, byte_s = found / scale
    if token_expert_s <= 0:
        raise ConfigError(
            "calibration: steps did not take longer where the slowest worker had more tokens: give a model whose"
            " experts take most of a step, or --step-tokens with more tokens"
        )
    return Constants(
        workers=workers,
        step_tokens=step_tokens,
        base_s=float(base_s),
        token_expert_s=float(token_expert_s),
        worker_gbps=float(BITS / GIGA / byte_s) if byte_s > 0 else None,
    )


def predicted_s(constants: Constants, one: Observation) -> float:
    """Seconds of the observed step by the constants."""
    traffic_s = 0.0 if constants.worker_gbps is None else one.link_bytes * BITS / GIGA / constants.worker_gbps
    return constants.base_s + constants.token_expert_s * one.compute_tokens + traffic_s


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float:
    """Spearman's: 1 where both order the same way. Ties share their mean rank."""
    one, other = _ranks(first), _ranks(second)
    return float(np.corrcoef(one, other)[0, 1])


def _ranks(values: Sequence[float]) -> np.ndarray:
    given = np.asarray(values, dtype=np.float64)
    return np.array([(given < value).sum() + ((given == value).sum() - 1) / 2 for value in given])


def calibration_file(model: ModelInfo, dtype: str, device: str) -> Path:
    """Where the constants of a model are on this machine unless another file is named. `model`: in the form in which
    it is served."""
    sizes = (model.num_layers, model.num_logical_experts, model.top_k, model.hidden_size, model.expert_bytes)
    text = json.dumps([model.architecture, *sizes, model.trunk_bytes, dtype, device])
    return cache_directory() / "calibration" / f"{hashlib.blake2b(text.encode(), digest_size=8).hexdigest()}.json"


def save_constants(path: Path, measured: Sequence[Constants]) -> None:
    """Write a calibration file. Raises ConfigError where it cannot be written."""
    content = {"calibration": [dataclasses.asdict(one) for one in measured]}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None


def load_constants(path: Path) -> tuple[Constants, ...]:
    """Read a calibration file. Raises ConfigError, which names the file and what is wrong with it."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise ConfigError(f"{path}: expected a file that `emoe calibrate` wrote, which is JSON") from None
    entries = content.get("calibration") if isinstance(content, dict) else None
    if not isinstance(entries, list) or not entries:
        raise ConfigError(f"{path}: calibration: expected a list of measurements, as `emoe calibrate` writes it")
    return tuple(_constants(path, entry) for entry in entries)


def _constants(path: Path, entry: object) -> Constants:
    names = {field.name for field in dataclasses.fields(Constants)}
    if not isinstance(entry, dict) or set(entry) != names:
        raise ConfigError(f"{path}: calibration: expected the keys {', '.join(sorted(names))} in each measurement")
    wrong = [
        name
        for name, value in entry.items()
        if isinstance(value, bool) or not (isinstance(value, int | float) or (value is None and name == "worker_gbps"))
    ]
    if wrong:
        raise ConfigError(f"{path}: calibration: {wrong[0]}: expected a number, got {entry[wrong[0]]!r}")
    try:
        return Constants(**entry)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def nearest(measured: Sequence[Constants], workers: int) -> Constants | None:
    """The measurement with the number of workers that is nearest; None where nothing was measured."""
    return min(measured, key=lambda one: (abs(one.workers - workers), one.workers), default=None)
