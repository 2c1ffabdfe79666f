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

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future

import numpy as np
import torch
from torch import Tensor

from elastic_moe.cluster.messages.requests import SamplingParams, TokenLogprobs
from elastic_moe.cluster.messages.steps import NewSequence
from elastic_moe.model.grammars.compiling import Compiled
from elastic_moe.model.grammars.progress import Mask, Progress
from elastic_moe.model.worker.thinking import Thinking
from elastic_moe.model.worker.token_counts import TokenCounts

GREEDY_BELOW = 1e-5
"""A temperature below this number means greedy sampling, as in vLLM."""

_UNIT = float(2**40)
"""Weight of the most likely token. The sum over any vocabulary stays far below 2**63."""

_CPU_ELEMENTS = 1 << 17
"""Numbers (rows x vocabulary) that are computed at a time on CPU. Larger temporaries cost page faults: 3 times slower.
"""

_TOP_K_FEW = 1024
"""The largest top_k for which a row's other tokens are left out early, on CPU."""

_TOP_P_GUESS = 512
"""The number of most likely tokens that top_p looks at before it looks at the whole row, on CPU."""

_BIN_SHIFT = 17
"""A float32's bits shifted right by this number are the bin of a mass: the exponent and 6 bits of the fraction."""

_MASK = (1 << 64) - 1

NO_TOKEN = -1
"""Stands for a token if the row's logits are not numbers, so that no token can be sampled."""

BLOCKED = -2
"""Stands for a token if a row's grammar and its other settings together allow none."""

LEAST_LOGPROB = -9999.0
"""The log probability that is reported for impossible tokens, as by OpenAI's server: JSON has no minus infinity."""


class SamplingState:
    """One sequence's tokens, and what sampling needs of them. It belongs to one worker and is not thread-safe."""

    __slots__ = (
        "_allowed",
        "_bias",
        "_counts",
        "_eos",
        "_stops",
        "greedy",
        "mask",
        "num_prompt_tokens",
        "params",
        "progress",
        "thinking",
        "token_ids",
    )

    def __init__(self, sequence: NewSequence, compiled: Future[Compiled] | None = None) -> None:
        """`compiled` is of the sequence's grammar, if it has one; it may be under way."""
        params = sequence.params
        self.params = params
        self.num_prompt_tokens = sequence.num_prompt_tokens
        self.token_ids = list(sequence.token_ids)
        """The prompt's tokens, then the output's."""
        self.greedy = params.temperature < GREEDY_BELOW
        self._bias = _columns(params.logit_bias) if params.logit_bias else None
        self._eos = frozenset(sequence.eos_token_ids)
        self._stops = self._eos.union(params.stop_token_ids)
        """Tokens that may not come before `min_tokens` tokens of output."""
        allowed = params.allowed_token_ids
        self._allowed = None if allowed is None else np.unique(np.array(allowed, dtype=np.int64))
        self._counts: TokenCounts | None = None
        if params.presence_penalty or params.frequency_penalty or params.repetition_penalty != 1.0:
            self._counts = TokenCounts(self.token_ids, self.num_prompt_tokens)
        self.thinking = None if params.thinking is None else Thinking(params.thinking, self.num_prompt_tokens)
        self.progress: Progress | None = None
        """The place in the grammar, if the sequence has one."""
        if compiled is not None:
            self.progress = Progress(
                compiled, self.token_ids, self.num_prompt_tokens, params, eos_token_ids=sequence.eos_token_ids
            )
        self.mask: Mask | None = None
        """The tokens that the grammar allows next; None allows all. Whoever calls `sample` sets it."""

    @property
    def num_output(self) -> int:
        """Output tokens so far, which is the index of the next one."""
        return len(self.token_ids) - self.num_prompt_tokens

    def append(self, token: int, *, spoilt: bool = False) -> None:
        """Add an output token. `spoilt`: it only stands for one that could not be sampled."""
        self.token_ids.append(token)
        if self._counts is not None:
            self._counts.add(token)
        if self.progress is not None:
            self.progress.grown(spoilt=spoilt)

    def truncate(self, num_tokens: int) -> None:
        """Remove every token past the first `num_tokens`, since their step runs again. A prompt cannot be cut."""
        if num_tokens >= len(self.token_ids):
            return
        assert num_tokens >= self.num_prompt_tokens, "a prompt is never cut"
        if self._counts is not None:
            for token in self.token_ids[num_tokens:]:
                self._counts.remove(token)
        del self.token_ids[num_tokens:]
        if self.progress is not None:
            self.progress.cut()

    def forced(self) -> int | None:
        """The token that must come next, since the reasoning has used up its tokens; None where there is none."""
        return None if self.thinking is None else self.thinking.forced(self.token_ids)

    @property
    def _adjusted(self) -> bool:
        return (
            self._bias is not None
            or self._counts is not None
            or self._allowed is not None
            or self.mask is not None
            or self.thinking is not None
            or self._masked
        )

    @property
    def _masked(self) -> bool:
        """Whether bad_words or min_tokens may forbid tokens at the next position."""
        return bool(self.params.bad_words) or bool(self._too_early)

    @property
    def _too_early(self) -> frozenset[int]:
        """The tokens that would end the answer too early. Where the grammar has begun, its mask leaves them out."""
        if self.progress is not None and self.progress.begun:
            return frozenset()
        if self.num_output < self.params.min_tokens:
            return self._stops
        return frozenset() if self.progress is None else self._eos

    def _banned(self) -> np.ndarray:
        """The tokens that bad_words and min_tokens forbid at the next position."""
        banned = set(self._too_early)
        for *before, last in self.params.bad_words:
            if len(before) <= self.num_output and self.token_ids[len(self.token_ids) - len(before) :] == before:
                banned.add(last)
        return np.array(sorted(banned), dtype=np.int64)


def sample(logits_BV: Tensor, states: Sequence[SamplingState]) -> list[tuple[int, TokenLogprobs | None]]:
    """Choose the next token of each row, with its log probabilities if the request wants them. Changes no state.

    logits_BV: [B, V] of any float dtype and device; the arithmetic is in float32. It waits for the device once.
    A row with a logit that is NaN or infinity, or with no logit above minus infinity, gets NO_TOKEN. A row whose mask
    leaves no token that its other settings allow gets BLOCKED.
    """
    assert logits_BV.shape[0] == len(states), (logits_BV.shape, len(states))
    if not states:
        return []
    # the largest logit is NaN if any logit is
    numbers_B = logits_BV.amax(dim=-1).isfinite()
    if logits_BV.device.type == "cpu" and not numbers_B.all():
        # the code below turns these numbers into indices, which must be valid
        logits_BV = logits_BV.masked_fill(~numbers_B[:, None], 0.0)
    tokens_B = torch.empty(len(states), dtype=torch.int64, device=logits_BV.device)
    plain = [row for row, state in enumerate(states) if not state._adjusted]
    changed = [row for row, state in enumerate(states) if state._adjusted]
    _choose(logits_BV, plain, plain, states, tokens_B)
    if changed:
        adjusted_RV, blocked_R = _adjust(logits_BV, changed, states)
        _choose(adjusted_RV, range(len(changed)), changed, states, tokens_B)
        if blocked_R is not None:
            at = _to(np.array(changed, dtype=np.int64), logits_BV.device)
            tokens_B[at] = tokens_B[at].masked_fill(blocked_R, BLOCKED)
    tables = _logprobs(logits_BV, tokens_B, states)
    return _fetch(tokens_B.masked_fill(~numbers_B, NO_TOKEN), tables)


def _choose(
    logits_XV: Tensor, lines: Sequence[int], rows: Sequence[int], states: Sequence[SamplingState], tokens_B: Tensor
) -> None:
    """Choose the tokens of `rows`, whose logits are the `lines` of `logits_XV`, and write them to `tokens_B`."""
    groups: dict[Callable[..., Tensor], list[int]] = {}
    for number, row in enumerate(rows):
        groups.setdefault(_method(states[row], logits_XV), []).append(number)
    for method, members in groups.items():
        for part in _parts(members, logits_XV):
            chosen = [rows[number] for number in part]
            at = _to(np.array([lines[number] for number in part], dtype=np.int64), logits_XV.device)
            logits_RV = logits_XV if len(part) == len(logits_XV) else logits_XV[at]
            # the most likely token is found in float32 too, since bfloat16 has no fast argmax on CPU
            tokens_R = method(logits_RV.float(), [states[row] for row in chosen])
            tokens_B[_to(np.array(chosen, dtype=np.int64), logits_XV.device)] = tokens_R


def _fetch(tokens_B: Tensor, tables: Sequence[tuple[list[int], Tensor]]) -> list[tuple[int, TokenLogprobs | None]]:
    """Copy all results to the CPU in one transfer. Token ids are exact in float64."""
    numbers = torch.cat([tokens_B.double(), *(table.flatten() for _, table in tables)]).tolist()
    found: list[TokenLogprobs | None] = [None] * len(tokens_B)
    begin = len(tokens_B)
    for rows, table in tables:
        width = table.shape[1]
        for row in rows:
            found[row] = _entry(numbers[begin : begin + width])
            begin += width
    chosen = zip(map(int, numbers), found, strict=False)
    return [(token, None if token < 0 else entry) for token, entry in chosen]


def uniform(seed: int, index: int) -> float:
    """A number in [0, 1) with 53 random bits, the same everywhere for equal arguments (SplitMix64, two rounds)."""
    return (_mix(_mix(seed & _MASK) + index * 0x9E3779B97F4A7C15) >> 11) * 2.0**-53


def _mix(x: int) -> int:
    x = (x + 0x9E3779B97F4A7C15) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


# --- Before temperature: changes at single tokens ---------------------------------------------------------------


def _adjust(logits_BV: Tensor, rows: Sequence[int], states: Sequence[SamplingState]) -> tuple[Tensor, Tensor | None]:
    """Apply bias, forbidden tokens and penalties to some rows: [R, V] in float32, and which of them have no token left
    ([R], bool; None if no row has a mask)."""
    own = [states[row] for row in rows]
    if len(rows) == len(states):
        adjusted_RV = logits_BV.to(torch.float32, copy=True)
    else:
        adjusted_RV = logits_BV[_to(np.array(rows, dtype=np.int64), logits_BV.device)].float()
    bias = [(row, *state._bias) for row, state in enumerate(own) if state._bias is not None]
    if bias:
        at, values = _entries(bias, adjusted_RV)
        adjusted_RV[at] += values[0]
    limited = [(row, state._allowed, state._allowed) for row, state in enumerate(own) if state._allowed is not None]
    if limited:
        _keep_only(limited, adjusted_RV)
    grammars = [(row, state.mask) for row, state in enumerate(own) if state.mask is not None]
    if grammars:
        _keep_masked(grammars, adjusted_RV)
    masked = [
        (row, banned, banned) for row, state in enumerate(own) if state._masked and (banned := state._banned()).size
    ]
    if masked:
        at, _ = _entries(masked, adjusted_RV)
        adjusted_RV[at] = -torch.inf
    blocked_R = adjusted_RV.amax(dim=-1) == -torch.inf if grammars else None
    penalised = [(row, *_penalties(state)) for row, state in enumerate(own) if state._counts is not None]
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
    rows, tokens = _to(np.array(forced, dtype=np.int64).T.copy(), logits_RV.device)
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
    bits_GX = _to(np.stack([mask[: -(-width // 8)] for _, mask in masks]), logits_RV.device)
    rows = _to(np.array([row for row, _ in masks], dtype=np.int64), logits_RV.device)
    logits_RV[rows] = logits_RV[rows].masked_fill(~_unpacked(bits_GX)[:, :width], -torch.inf)


def _unpacked(bits_GX: Tensor) -> Tensor:
    """[G, 8 X] bool: the bits of bytes, lowest first."""
    places = torch.arange(8, dtype=torch.uint8, device=bits_GX.device)
    return ((bits_GX[:, :, None] >> places) & 1).flatten(1).bool()


def _keep_only(allowed: Sequence[tuple[int, np.ndarray, np.ndarray]], logits_BV: Tensor) -> None:
    """Make every token but the allowed ones impossible in these rows, in place."""
    at, _ = _entries(allowed, logits_BV)
    kept = logits_BV[at]
    rows = _to(np.array([row for row, *_ in allowed], dtype=np.int64), logits_BV.device)
    logits_BV.index_fill_(0, rows, -torch.inf)
    logits_BV[at] = kept


def _penalties(state: SamplingState) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The distinct tokens of a sequence, the factors for their logits, and the numbers to subtract afterwards."""
    params, counts = state.params, state._counts
    assert counts is not None
    ids, in_prompt, output = counts.table()
    present = output > 0
    repetition = np.where(in_prompt | present, params.repetition_penalty, 1.0)
    subtract = params.frequency_penalty * output + params.presence_penalty * present
    return ids, repetition, subtract


def _columns(pairs: tuple[tuple[int, float], ...]) -> tuple[np.ndarray, np.ndarray]:
    """The distinct tokens and their values. If a token comes twice, its last value counts."""
    distinct = dict(pairs)
    return np.array(list(distinct), dtype=np.int64), np.array(list(distinct.values()), dtype=np.float64)


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
    row_index, token_index = _to(index, like_BV.device)
    return (row_index, token_index), _to(values.astype(np.float32), like_BV.device)


# --- Random rows ------------------------------------------------------------------------------------------------


def _method(state: SamplingState, logits_BV: Tensor) -> Callable[..., Tensor]:
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


def _parts(rows: list[int], logits_BV: Tensor) -> Iterator[list[int]]:
    size = len(rows)
    if logits_BV.device.type == "cpu":
        size = max(1, _CPU_ELEMENTS // logits_BV.shape[1])
    for start in range(0, len(rows), size):
        yield rows[start : start + size]


def _draw(logits_RV: Tensor, states: list[SamplingState]) -> Tensor:
    """Draw tokens [R] by inverting the cumulative distribution in token order."""
    params = [state.params for state in states]
    draws = [uniform(state.params.seed, state.num_output) for state in states]
    settings = np.array([[p.temperature for p in params], draws, [p.min_p for p in params], [p.top_p for p in params]])
    temperature, u, min_p, top_p = _to(settings, logits_RV.device)[:, :, None]  # each [R, 1], float64
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
    k_R1 = _to(np.array(ks, dtype=np.int64), logits_RV.device)[:, None]
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


# --- Log probabilities ------------------------------------------------------------------------------------------


def _logprobs(logits_BV: Tensor, tokens_B: Tensor, states: Sequence[SamplingState]) -> list[tuple[list[int], Tensor]]:
    """The rows that want the model's log probabilities, in parts. Each part has a table with a line per row."""
    groups: dict[tuple[int, tuple[int, ...]], list[int]] = {}
    for row, state in enumerate(states):
        if state.params.logprobs is not None:
            groups.setdefault((state.params.logprobs, state.params.logprob_token_ids), []).append(row)
    found: list[tuple[list[int], Tensor]] = []
    # rows with one number of alternatives at a time: which of equal tokens topk returns may depend on that number
    for (number, named), rows in groups.items():
        for part in _parts(rows, logits_BV):
            index = _to(np.array(part, dtype=np.int64), logits_BV.device)
            found.append((part, _logprobs_of(logits_BV[index], tokens_B[index], number, named)))
    return found


def _logprobs_of(logits_RV: Tensor, tokens_R: Tensor, number: int, named: Sequence[int]) -> Tensor:
    """[R, 2 (1 + A)] the ids of the chosen token and of A others, then their log probabilities (float64).

    The others are the tokens `named`, or else the `number` most likely ones.
    """
    # CUDA adds up a row in an order that depends on its place in memory; rounding from float64 hides the difference
    dtype = torch.float32 if logits_RV.device.type == "cpu" else torch.float64
    logprobs_RV = logits_RV.float().log_softmax(dim=-1, dtype=dtype).float().clamp_(min=LEAST_LOGPROB)
    if named:
        ids = _to(np.array(named, dtype=np.int64), logits_RV.device).expand(len(tokens_R), -1)
        values = logprobs_RV.gather(1, ids)
    else:
        values, ids = logprobs_RV.topk(min(number, logits_RV.shape[1]), dim=-1)
    chosen = tokens_R[:, None]
    return torch.cat([part.double() for part in (chosen, ids, logprobs_RV.gather(1, chosen), values)], dim=1)


def _entry(line: Sequence[float]) -> TokenLogprobs:
    """Read a line of the table of `_logprobs_of`."""
    half = len(line) // 2
    return TokenLogprobs(
        token_id=int(line[0]),
        logprob=line[half],
        top=tuple((int(token), value) for token, value in zip(line[1:half], line[half + 1 :], strict=True)),
    )


def _to(array: np.ndarray, device: torch.device) -> Tensor:
    # a blocking copy would wait for the model's kernels; torch copies the array before this returns
    return torch.from_numpy(array).to(device, non_blocking=True)
