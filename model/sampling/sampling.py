"""Chooses the next token of every sequence from one step's logits, on the worker that computed them.

The settings have vLLM's order and meaning. Reported log probabilities are those of the model itself. Then come
logit_bias, the forbidden tokens (allowed_token_ids, the grammar's mask, bad_words, min_tokens), penalties, temperature,
min_p, top_k and top_p. Temperature 0 takes the most likely token. Where a grammar allows nothing but the end of the
answer, the answer ends, whatever min_tokens and ignore_eos say.

A row's token depends only on its logits, its history and its seed. Every operation is row-wise, random numbers are a
hash of (seed, output index), and probabilities are summed as integers, whose sum does not depend on the order.

Legend: B rows (sequences), R those of them that draw at random, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from elastic_moe.cluster.messages.requests import TokenLogprobs
from elastic_moe.model.sampling.adjusting import adjust
from elastic_moe.model.sampling.devices import parts, to_device
from elastic_moe.model.sampling.drawing import method_of
from elastic_moe.model.sampling.greedy import NO_TOKEN, all_most_likely
from elastic_moe.model.sampling.log_probabilities import entry, logprobs
from elastic_moe.model.sampling.state import SamplingState

BLOCKED = -2
"""Stands for a token if a row's grammar and its other settings together allow none."""


def sample(logits_BV: Tensor, states: Sequence[SamplingState]) -> list[tuple[int, TokenLogprobs | None]]:
    """Choose the next token of each row, with its log probabilities if the request wants them. Changes no state.

    logits_BV: [B, V] of any float dtype and device; the arithmetic is in float32. It waits for the device once.
    A row with a logit that is NaN or infinity, or with no logit above minus infinity, gets NO_TOKEN. A row whose mask
    leaves no token that its other settings allow gets BLOCKED.
    """
    assert logits_BV.shape[0] == len(states), (logits_BV.shape, len(states))
    if not states:
        return []
    most_likely = all_most_likely(logits_BV, states)
    if most_likely is not None:
        return [(token, None) for token in most_likely]
    # the largest logit is NaN if any logit is
    numbers_B = logits_BV.amax(dim=-1).isfinite()
    if logits_BV.device.type == "cpu" and not numbers_B.all():
        # the code below turns these numbers into indices, which must be valid
        logits_BV = logits_BV.masked_fill(~numbers_B[:, None], 0.0)
    tokens_B = torch.empty(len(states), dtype=torch.int64, device=logits_BV.device)
    plain = [row for row, state in enumerate(states) if not state.adjusted]
    changed = [row for row, state in enumerate(states) if state.adjusted]
    _choose(logits_BV, plain, plain, states, tokens_B)
    if changed:
        adjusted_RV, blocked_R = adjust(logits_BV, changed, states)
        _choose(adjusted_RV, range(len(changed)), changed, states, tokens_B)
        if blocked_R is not None:
            at = to_device(np.array(changed, dtype=np.int64), logits_BV.device)
            tokens_B[at] = tokens_B[at].masked_fill(blocked_R, BLOCKED)
    tables = logprobs(logits_BV, tokens_B, states)
    return _fetch(tokens_B.masked_fill(~numbers_B, NO_TOKEN), tables)


def _choose(
    logits_XV: Tensor, lines: Sequence[int], rows: Sequence[int], states: Sequence[SamplingState], tokens_B: Tensor
) -> None:
    """Choose the tokens of `rows`, whose logits are the `lines` of `logits_XV`, and write them to `tokens_B`."""
    groups: dict[Callable[..., Tensor], list[int]] = {}
    for number, row in enumerate(rows):
        groups.setdefault(method_of(states[row], logits_XV), []).append(number)
    for method, members in groups.items():
        for part in parts(members, logits_XV):
            chosen = [rows[number] for number in part]
            logits_RV = logits_XV
            if len(part) < len(logits_XV):
                logits_RV = logits_XV[to_device(np.array([lines[n] for n in part], dtype=np.int64), logits_XV.device)]
            # the most likely token is found in float32 too, since bfloat16 has no fast argmax on CPU
            tokens_R = method(logits_RV.float(), [states[row] for row in chosen])
            if len(chosen) == len(states):
                tokens_B.copy_(tokens_R)
            else:
                tokens_B[to_device(np.array(chosen, dtype=np.int64), logits_XV.device)] = tokens_R


def _fetch(tokens_B: Tensor, tables: Sequence[tuple[list[int], Tensor]]) -> list[tuple[int, TokenLogprobs | None]]:
    """Copy all results to the CPU in one transfer. Token ids are exact in float64."""
    numbers = torch.cat([tokens_B.double(), *(table.flatten() for _, table in tables)]).tolist()
    found: list[TokenLogprobs | None] = [None] * len(tokens_B)
    begin = len(tokens_B)
    for rows, table in tables:
        width = table.shape[1]
        for row in rows:
            found[row] = entry(numbers[begin : begin + width])
            begin += width
    chosen = zip(map(int, numbers), found, strict=False)
    return [(token, None if token < 0 else entry) for token, entry in chosen]
