"""Changes logits at single tokens before the temperature: bias, forbidden tokens, penalties and forced tokens.

Legend: B rows (sequences), R those of them that something changes, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from elastic_moe.model.grammars.progress import Mask
from elastic_moe.model.sampling.devices import to_device
from elastic_moe.model.sampling.state import SamplingState


def adjust(logits_BV: Tensor, rows: Sequence[int], states: Sequence[SamplingState]) -> tuple[Tensor, Tensor | None]:
    """Apply bias, forbidden tokens and penalties to some rows: [R, V] in float32, and which of them have no token left
    ([R], bool; None if no row has a mask)."""
    own = [states[row] for row in rows]
    if len(rows) == len(states):
        adjusted_RV = logits_BV.to(torch.float32, copy=True)
    else:
        adjusted_RV = logits_BV[to_device(np.array(rows, dtype=np.int64), logits_BV.device)].float()
    bias = [(row, *state.bias) for row, state in enumerate(own) if state.bias is not None]
    if bias:
        at, values = _entries(bias, adjusted_RV)
        adjusted_RV[at] += values[0]
    limited = [(row, state.allowed, state.allowed) for row, state in enumerate(own) if state.allowed is not None]
    if limited:
        _keep_only(limited, adjusted_RV)
    grammars = [(row, state.mask) for row, state in enumerate(own) if state.mask is not None]
    if grammars:
        _keep_masked(grammars, adjusted_RV)
    masked = [
        (row, banned, banned) for row, state in enumerate(own) if state.masked and (banned := state.banned()).size
    ]
    if masked:
        at, _ = _entries(masked, adjusted_RV)
        adjusted_RV[at] = -torch.inf
    blocked_R = adjusted_RV.amax(dim=-1) == -torch.inf if grammars else None
    penalised = [(row, *_penalties(state)) for row, state in enumerate(own) if state.counts is not None]
    if penalised:
        at, (repetition, subtract) = _entries(penalised, adjusted_RV)
        seen = adjusted_RV[at]
        seen = torch.where(seen > 0, seen / repetition, seen * repetition)
        adjusted_RV[at] = seen - subtract
    forced = [(row, token) for row, state in enumerate(own) if (token := state.forced()) is not None]
    if forced:
        _force(forced, adjusted_RV)
        if blocked_R is not None:
            blocked_R[[row for row, _ in forced]] = False
    return adjusted_RV, blocked_R


def _force(forced: Sequence[tuple[int, int]], logits_RV: Tensor) -> None:
    """Make one token the only possible one of each of these rows, whatever forbids it, in place."""
    rows, tokens = to_device(np.array(forced, dtype=np.int64).T.copy(), logits_RV.device)
    logits_RV.index_fill_(0, rows, -torch.inf)
    logits_RV[rows, tokens] = 0.0


def _keep_masked(masks: Sequence[tuple[int, Mask]], logits_RV: Tensor) -> None:
    """Make every token that a row's mask does not allow impossible, in place."""
    width = logits_RV.shape[1]
    if logits_RV.device.type == "cpu":
        for row, mask in masks:
            forbidden_V = np.unpackbits(mask, count=width, bitorder="little") == 0
            logits_RV[row].masked_fill_(torch.from_numpy(forbidden_V), -torch.inf)
        return
    # a bit for each token is an eighth of what would be copied otherwise
    bits_GX = to_device(np.stack([mask[: -(-width // 8)] for _, mask in masks]), logits_RV.device)
    rows = to_device(np.array([row for row, _ in masks], dtype=np.int64), logits_RV.device)
    logits_RV[rows] = logits_RV[rows].masked_fill(~_unpacked(bits_GX)[:, :width], -torch.inf)


def _unpacked(bits_GX: Tensor) -> Tensor:
    """[G, 8 X] bool: the bits of bytes, lowest first."""
    places = torch.arange(8, dtype=torch.uint8, device=bits_GX.device)
    return ((bits_GX[:, :, None] >> places) & 1).flatten(1).bool()


def _keep_only(allowed: Sequence[tuple[int, np.ndarray, np.ndarray]], logits_BV: Tensor) -> None:
    """Make every token but the allowed ones impossible in these rows, in place."""
    at, _ = _entries(allowed, logits_BV)
    kept = logits_BV[at]
    rows = to_device(np.array([row for row, *_ in allowed], dtype=np.int64), logits_BV.device)
    logits_BV.index_fill_(0, rows, -torch.inf)
    logits_BV[at] = kept


def _penalties(state: SamplingState) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The distinct tokens of a sequence, the factors for their logits, and the numbers to subtract afterwards."""
    params, counts = state.params, state.counts
    assert counts is not None
    ids, in_prompt, output = counts.table()
    present = output > 0
    repetition = np.where(in_prompt | present, params.repetition_penalty, 1.0)
    subtract = params.frequency_penalty * output + params.presence_penalty * present
    return ids, repetition, subtract


def _entries(
    rows: Sequence[tuple[int, np.ndarray, *tuple[np.ndarray, ...]]], like_BV: Tensor
) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Copy the index of all (row, token) pairs and their values [columns, pairs] to the device, in one transfer each.

    Tokens outside the vocabulary are left out: an index error would fail the step of every request.
    """
    ids = np.concatenate([row[1] for row in rows])
    index = np.stack([np.repeat([row[0] for row in rows], [len(row[1]) for row in rows]), ids])
    values = np.stack([np.concatenate(column) for column in zip(*(row[2:] for row in rows), strict=True)])
    inside = (ids >= 0) & (ids < like_BV.shape[1])
    if not inside.all():
        index, values = index[:, inside], values[:, inside]
    row_index, token_index = to_device(index, like_BV.device)
    return (row_index, token_index), to_device(values.astype(np.float32), like_BV.device)
