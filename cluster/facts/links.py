"""What is known of the links between workers, from the rates between pairs of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from elastic_moe.cluster.placement import Worker, WorkerId

Rates = Mapping[WorkerId, Mapping[WorkerId, float]]
"""Gigabits per second between each worker and others."""


def port_rates(workers: Sequence[Worker], rates: Rates) -> tuple[float, ...]:
    """[W] Gb/s of each worker's port, which is at least what its fastest pair reached; empty unless all are known."""
    best = [max(_to(rates, worker, workers), default=0.0) for worker in workers]
    return tuple(best) if all(best) else ()


def uplink_rates(workers: Sequence[Worker], rates: Rates) -> tuple[float, ...]:
    """[N] Gb/s of each node's uplink, in order of appearance: its workers measured at the same time, so it carries what
    they reached together with workers of other nodes. Empty unless all are known."""
    nodes: dict[str, float] = dict.fromkeys((worker.node for worker in workers), 0.0)
    for worker in workers:
        far = [other for other in workers if other.node != worker.node]
        best = max(_to(rates, worker, far), default=0.0)
        if not best:
            return ()
        nodes[worker.node] += best
    return tuple(nodes.values())


def _to(rates: Rates, worker: Worker, others: Sequence[Worker]) -> list[float]:
    """What was measured between `worker` and each of `others`, by either of the two."""
    found = []
    for other in others:
        both = (rates.get(worker.id, {}).get(other.id), rates.get(other.id, {}).get(worker.id))
        found += [rate for rate in both if rate is not None]
    return found
