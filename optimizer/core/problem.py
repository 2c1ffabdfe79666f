"""A placement problem as one value: the counts, the workers that may hold experts, and the prices.

Legend: L MoE layers, E logical experts, W workers, S slots over all workers, K experts per token.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property

import numpy as np
import numpy.typing as npt

from elastic_moe.cluster.placement import Placement, Worker
from elastic_moe.optimizer.core.tiering import Tiering, is_tiered
from elastic_moe.optimizer.residency.memory import WorkerMemory
from elastic_moe.optimizer.subjects.scenarios import of_tokens, shares_of

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int32]

BITS = 8.0
GIGA = 1e9

DEFAULT_STEP_TOKENS = 1024


class Semantics(StrEnum):
    """Where a token is between two MoE layers."""

    HOME = "home"
    """The token returns to the worker of its request after every MoE layer, as in our engine."""
    FOLLOW = "follow"
    """The token stays at its expert's worker, as in MoETuner and ExFlow."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Links:
    """Bandwidths in gigabits per second, each way. The defaults assume eight H100 with NVLink (450 GB/s each, of which
    exchanges reach about 70 %) and a 400 Gb/s card each."""

    worker_gbps: float = 2500.0
    """Bandwidth of a worker's port, which carries all that enters or leaves the worker."""
    node_gbps: float = 3200.0
    """Bandwidth of a node's uplink, which its workers share and which carries all that enters or leaves the node."""
    ports_gbps: tuple[float, ...] = ()
    """[W] bandwidth of each worker's port; empty where all have `worker_gbps`."""
    uplinks_gbps: tuple[float, ...] = ()
    """[N] bandwidth of each node's uplink, in the order of `PlacementProblem.node_of`; empty where all have
    `node_gbps`."""


@dataclass(frozen=True, kw_only=True, eq=False)
class PlacementProblem:
    """The input of a planner. It is verified when it is made; PlacementError names the wrong field in one line.

    Counts may be on any scale (a window of tokens, or shares of it): `top_k` turns them into tokens.
    """

    loads: FloatArray
    """[L, E] number of tokens that chose each expert."""
    workers: tuple[Worker, ...]
    top_k: int = 1
    """K, the experts of a token: the loads of a layer sum to K times its tokens."""
    transitions: FloatArray | None = None
    """[L-1, E, E] tokens that chose e in layer l and f in layer l+1. None: the choices are assumed to be
    independent."""
    coactivation: FloatArray | None = None
    """[L, E, E] tokens that chose both e and f in layer l; symmetric, the diagonal is ignored. None: estimated."""
    load_covariance: FloatArray | None = None
    """[L, E, E] covariance of the window's loads from one window to the next, in tokens squared; see
    `estimate.drift_covariance`. None: loads are assumed to stay as they are."""
    scenario_loads: FloatArray | None = None
    """[C, L, E] loads of each subject that the placement must serve, on any scale; `loads` must be their mean by
    `scenario_weights`, with every layer of every scenario scaled to the same tokens (`mean_of_scenarios`). None:
    `loads` are the only scenario."""
    scenario_weights: tuple[float, ...] = ()
    """[C] weight of each scenario, on any scale; empty where all weigh the same."""
    tail: float = 0.5
    """Weight of the worst quarter of the scenarios in the price of computing, 0..1; the rest is their mean."""
    speeds: tuple[float, ...] = ()
    """[W] relative speed of each worker; empty where all are the same."""
    node_cores: float = math.inf
    """Number of workers of a node that compute at full speed at once: its cores, as far as they do not slow one another
    down, or 1 where workers share a GPU. Where a node has more workers, these share the cores evenly."""
    memory: tuple[WorkerMemory, ...] = ()
    """[W] what each worker's tiers hold, and how long an expert takes from each; empty where all experts fit. A worker
    may have more slots than its device has room for."""
    links: Links = field(default_factory=Links)
    current: Placement | None = None
    """The placement to change, if one is in force. Its workers need not be the problem's."""
    move_budget: int | None = None
    """Most experts that workers may fetch to get there from `current`; None sets no limit beside the cost."""
    expert_bytes: int = 0
    """Size of one expert of one layer, which a move copies."""
    horizon_steps: float = 10_000.0
    """Steps that the new placement is expected to serve; migration is amortised over them."""
    semantics: Semantics = Semantics.HOME
    tokens_per_step: int = DEFAULT_STEP_TOKENS
    """Tokens of a typical step of the whole cluster, for which costs are given. Where experts do not all fit, it also
    says how many of them have tokens in a step."""
    token_bytes: int = 4096
    """Size of one token's hidden state on a link."""
    dealt: bool = False
    """Whether the workers deal the misses of each step among them, as those of several nodes do on CPUs
    (optimizer/buffering/dealing.py). Which worker serves an expert on disk does not matter then."""
    shared_disk: bool = False
    """Whether all workers read from one disk, which takes `disk_fetch_s` divided by their number for an expert. Then it
    does not matter either, and a layer waits for all that is fetched."""
    token_expert_s: float = 8e-8
    """Seconds that one token takes in one expert, on a worker of speed 1. The default: an expert of DeepSeek-V2-Lite
    (17 MB) is read from an H100's memory, at two thirds of 3.35 TB/s, for the hundred tokens of a step that chose
    it."""
    affinity: float = 2.5
    """Price of a transition that changes worker, as a multiple of a token's way there and back through an average port.
    Under `home` 1 is the most that it costs where requests are homed beside their experts, and 0 is right where homes
    are chosen without regard to them. The default asks for more, as experts that follow one another are also chosen
    together: like `caution`, it was set by planning on one part of some requests and measuring on another, here as the
    least that keeps half as many transitions again on one worker as clustering by load and mapping clusters after."""
    caution: float = 100.0
    """Price of load that may shift, in loads per squared relative deviation. The higher it is, the more are experts
    kept apart whose loads rise together. At 100, deviations of 3 % cost 9 %: the slowest of eight workers is late by 4
    % for what the window got wrong, and again for what comes after."""

    def __post_init__(self) -> None:
        from elastic_moe.optimizer.core.validate import validated_fields

        for name, value in validated_fields(self).items():
            object.__setattr__(self, name, value)

    @property
    def num_layers(self) -> int:
        return int(self.loads.shape[0])

    @property
    def num_experts(self) -> int:
        return int(self.loads.shape[1])

    @property
    def num_slots(self) -> int:
        return sum(worker.slots for worker in self.workers)

    @cached_property
    def owner(self) -> IntArray:
        """[S] worker of each slot."""
        return np.repeat(np.arange(len(self.workers), dtype=np.int32), [w.slots for w in self.workers])

    @cached_property
    def node_of(self) -> IntArray:
        """[W] node number of each worker, in order of first appearance."""
        names = list(dict.fromkeys(worker.node for worker in self.workers))
        return np.array([names.index(worker.node) for worker in self.workers], dtype=np.int32)

    @cached_property
    def speed(self) -> FloatArray:
        """[W] relative speeds."""
        return np.asarray(self.speeds or (1.0,) * len(self.workers), dtype=np.float64)

    @cached_property
    def shares_cores(self) -> bool:
        """Whether some node has more workers than cores."""
        return bool(np.bincount(self.node_of).max() > self.node_cores)

    @cached_property
    def tokens(self) -> FloatArray:
        """[L] number of tokens that were counted in each layer."""
        return np.asarray(self.loads.sum(axis=1) / self.top_k)

    @cached_property
    def scenarios(self) -> tuple[FloatArray, FloatArray]:
        """([C, L, E] loads of each scenario, with as many tokens as `loads`; [C] weights, which sum to 1)."""
        if self.scenario_loads is None:
            return self.loads[None], np.ones(1)
        weights = shares_of(self.scenario_weights, len(self.scenario_loads))
        return of_tokens(self.scenario_loads, self.loads.sum(axis=1)), weights

    @cached_property
    def pairs(self) -> FloatArray:
        """[L, E, E] co-activation, zero on the diagonal; an estimate where none was counted."""
        from elastic_moe.optimizer.core.estimate import estimate_coactivation

        return estimate_coactivation(self) if self.coactivation is None else self.coactivation

    @cached_property
    def flows(self) -> FloatArray:
        """[L-1, E, E] transitions; those of independent choices where none were counted."""
        from elastic_moe.optimizer.core.estimate import estimate_transitions

        return estimate_transitions(self) if self.transitions is None else self.transitions

    @cached_property
    def tiering(self) -> Tiering | None:
        """The prices of tiers; None where every expert fits wherever it may be placed."""
        return Tiering(self) if is_tiered(self) else None

    @cached_property
    def membership(self) -> FloatArray:
        """[W, N] 1 where the worker runs on the node."""
        return np.asarray(np.eye(int(self.node_of.max()) + 1)[self.node_of])

    @cached_property
    def scale(self) -> FloatArray:
        """[L] factor from counts to a step of `tokens_per_step` tokens."""
        return np.asarray(self.tokens_per_step / self.tokens)

    @cached_property
    def port_s(self) -> FloatArray:
        """[W] seconds that one token takes on each worker's port."""
        gbps = self.links.ports_gbps or (self.links.worker_gbps,) * len(self.workers)
        return np.asarray(self.token_bytes * BITS / (np.array(gbps) * GIGA))

    @cached_property
    def median_port_s(self) -> float:
        """Seconds that one token takes on the median port."""
        return float(np.median(self.port_s))

    @cached_property
    def uplink_s(self) -> FloatArray:
        """[N] seconds that one token takes on each node's uplink."""
        gbps = self.links.uplinks_gbps or (self.links.node_gbps,) * (int(self.node_of.max()) + 1)
        return np.asarray(self.token_bytes * BITS / (np.array(gbps) * GIGA))

    def __getstate__(self) -> dict[str, object]:
        """Only the fields. Cached values can be computed again, and would double the size of the pickle."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__}

    def __setstate__(self, state: dict[str, object]) -> None:
        for name, value in state.items():
            object.__setattr__(self, name, value)
