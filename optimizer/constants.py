"""The cost model's constants as they were measured on a machine, and how they are fitted to measured steps.

A step is predicted as  base_s + token_expert_s * U + bytes_s * B,  with U the tokens in whose time the last worker of
a layer is done, summed over layers, and B the bytes of the busiest link, both as the cost model counts them
(optimizer/core/cost.py). `base_s` is the rest of the step, which placements do not change. U depends on how many
workers of a node compute at full speed at once (`node_cores`), which is fitted too. On several nodes the links that
are priced are the nodes' uplinks, on one node the workers' ports.
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
from elastic_moe.optimizer.core.problem import BITS, GIGA, FloatArray, Links, PlacementProblem

FEWEST_CORES = 2
"""On one node, steps of fewer cores are those of two with another `base_s` and `token_expert_s`. Of several nodes, some
have one worker busy and others more, which tells one core from two."""

UNPRICED_GBPS = 1e12
"""Bandwidth of links that are not to count."""

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
    """How many workers of a node compute at full speed at once; more of them share the cores evenly."""
    worker_gbps: float | None = None
    """Bandwidth of a worker's link; None where steps did not show that traffic costs anything, and on several nodes."""
    nodes: int = 1
    """Number of nodes on which the workers were, evenly spread."""
    node_gbps: float | None = None
    """Bandwidth of a node's uplink; None where steps did not show that it costs anything, and on one node."""

    @property
    def node_workers(self) -> int:
        """Most workers of a node."""
        return -(-self.workers // self.nodes)

    def cores_for(self, node_workers: int) -> float:
        """`node_cores` of a problem with that many workers on a node; infinite where the workers that were measured did
        not share, which says nothing of more of them."""
        measured = self.node_workers
        return self.node_cores if self.node_cores < measured or node_workers <= measured else math.inf

    def __post_init__(self) -> None:
        for name in ("workers", "nodes", "step_tokens", "token_expert_s"):
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
        for name in ("worker_gbps", "node_gbps"):
            gbps = getattr(self, name)
            if gbps is not None and not 0 < gbps <= _MOST:
                raise ConfigError(f"calibration: {name}: expected a positive number or null, got {gbps!r}")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Observation:
    """A measured step, and what the cost model counts of it.

    Legend: L layers, N nodes, M most workers of a node.
    """

    ranked_tokens: FloatArray
    """[L, N, M] tokens over speed of each worker of a node, the largest first; 0 where a node has fewer workers."""
    link_bytes: float
    """B: bytes of the busiest link of each layer, summed over layers: of uplinks where there are several nodes."""
    step_s: float

    def compute_tokens(self, node_cores: float) -> float:
        """U: tokens in whose time the last worker of each layer is done, summed over layers."""
        ends = self.ranked_tokens @ sharing_weights(self.ranked_tokens.shape[2], node_cores)
        return float(ends.max(axis=1).sum())


def observation(problem: PlacementProblem, placement: Placement, step_s: float) -> Observation:
    """What the cost model counts of a step that `problem` has counted, under `placement`."""
    unit_gbps = BITS / GIGA
    several = problem.node_of.max() > 0
    links = Links(worker_gbps=UNPRICED_GBPS if several else unit_gbps, node_gbps=unit_gbps)
    unit = dataclasses.replace(problem, links=links, affinity=0.0)
    loads = worker_loads(problem, shares(problem, placement.physical_to_logical_map)) * problem.scale[:, None]
    alone = loads / problem.speed
    ranked = np.zeros((problem.num_layers, problem.membership.shape[1], int(np.bincount(problem.node_of).max())))
    for node, workers in enumerate(problem.membership.T > 0):
        ranked[:, node, : workers.sum()] = -np.sort(-alone[:, workers], axis=1)
    return Observation(ranked_tokens=ranked, link_bytes=price(unit, placement).traffic_s, step_s=step_s)


def fit(seen: Sequence[Observation], *, workers: int, step_tokens: int) -> Constants:
    """The constants that predict `seen` best: least squares of relative errors, none below 0. `workers`: over all
    nodes.

    Raises ConfigError where steps do not grow with the slowest worker's tokens.
    """
    _, nodes, node_workers = seen[0].ranked_tokens.shape
    fewest = min(FEWEST_CORES if nodes == 1 else 1, node_workers)
    numbers = np.arange(node_workers, fewest - 0.01, -CORES_STEP).tolist()
    tried = [(cores, *_fitted(seen, cores)) for cores in numbers]
    usable = [one for one in tried if one[1][1] > 0]
    if not usable:
        raise ConfigError(
            "calibration: steps did not take longer where the slowest worker had more tokens: give a model whose"
            " experts take most of a step, or --step-tokens with more tokens. On a busy machine, or in few steps"
            " (--steps, --turns), this shows as little"
        )
    least = min(left for *_, left in usable)
    # as many cores as explain the steps nearly as well as the best number does
    node_cores, (base_s, token_expert_s, byte_s), _ = next(
        one for one in usable if one[2] * SURPLUS <= least + SAME_ERROR
    )
    gbps = BITS / GIGA / byte_s if byte_s > 0 else None
    return Constants(
        workers=workers,
        nodes=nodes,
        step_tokens=step_tokens,
        base_s=base_s,
        token_expert_s=token_expert_s,
        node_cores=node_cores,
        worker_gbps=gbps if nodes == 1 else None,
        node_gbps=gbps if nodes > 1 else None,
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
    gbps = constants.worker_gbps if constants.nodes == 1 else constants.node_gbps
    traffic_s = 0.0 if gbps is None else one.link_bytes * BITS / GIGA / gbps
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
    fields = dataclasses.fields(Constants)
    # a file of before nodes were counted lacks what has a default
    needed = {field.name for field in fields if field.default is dataclasses.MISSING}
    if not isinstance(entry, dict) or not needed <= set(entry) <= {field.name for field in fields}:
        raise ConfigError(f"{path}: calibration: expected the keys {', '.join(sorted(needed))} in each measurement")
    wrong = [
        name
        for name, value in entry.items()
        if isinstance(value, bool)
        or not (isinstance(value, int | float) or (value is None and name in ("worker_gbps", "node_gbps")))
    ]
    if wrong:
        raise ConfigError(f"{path}: calibration: {wrong[0]}: expected a number, got {entry[wrong[0]]!r}")
    try:
        return Constants(**entry)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def nearest(measured: Sequence[Constants], workers: int, nodes: int = 1) -> Constants | None:
    """The measurement with the number of nodes, and then of workers, that is nearest; None where nothing was
    measured."""
    return min(
        measured, key=lambda one: (abs(one.nodes - nodes), abs(one.workers - workers), one.workers), default=None
    )
