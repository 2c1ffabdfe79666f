"""The cost model's constants as they were measured on a machine, and how they are fitted to measured steps.

A step is predicted as  base_s + token_expert_s * U + bytes_s * B,  with U the tokens in whose time the last worker of
a layer is done, summed over layers, and B the bytes of the busiest link, both as the cost model counts them
(optimizer/core/cost.py). `base_s` is the rest of the step, which placements do not change. U depends on how many
workers compute at full speed at once (`node_cores`), which is fitted too.
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
from elastic_moe.optimizer.core.cost import price, shares, sharing_weights, worker_loads
from elastic_moe.optimizer.core.problem import BITS, GIGA, Links, PlacementProblem

FEWEST_CORES = 2
"""On one node, steps of fewer cores are those of two with another `base_s` and `token_expert_s`."""

CORES_STEP = 0.25
"""Between two numbers of cores that are tried."""

SURPLUS = 0.98
"""Share of the squared errors that a further constant must leave at most, to be kept."""

SAME_ERROR = 1e-12
"""Difference of two sums of squared relative errors that arithmetic explains."""

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
    node_cores: float
    """How many of the workers compute at full speed at once; more of them share the cores evenly."""
    worker_gbps: float | None = None
    """Bandwidth of a worker's link; None where steps did not show that traffic costs anything."""

    def cores_for(self, workers: int) -> float:
        """`node_cores` of a problem with that many workers on a node; infinite where the workers that were measured did
        not share, which says nothing of more of them."""
        return self.node_cores if self.node_cores < self.workers or workers <= self.workers else math.inf

    def __post_init__(self) -> None:
        for name in ("workers", "step_tokens", "token_expert_s"):
            if not 0 < getattr(self, name) <= _MOST:
                raise ConfigError(
                    f"calibration: {name}: expected a positive number, got {reprlib.repr(getattr(self, name))}"
                )
        if not 1 <= self.node_cores <= _MOST:
            raise ConfigError(
                f"calibration: node_cores: expected a number of at least 1, got {reprlib.repr(self.node_cores)}"
            )
        if not 0 <= self.base_s <= _MOST:
            raise ConfigError(f"calibration: base_s: expected a number of at least 0, got {reprlib.repr(self.base_s)}")
        if self.worker_gbps is not None and not 0 < self.worker_gbps <= _MOST:
            raise ConfigError(f"calibration: worker_gbps: expected a positive number or null, got {self.worker_gbps!r}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Observation:
    """A measured step, and what the cost model counts of it."""

    ranked_tokens: tuple[float, ...]
    """[W] tokens over speed of the worker of a layer that has most, of the second, and so on, each summed over layers.
    All workers are on one node."""
    link_bytes: float
    """B: bytes of the busiest link of each layer, summed over layers."""
    step_s: float

    def compute_tokens(self, node_cores: float) -> float:
        """U: tokens in whose time the last worker of each layer is done, summed over layers."""
        return float(np.dot(sharing_weights(len(self.ranked_tokens), node_cores), self.ranked_tokens))


def observation(problem: PlacementProblem, placement: Placement, step_s: float) -> Observation:
    """What the cost model counts of a step that `problem`, whose workers are on one node, has counted, under
    `placement`."""
    assert not problem.node_of.any()
    unit = dataclasses.replace(problem, links=Links(worker_gbps=BITS / GIGA, node_gbps=BITS / GIGA), affinity=0.0)
    loads = worker_loads(problem, shares(problem, placement.physical_to_logical_map)) * problem.scale[:, None]
    ranked = -np.sort(-loads / problem.speed, axis=1)
    return Observation(
        ranked_tokens=tuple(ranked.sum(axis=0).tolist()), link_bytes=price(unit, placement).traffic_s, step_s=step_s
    )


def fit(seen: Sequence[Observation], *, workers: int, step_tokens: int) -> Constants:
    """The constants that predict `seen` best: least squares of relative errors, none below 0.

    Raises ConfigError where steps do not grow with the slowest worker's tokens.
    """
    numbers = np.arange(workers, FEWEST_CORES - 0.01, -CORES_STEP).tolist()
    tried = [(cores, *_fitted(seen, cores)) for cores in numbers]
    usable = [one for one in tried if one[1][1] > 0]
    if not usable:
        raise ConfigError(
            "calibration: steps did not take longer where the slowest worker had more tokens: give a model whose"
            " experts take most of a step, or --step-tokens with more tokens"
        )
    least = min(left for *_, left in usable)
    # as many cores as explain the steps nearly as well as the best number does
    node_cores, (base_s, token_expert_s, byte_s), _ = next(
        one for one in usable if one[2] * SURPLUS <= least + SAME_ERROR
    )
    return Constants(
        workers=workers,
        step_tokens=step_tokens,
        base_s=base_s,
        token_expert_s=token_expert_s,
        node_cores=node_cores,
        worker_gbps=BITS / GIGA / byte_s if byte_s > 0 else None,
    )


def _fitted(seen: Sequence[Observation], node_cores: float) -> tuple[tuple[float, float, float], float]:
    """((base_s, token_expert_s, byte_s), the sum of squared relative errors), 0 for a constant that explains
    nothing."""
    rows = np.array([[1.0, one.compute_tokens(node_cores), one.link_bytes] for one in seen])
    times = np.array([one.step_s for one in seen])
    scale = np.maximum(rows.max(axis=0), 1e-300)
    found, least = np.zeros(3), math.inf
    for size in (1, 2, 3):
        for columns in itertools.combinations(range(3), size):
            part = (rows / scale)[:, columns] / times[:, None]
            solved = np.linalg.lstsq(part, np.ones(len(times)), rcond=None)[0]
            left = float(((part @ solved - 1) ** 2).sum())
            if (solved >= 0).all() and left < least * SURPLUS:
                found, least = np.zeros(3), left
                found[list(columns)] = solved
    base_s, token_expert_s, byte_s = (found / scale).tolist()
    return (base_s, token_expert_s, byte_s), least


def predicted_s(constants: Constants, one: Observation) -> float:
    """Seconds of the observed step by the constants."""
    traffic_s = 0.0 if constants.worker_gbps is None else one.link_bytes * BITS / GIGA / constants.worker_gbps
    compute_s = constants.token_expert_s * one.compute_tokens(constants.node_cores)
    return constants.base_s + compute_s + traffic_s


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
