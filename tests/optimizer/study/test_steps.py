"""How a trace becomes the steps of a server."""

import numpy as np
import pytest

from elastic_moe.optimizer.study.steps import active_experts, decoding_steps
from elastic_moe.optimizer.study.traces import Trace, TraceError


def _trace(lengths: list[int], ids: list[list[int]] | None = None) -> Trace:
    tokens = sum(lengths)
    topk = np.zeros((tokens, 1, 1), dtype=np.int16) if ids is None else np.array(ids, dtype=np.int16)[:, None, :]
    return Trace(topk_ids=topk, request_lengths=np.array(lengths), num_experts=4)


def test_seats_are_filled_again_and_steps_end_with_the_last_full_one() -> None:
    steps = decoding_steps(_trace([2, 3, 2]), 2)
    assert [step.tolist() for step in steps] == [[0, 2], [1, 3], [4, 5]]
    assert len(decoding_steps(_trace([2, 3, 2]), 1)) == 7
    assert len(decoding_steps(_trace([2, 3, 2]), 1, most=4)) == 4


def test_more_seats_than_requests_are_refused() -> None:
    with pytest.raises(TraceError, match="it has 2 requests, so 1 to 2 can run at once, not 3"):
        decoding_steps(_trace([2, 2]), 3)


def test_experts_with_the_most_tokens_come_first() -> None:
    trace = _trace([1, 1, 1], [[0, 3], [2, 3], [2, 3]])
    assert active_experts(trace, [np.array([0, 1, 2]), np.array([0])], 0) == [[3, 2, 0], [0, 3]]
