"""Chooses a row's token from its logits: the most likely one, or one drawn at random.

Random numbers are a hash of (seed, output index), and probabilities are summed as integers, whose sum does not depend
on the order. So a row's token is the same in any batch.

Legend: R rows (sequences), V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from elastic_moe.cluster.messages.requests import SamplingParams
from elastic_moe.model.sampling.devices import to_device
from elastic_moe.model.sampling.state import SamplingState

_UNIT = float(2**40)
"""Weight of the most likely token. The sum over any vocabulary stays far below 2**63."""

_TOP_K_FEW = 1024
"""The largest top_k for which a row's other tokens are left out early, on CPU."""

_TOP_P_GUESS = 512
"""The number of most likely tokens that top_p looks at before it looks at the whole row, on CPU."""

_BIN_SHIFT = 17
"""A float32's bits shifted right by this number are the bin of a mass: the exponent and 6 bits of the fraction."""

_MASK = (1 << 64) - 1


def uniform(seed: int, index: int) -> float:
    """A number in [0, 1) with 53 random bits, the same everywhere for equal arguments (SplitMix64, two rounds)."""
    return (_mix(_mix(seed & _MASK) + index * 0x9E3779B97F4A7C15) >> 11) * 2.0**-53


def _mix(x: int) -> int:
    x = (x + 0x9E3779B97F4A7C15) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


def method_of(state: SamplingState, logits_BV: Tensor) -> Callable[..., Tensor]:
    """The function that chooses a row's token. It depends on the row alone."""
    if state.greedy:
        return _most_likely
    # a top_k as large as the vocabulary limits nothing
    if logits_BV.device.type == "cpu" and 0 < state.params.top_k < min(_TOP_K_FEW + 1, logits_BV.shape[1]):
        return _draw_of_few
    return _draw


def _most_likely(logits_RV: Tensor, states: list[SamplingState]) -> Tensor:
    return logits_RV.argmax(dim=-1)


def _draw_of_few(logits_RV: Tensor, states: list[SamplingState]) -> Tensor:
    """Call `_draw` for the top_k tokens alone, in token order. The other tokens are nearly all, and cannot be drawn."""
    kept_RV = logits_RV >= _top_k_threshold(logits_RV, [state.params for state in states])
    counts = kept_RV.sum(dim=-1)
    row, token = kept_RV.nonzero(as_tuple=True)
    column = torch.arange(len(row)) - (counts.cumsum(0) - counts)[row]
    shape = len(states), int(counts.max())
    tokens_RC = torch.zeros(shape, dtype=torch.int64)
    tokens_RC[row, column] = token
    logits_RC = torch.full(shape, -torch.inf)
    logits_RC[row, column] = logits_RV[row, token]
    return tokens_RC.gather(1, _draw(logits_RC, states)[:, None])[:, 0]


def _draw(logits_RV: Tensor, states: list[SamplingState]) -> Tensor:
    """Draw tokens [R] by inverting the cumulative distribution in token order."""
    params = [state.params for state in states]
    draws = [uniform(state.params.seed, state.num_output) for state in states]
    settings = np.array([[p.temperature for p in params], draws, [p.min_p for p in params], [p.top_p for p in params]])
    temperature, u, min_p, top_p = to_device(settings, logits_RV.device)[:, :, None]  # each [R, 1], float64
    best, best_token = logits_RV.max(dim=-1, keepdim=True)
    # the largest logit is subtracted before the division, so that no temperature turns finite logits into infinities
    weight_RV = (logits_RV - best).div_(temperature.float()).exp_()
    if any(p.min_p > 0 for p in params):
        weight_RV.masked_fill_(weight_RV < min_p, 0.0)
    if any(0 < p.top_k < logits_RV.shape[1] for p in params):
        weight_RV.masked_fill_(logits_RV < _top_k_threshold(logits_RV, params), 0.0)
    mass_RV = weight_RV.mul_(_UNIT).to(torch.int64)
    if any(p.top_p < 1 for p in params):
        mass_RV.masked_fill_(mass_RV < _top_p_threshold(mass_RV, top_p), 0)
    cumulative_RV = mass_RV.cumsum(dim=-1)
    total = cumulative_RV[:, -1:]
    target = (u * total).to(torch.int64).minimum(total - 1)
    token = torch.searchsorted(cumulative_RV, target, right=True)
    # penalties can turn finite logits into infinities; then nothing can be drawn, and any valid token is right
    drawn = best.isfinite() & (total > 0) & (token < logits_RV.shape[1])
    return torch.where(drawn, token, best_token)[:, 0]


def _top_k_threshold(logits_RV: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """[R, 1] the k-th largest logit, or -inf without a limit. All tokens that equal it are kept, as in vLLM."""
    vocabulary = logits_RV.shape[1]
    ks = [p.top_k if 0 < p.top_k < vocabulary else 0 for p in params]
    largest = logits_RV.topk(max(ks), dim=-1).values
    k_R1 = to_device(np.array(ks, dtype=np.int64), logits_RV.device)[:, None]
    return largest.gather(1, (k_R1 - 1).clamp(min=0)).masked_fill(k_R1 == 0, -torch.inf)


def _top_p_threshold(mass_RV: Tensor, top_p: Tensor) -> Tensor:
    """[R, 1] the least mass in the smallest set of most likely tokens whose masses reach top_p of the whole.

    Comparing by mass rather than by sorted position makes ties independent of the sorting algorithm.
    """
    unlimited = top_p >= 1
    goal = (top_p * mass_RV.sum(dim=-1, keepdim=True)).masked_fill_(unlimited, 0.0)
    if mass_RV.device.type != "cpu" or mass_RV.shape[1] <= _TOP_P_GUESS:
        threshold = _threshold(mass_RV.sort(dim=-1, descending=True).values, goal)
    else:
        largest = mass_RV.topk(_TOP_P_GUESS, dim=-1).values
        threshold = _threshold(largest, goal)
        # some distributions are so flat that the most likely tokens do not reach top_p
        for row in torch.nonzero(largest.sum(dim=-1) < goal[:, 0])[:, 0].tolist():
            threshold[row] = _threshold_by_bins(mass_RV[row], goal[row])
    return threshold.masked_fill_(unlimited, 0)


def _threshold_by_bins(mass_V: Tensor, goal: Tensor) -> Tensor:
    """[1] the threshold of a whole row. It sorts only the masses that lie in the threshold's bin."""
    bin_V = (mass_V.float().view(torch.int32) >> _BIN_SHIFT).long()
    total = torch.zeros(int(bin_V.max()) + 1, dtype=torch.int64).scatter_add_(0, bin_V, mass_V)
    from_here_up = total.flip(0).cumsum(0).flip(0)
    # the highest bin that reaches the goal together with all bins above it, or the lowest bin
    at = int((from_here_up >= goal).sum().clamp(min=1)) - 1
    above = from_here_up[at] - total[at]
    inside = mass_V[bin_V == at].sort(descending=True).values
    return _threshold(inside[None], goal - above)[0]


def _threshold(descending_RK: Tensor, goal: Tensor) -> Tensor:
    before_RK = descending_RK.cumsum(dim=-1) - descending_RK
    kept = (before_RK < goal).sum(dim=-1, keepdim=True)
    return descending_RK.gather(1, (kept - 1).clamp(min=0))
