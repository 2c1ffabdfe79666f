"""Recognises routers that choose by scores and a bias, in groups or not, as DeepSeek-V3, GLM and MiniMax-M2 have them.

Numbers of groups, scale and bias are looked for among the module's own numbers and vectors. A trial on random rows
tells which of them make the module's choices and scores. Ties are no part of the trial: choices whose values are as
large as those of the module's choices are taken for equal.

Legend: T rows, E experts, K choices.
"""

from __future__ import annotations

import ctypes
import inspect
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from elastic_moe.cluster.expert_forms import ExpertForm
from elastic_moe.model.fitting.halves import matrix_of, norm_of
from elastic_moe.model.native.linear import Packed
from elastic_moe.model.native.router import NormedRouter, ScoredRouter, Scoring

_ROWS = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class _Trial:
    """What a module returned for random rows, and the bias that its caller gave it."""

    rows: Tensor
    given: Tensor | None
    logits: Tensor
    scores: Tensor
    index: Tensor

    @property
    def wide(self) -> bool:
        """Whether logits are not those of a product that is rounded to bfloat16."""
        return not torch.equal(self.logits.float(), self.logits.bfloat16().float())


def find_scored_router(lib: ctypes.CDLL, module: nn.Module, packed: Packed, errors: tuple[type[Exception], ...]) -> Any:
    """A ScoredRouter that does what the module does; otherwise the reason why the module is not recognised.

    `errors` are those that the module may raise if it expects other arguments.
    """
    try:
        trial = _try(module, packed)
    except errors as error:
        return f"it takes other arguments than rows and a bias: a trial call failed with {type(error).__name__}"
    if isinstance(trial, str):
        return trial
    for scoring, bias in itertools.product(_scorings(module, packed.columns), _biases(module, packed, trial)):
        router = ScoredRouter(
            lib=lib,
            packed=packed,
            wide=trial.wide,
            logits_dtype=trial.logits.dtype,
            scoring=scoring,
            bias=bias,
            top_k=trial.index.shape[1],
            dtype=trial.scores.dtype,
        )
        scaled = _scaled(module, trial, router)
        if scaled is not None:
            return replace(router, scoring=scaled, bias=None if trial.given is not None else bias)
    return "no choice by scores, a bias and groups is the same as its own"


def find_normed_router(lib: ctypes.CDLL, module: nn.Module, errors: tuple[type[Exception], ...]) -> NormedRouter | None:
    """A NormedRouter that does what a module of a norm, a matrix and two vectors does; None if there is none."""
    children = list(module.children())
    vectors = [p.detach() for p in module.parameters(recurse=False)]
    matrix = next((own for child in children if (own := matrix_of(child)) is not None), None)
    if len(children) != 2 or len(vectors) != 2 or matrix is None or matrix.bias is not None:
        return None
    packed = matrix.packed
    norm = next((found for child in children if (found := norm_of(child, packed.depth)) is not None), None)
    if norm is None or packed.form is not ExpertForm.PLAIN:
        return None
    try:
        trial = _try(module, packed)
    except errors:
        return None
    if isinstance(trial, str):
        return None
    factors = sorted({1.0, *(float(v) for v in vars(module).values() if isinstance(v, float) and v > 0)})
    for (columns, scales), factor, normalises in itertools.product((vectors, vectors[::-1]), factors, (True, False)):
        if columns.shape != (packed.depth,) or scales.shape != (packed.columns,):
            continue
        router = ScoredRouter(
            lib=lib,
            packed=packed,
            wide=False,
            logits_dtype=torch.bfloat16,
            scoring=Scoring(logistic=False, normalises=normalises),
            top_k=trial.index.shape[1],
            dtype=torch.float32,
        )
        normed = NormedRouter(
            router=router,
            norm=norm,
            columns=columns.contiguous(),
            factor=factor,
            scales=scales.float().contiguous(),
        )
        if _same_choices(normed, trial):
            return normed
    return None


def _same_choices(router: NormedRouter, trial: _Trial) -> bool:
    """Whether a router chooses what the module of a trial chooses, and gives the choices the same scores.

    Of experts with equal probabilities, either may be chosen.
    """
    probabilities, scores, index = router(trial.rows)
    ours, theirs = (probabilities.gather(1, chosen).sort(-1).values for chosen in (index, trial.index))
    if not torch.equal(probabilities, trial.logits) or not torch.equal(ours, theirs):
        return False
    alike = (index.sort(-1).values == trial.index.sort(-1).values).all(-1)
    got, wanted = (
        values.gather(1, chosen.argsort(-1))[alike] for values, chosen in ((scores, index), (trial.scores, trial.index))
    )
    return bool(alike.any()) and torch.allclose(got, wanted, rtol=1e-4, atol=1e-6)


def _try(module: nn.Module, packed: Packed) -> _Trial | str:
    generator = torch.Generator().manual_seed(0)
    # where rows are small the bias alone decides, and where they are large scores are 0 or 1
    sizes = torch.logspace(-2, 0.5, _ROWS)[:, None]
    rows = (torch.randn(_ROWS, packed.depth, generator=generator) * sizes).bfloat16()
    wants = len(inspect.signature(module.forward).parameters)
    given = torch.randn(packed.columns, generator=generator) / 8 if wants == 2 else None
    out = module(rows) if given is None else module(rows, given)
    if not isinstance(out, tuple) or len(out) != 3 or not all(isinstance(part, Tensor) for part in out):
        return "it does not return logits, scores and choices"
    logits, scores, index = out
    fits = logits.shape == (_ROWS, packed.columns) and scores.shape == index.shape == (_ROWS, index.shape[-1])
    if not fits or index.dtype != torch.int64 or not 0 < index.shape[1] <= packed.columns:
        return "it does not return a score for each of a fixed number of choices"
    return _Trial(rows=rows, given=given, logits=logits, scores=scores, index=index)


def _scorings(module: nn.Module, experts: int) -> Iterator[Scoring]:
    """Ways to choose, from the plainest on."""
    own = {v for v in vars(module).values() if isinstance(v, int) and not isinstance(v, bool)}
    sizes = sorted(n for n in own if 0 < n < experts)
    groups = [(n, top) for n in sizes if experts % n == 0 for top in sizes if top < n]
    for logistic in (True, False):
        yield Scoring(logistic=logistic)
    for (count, top), best, logistic in itertools.product(groups, (2, 1), (True, False)):
        yield Scoring(logistic=logistic, groups=count, top_groups=top, best=best)


def _biases(module: nn.Module, packed: Packed, trial: _Trial) -> list[Tensor | None]:
    if trial.given is not None:
        return [trial.given]
    own = itertools.chain(module.named_parameters(recurse=False), module.named_buffers(recurse=False))
    return [*(v.detach().float().contiguous() for _, v in own if v.shape == (packed.columns,)), None]


def _scaled(module: nn.Module, trial: _Trial, router: ScoredRouter) -> Scoring | None:
    """The router's scoring with the module's scale, if it makes the same choices and scores."""
    logits, values, index = router(trial.rows)
    same = torch.allclose(logits.float(), trial.logits.float(), rtol=1e-4, atol=1e-4)
    if not (same if router.wide else torch.equal(logits, trial.logits)):
        return None
    scores_TE = logits.float().sigmoid() if router.scoring.logistic else logits.float().softmax(-1)
    ranks_TE = scores_TE if router.bias is None else scores_TE + router.bias
    ours, theirs = (ranks_TE.gather(1, chosen).sort(-1).values for chosen in (index, trial.index))
    if not torch.allclose(ours, theirs, rtol=0, atol=1e-5):
        return None
    alike = (index.sort(-1).values == trial.index.sort(-1).values).all(-1)
    if not alike.any():
        # all ties: the scores tell nothing
        return None
    got = values.gather(1, index.argsort(-1))[alike].float()
    wanted = trial.scores.gather(1, trial.index.argsort(-1))[alike].float()
    tolerance = 1e-3 if router.dtype == torch.float32 else 2**-7
    constants = {1.0, *(float(v) for v in vars(module).values() if isinstance(v, float) and v > 0)}
    for normalises, scale in itertools.product((True, False), sorted(constants)):
        made = (got / got.sum(-1, keepdim=True) if normalises else got) * scale
        if torch.allclose(made, wanted, rtol=tolerance, atol=1e-6):
            return replace(router.scoring, normalises=normalises, scale=scale)
    return None
