"""Measures a placement on a trace, token by token. `emoe evaluate` and `emoe compare` print these figures.

Legend: T tokens, L MoE layers, K experts per token, E logical experts, W workers.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from elastic_moe.cluster.placement import EMPTY, Placement
from elastic_moe.optimizer.core.problem import FloatArray, Semantics
from elastic_moe.optimizer.study.traces import Trace, TraceError


@dataclass(frozen=True, slots=True, kw_only=True)
class Metrics:
    """Metrics of a placement on a trace, as means over layers and tokens."""

    load_imbalance: float
    """Mean over layers of the busiest worker's load divided by the mean load of the workers."""
    fan_out: float
    """Number of distinct workers per token and layer."""
    same_worker_transitions: float
    """Share of (expert, expert of the next layer) pairs of one token that sit on one worker."""
    cross_node_fraction: float
    """Share of a token's ways that leave a node. `home`: from its home to each distinct worker. `follow`: between the
    experts of adjacent layers."""


def measure(trace: Trace, placement: Placement, semantics: Semantics = Semantics.HOME) -> Metrics:
    """Replay the trace. Requests are homed on the workers in turn, and replicas are chosen as by our dispatch.

    Raises TraceError where trace and placement are not of one model.
    """
    if (placement.num_layers, placement.num_logical_experts) != (trace.num_layers, trace.num_experts):
        raise TraceError(
            f"the placement is for {placement.num_layers} layers x {placement.num_logical_experts} experts, "
            f"the trace has {trace.num_layers} x {trace.num_experts}"
        )
    counts = visits(trace, placement)
    load = counts.sum(axis=0, dtype=np.float64)
    reached = counts > 0
    away = (
        _home_crossings(trace, placement, reached)
        if semantics is Semantics.HOME
        else _follow_crossings(placement, counts)
    )
    return Metrics(
        load_imbalance=float((load.max(axis=1) / load.mean(axis=1)).mean()),
        fan_out=float(reached.sum(axis=2).mean()),
        same_worker_transitions=_same_worker(counts, trace.top_k),
        cross_node_fraction=away,
    )


def visits(trace: Trace, placement: Placement) -> npt.NDArray[np.uint8]:
    """[T, L, W] number of a token's experts that each worker serves."""
    routes, home = serving_ranks(placement), home_of(trace, placement)
    width = len(placement.workers)
    counts = np.zeros((trace.num_tokens, trace.num_layers, width), dtype=np.uint8)
    for layer in range(trace.num_layers):
        rank = routes[layer, home[:, None], trace.topk_ids[:, layer]]
        where = np.arange(trace.num_tokens)[:, None] * width + rank
        counts[:, layer] = np.bincount(where.ravel(), minlength=trace.num_tokens * width).reshape(-1, width)
    return counts


def home_of(trace: Trace, placement: Placement) -> npt.NDArray[np.int64]:
    """[T] home worker of each token; requests go to the workers in turn."""
    return np.repeat(np.arange(len(trace.request_lengths)) % len(placement.workers), trace.request_lengths)


def serving_ranks(placement: Placement) -> npt.NDArray[np.int32]:
    """[L, W, E] the worker that serves expert e for tokens at home on worker h, by the rule of our dispatch: h itself
    where it has a replica; the workers without one are given the replicas in turn."""
    layers, experts, width = placement.num_layers, placement.num_logical_experts, len(placement.workers)
    held = np.zeros((layers, width, experts + 1), dtype=bool)  # the last column stands for EMPTY
    owners = placement.slot_to_worker
    held[np.arange(layers)[:, None], owners[None, :], placement.physical_to_logical_map] = True
    held = held[:, :, :experts]
    assert EMPTY == -1
    copies = held.sum(axis=1)
    turn = np.cumsum(~held, axis=1) - ~held
    order = np.argsort(~held, axis=1, kind="stable")
    ranks = np.take_along_axis(order, turn % copies[:, None, :], axis=1)
    return np.asarray(np.where(held, np.arange(width)[None, :, None], ranks), dtype=np.int32)


def _same_worker(counts: npt.NDArray[np.uint8], top_k: int) -> float:
    if counts.shape[1] < 2:
        return 1.0
    together = np.einsum("tlw,tlw->", counts[:, :-1], counts[:, 1:], dtype=np.float64)
    return float(together / (counts.shape[0] * (counts.shape[1] - 1) * top_k**2))


def _nodes(placement: Placement) -> FloatArray:
    """[W, N] 1 where the worker runs on the node."""
    names = list(dict.fromkeys(worker.node for worker in placement.workers))
    return np.eye(len(names))[[names.index(worker.node) for worker in placement.workers]]


def _home_crossings(trace: Trace, placement: Placement, reached: npt.NDArray[np.bool_]) -> float:
    nodes = _nodes(placement)
    far = (nodes @ nodes.T == 0)[home_of(trace, placement)]
    return float((reached & far[:, None, :]).sum() / max(int(reached.sum()), 1))


def _follow_crossings(placement: Placement, counts: npt.NDArray[np.uint8]) -> float:
    if counts.shape[1] < 2:
        return 0.0
    on_node = (counts @ _nodes(placement)).astype(np.float64)
    near = np.einsum("tln,tln->", on_node[:, :-1], on_node[:, 1:])
    pairs = float((on_node[:, :-1].sum(axis=2) * on_node[:, 1:].sum(axis=2)).sum())
    return 1.0 - float(near) / pairs
