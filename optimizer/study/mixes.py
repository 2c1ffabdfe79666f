"""The statistics of several traces together, each of which is a scenario that a placement must serve."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from elastic_moe.cluster.errors import PlacementError
from elastic_moe.optimizer.core.problem import FloatArray
from elastic_moe.optimizer.study.traces import Trace, TraceError, count
from elastic_moe.optimizer.subjects.scenarios import shares_of


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MixedStatistics:
    """As `traces.Statistics`, of the weighted mean of the traces, with the loads of each."""

    loads: FloatArray
    """[L, E]"""
    transitions: FloatArray
    """[L-1, E, E]"""
    coactivation: FloatArray
    """[L, E, E]"""
    load_covariance: FloatArray
    """[L, E, E] how each trace's own loads vary; how the traces differ from one another is in `scenario_loads`."""
    scenario_loads: FloatArray | None
    """[C, L, E] loads of each trace; None for a single one."""
    top_k: int


def count_mix(traces: Sequence[Trace], weights: Sequence[float] = ()) -> MixedStatistics:
    """The statistics of traces of one model. Every trace counts as if it had the mean number of tokens, times its
    weight.

    Raises TraceError for traces of different models, and PlacementError for weights that do not fit them.
    """
    shapes = {(trace.num_layers, trace.top_k, trace.num_experts) for trace in traces}
    if len(shapes) != 1:
        raise TraceError("traces: they are of different models, since their layers or experts per token differ")
    if len(traces) == 1 and len(weights) > 1:
        raise PlacementError(f"weights: expected 1, one for each subject, got {len(weights)}")
    mean_tokens = float(np.mean([trace.num_tokens for trace in traces]))
    loads, total = [], None
    for trace, share in zip(traces, shares_of(weights, len(traces)), strict=True):
        counted, grown = count(trace), mean_tokens / max(trace.num_tokens, 1)
        loads.append(counted.loads)
        parts = [counted.loads * grown, counted.transitions * grown, counted.coactivation * grown]
        # relative deviations stay as they are
        parts.append(counted.load_covariance * grown**2)
        scaled = [share * part for part in parts]
        total = scaled if total is None else [a + b for a, b in zip(total, scaled, strict=True)]
    assert total is not None
    return MixedStatistics(
        loads=total[0],
        transitions=total[1],
        coactivation=total[2],
        load_covariance=total[3],
        scenario_loads=np.stack(loads) if len(traces) > 1 else None,
        top_k=traces[0].top_k,
    )
