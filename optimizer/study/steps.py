"""Cuts a trace into the decoding steps of a server: which tokens run together, and which experts they activate.

Legend: T tokens, L MoE layers, K experts per token, B requests that run at once.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from elastic_moe.cluster.lines import counted
from elastic_moe.optimizer.study.traces import Trace, TraceError

Tokens = npt.NDArray[np.int64]


def decoding_steps(trace: Trace, batch: int, most: int | None = None) -> list[Tokens]:
    """The tokens [B] of each step: `batch` requests run at once and advance by one token in each step; a seat that
    becomes free goes to the next request. It ends with the first step that has a seat to spare, or after `most` steps.

    Raises TraceError where the trace has fewer requests than seats.
    """
    starts = np.cumsum(trace.request_lengths) - trace.request_lengths
    waiting = list(zip(starts.tolist(), (starts + trace.request_lengths).tolist(), strict=True))
    if not 1 <= batch <= len(waiting):
        raise TraceError(
            f"trace: it has {counted(len(waiting), 'request')}, so 1 to {len(waiting)} can run at once, not {batch}"
        )
    seats = [waiting.pop(0) for _ in range(batch)]
    steps: list[Tokens] = []
    while len(seats) == batch and (most is None or len(steps) < most):
        steps.append(np.array([token for token, _ in seats]))
        seats = [(token + 1, end) for token, end in seats if token + 1 < end]
        while waiting and len(seats) < batch:
            seats.append(waiting.pop(0))
    return steps


def active_experts(trace: Trace, steps: list[Tokens], layer: int) -> list[list[int]]:
    """The experts of `layer` that have tokens in each step, those with the most tokens first."""
    found = []
    for tokens in steps:
        experts, count = np.unique(trace.topk_ids[tokens, layer], return_counts=True)
        found.append(experts[np.argsort(-count, kind="stable")].tolist())
    return found
