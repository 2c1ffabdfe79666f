"""Generates traces of any size, whose routing has the statistics of real models.

Generated traces keep what real traces show: tasks load experts unevenly, each in its own way; a token's experts come
from few themes (co-activation); themes persist from layer to layer (mutual information of adjacent layers); requests
differ in their mix of themes.

The model: every layer has themes, distributions over experts (Dirichlet, few heavy ones). A request has a mix of
themes (Dirichlet); a token draws two themes from it and keeps them through the layers with probability `persistence`
each. Its experts are the top-k of the themes' log-probabilities plus Gumbel noise, which draws without replacement.
"""

from __future__ import annotations

import numpy as np

from elastic_moe.optimizer.study.traces import Trace

THEME_SPREAD = 0.03
"""Dirichlet parameter of a theme over experts: the smaller it is, the fewer experts a theme uses."""

WEIGHTS = (0.8, 0.2)
"""Weights of a token's first and second theme."""

REQUEST_SPREAD = 0.3
"""Dirichlet parameter of a request over themes."""


def generate_trace(
    *,
    num_layers: int,
    num_experts: int,
    top_k: int,
    num_tokens: int,
    tokens_per_request: int = 128,
    num_themes: int = 48,
    persistence: float = 0.95,
    model_seed: int = 0,
    task_seed: int = 0,
) -> Trace:
    """A trace of `num_tokens` tokens. `model_seed` sets the experts of the themes, `task_seed` the themes of the
    task."""
    model = np.random.default_rng(model_seed)
    themes = model.dirichlet(np.full(num_experts, THEME_SPREAD), size=(num_layers, num_themes)) + 1e-4
    task = np.random.default_rng([model_seed, task_seed])
    interest = task.dirichlet(np.full(num_themes, 2.0 * REQUEST_SPREAD)) + 0.1 / num_themes
    requests = -(-num_tokens // tokens_per_request)
    lengths = np.full(requests, tokens_per_request)
    lengths[-1] -= requests * tokens_per_request - num_tokens
    mixes = task.dirichlet(REQUEST_SPREAD * num_themes * interest / interest.sum() + 1e-3, size=requests)
    mix = np.repeat(mixes, lengths, axis=0)
    ids = np.empty((num_tokens, num_layers, top_k), dtype=np.int16)
    chosen = _draw_themes(mix, task)
    for layer in range(num_layers):
        leave = task.random(chosen.shape) > persistence
        chosen = np.where(leave, _draw_themes(mix, task), chosen)
        score = np.log(np.tensordot(themes[layer][chosen], WEIGHTS, axes=(1, 0))).astype(np.float32)
        score += task.gumbel(size=score.shape).astype(np.float32)
        ids[:, layer] = np.argpartition(-score, top_k - 1, axis=1)[:, :top_k]
    return Trace(topk_ids=ids, request_lengths=lengths, num_experts=num_experts)


def _draw_themes(mix: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """[T, 2] two themes of each token, from its request's mix [T, themes]."""
    edges = np.cumsum(mix, axis=1)[:, None, :]
    return np.asarray((rng.random((len(mix), 2, 1)) > edges).sum(axis=2).clip(max=mix.shape[1] - 1))
