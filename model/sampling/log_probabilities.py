"""The model's own log probabilities of the chosen tokens and of others.

Legend: B rows (sequences), R rows of one part, A other tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from elastic_moe.cluster.messages.requests import TokenLogprobs
from elastic_moe.model.sampling.devices import parts, to_device
from elastic_moe.model.sampling.state import SamplingState

LEAST_LOGPROB = -9999.0
"""The log probability that is reported for impossible tokens, as by OpenAI's server: JSON has no minus infinity."""


def logprobs(logits_BV: Tensor, tokens_B: Tensor, states: Sequence[SamplingState]) -> list[tuple[list[int], Tensor]]:
    """The rows that want the model's log probabilities, in parts. Each part has a table with a line per row."""
    groups: dict[tuple[int, tuple[int, ...]], list[int]] = {}
    for row, state in enumerate(states):
        if state.params.logprobs is not None:
            groups.setdefault((state.params.logprobs, state.params.logprob_token_ids), []).append(row)
    found: list[tuple[list[int], Tensor]] = []
    # rows with one number of alternatives at a time: which of equal tokens topk returns may depend on that number
    for (number, named), rows in groups.items():
        for part in parts(rows, logits_BV):
            index = to_device(np.array(part, dtype=np.int64), logits_BV.device)
            found.append((part, _table(logits_BV[index], tokens_B[index], number, named)))
    return found


def _table(logits_RV: Tensor, tokens_R: Tensor, number: int, named: Sequence[int]) -> Tensor:
    """[R, 2 (1 + A)] the ids of the chosen token and of A others, then their log probabilities (float64).

    The others are the tokens `named`, or else the `number` most likely ones.
    """
    # CUDA adds up a row in an order that depends on its place in memory; rounding from float64 hides the difference
    dtype = torch.float32 if logits_RV.device.type == "cpu" else torch.float64
    logprobs_RV = logits_RV.float().log_softmax(dim=-1, dtype=dtype).float().clamp_(min=LEAST_LOGPROB)
    if named:
        ids = to_device(np.array(named, dtype=np.int64), logits_RV.device).expand(len(tokens_R), -1)
        values = logprobs_RV.gather(1, ids)
    else:
        values, ids = logprobs_RV.topk(min(number, logits_RV.shape[1]), dim=-1)
    chosen = tokens_R[:, None]
    return torch.cat([part.double() for part in (chosen, ids, logprobs_RV.gather(1, chosen), values)], dim=1)


def entry(line: Sequence[float]) -> TokenLogprobs:
    """Read a line of the table of `_table`."""
    half = len(line) // 2
    return TokenLogprobs(
        token_id=int(line[0]),
        logprob=line[half],
        top=tuple((int(token), value) for token, value in zip(line[1:half], line[half + 1 :], strict=True)),
    )
