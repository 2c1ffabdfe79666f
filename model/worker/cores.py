"""How many threads a worker's steps use, of the cores that the workers of its node share."""

from __future__ import annotations

import torch

from elastic_moe.cluster.messages.epochs import WorkerSpec
from elastic_moe.cluster.messages.steps import StepPlan
from elastic_moe.cluster.placement import Placement
from elastic_moe.model.exchange.join import Exchange
from elastic_moe.model.native.exchange import NativeExchange

_BORROW_TOKENS = 32
"""Fewest tokens of a worker in a step for which borrowing cores pays."""


class Cores:
    """Sets torch's number of threads. The thread that runs the steps calls it."""

    def __init__(self, spec: WorkerSpec) -> None:
        self._node_threads = spec.node_threads
        self._own = max(1, spec.num_threads)
        """Threads of a step if this worker borrows none."""
        self._rank = 0
        self._node_ranks: tuple[int, ...] = ()
        """Ranks of the workers that share the node's cores, this one included. Empty if cores are not shared."""

    def share(self, placement: Placement, rank: int, exchange: Exchange) -> None:
        """An epoch begins in which this worker has `rank`: share its node's cores among the node's workers."""
        self._rank, self._node_ranks = rank, ()
        if not self._node_threads:
            return
        node = placement.workers[rank].node
        ranks = tuple(rank for rank, worker in enumerate(placement.workers) if worker.node == node)
        self._own = max(1, self._node_threads // len(ranks))
        torch.set_num_threads(self._own)
        if isinstance(exchange, NativeExchange):
            exchange.threads = self._own
            # PyTorch's operators add up in another order if they have another number of threads. Native code does not
            self._node_ranks = ranks

    def borrow(self, plan: StepPlan) -> None:
        """Let the trunk use the cores of workers on this node that have few tokens in this step."""
        if not self._node_ranks:
            return
        own = plan.tokens_per_rank[self._rank]
        everybody = sum(plan.tokens_per_rank[rank] for rank in self._node_ranks)
        fair = round(self._node_threads * own / everybody) if own >= _BORROW_TOKENS else 0
        threads = max(self._own, fair)
        if threads != torch.get_num_threads():
            torch.set_num_threads(threads)
