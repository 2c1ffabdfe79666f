"""Makes rotary embeddings that depend on a sequence's length right for steps that pack many sequences.

transformers picks the frequencies of `longrope` and of dynamic NTK scaling by the longest position in the call. In a
packed row, that position may belong to another sequence. So these modules are called once for each group of tokens that
share their frequencies. Tokens of a prompt use the prompt's length, and tokens of an answer use their own position, as
in transformers' generation with a cache. The same holds when a sequence is computed again.

Legend: T tokens of the step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

LONGROPE = "longrope"
"""Rotary embeddings with one set of frequencies up to a length, and another set beyond it."""
DYNAMIC = "dynamic"
"""Rotary embeddings with frequencies of their own for every length beyond the original one."""


def rotate_by_length(trunk: nn.Module, lengths_T: list[Tensor]) -> None:
    """Give every token of a packed step the rotary embedding of its own sequence's length, in place.

    `lengths_T` is a list of one tensor: the lengths [T] of the tokens of the present step. The caller sets it before
    each step.
    """
    for module in trunk.modules():
        if _kinds(module) & {LONGROPE, DYNAMIC}:
            module.forward = _by_length(module, module.forward, lengths_T)


def keep_frequencies(trunk: nn.Module, device: torch.device) -> None:
    """Make frequencies once for modules that make them anew in every step (PhiMoE's), on the CPU: a step on another
    device would wait for their copy, and a CUDA graph cannot hold it."""
    if device.type == "cpu":
        return
    for module in trunk.modules():
        make = getattr(module, "rope_init_fn", None)
        if callable(make):
            module.rope_init_fn = _kept(make, device)  # type: ignore[assignment]


def _kept(make: Callable[..., tuple[Tensor, float]], device: torch.device) -> Callable[..., tuple[Tensor, float]]:
    found: dict[tuple[Any, ...], tuple[Tensor, float]] = {}

    def made(config: Any, *args: Any, **kwargs: Any) -> tuple[Tensor, float]:
        # the configuration of a loaded model stays as it is
        key = (*args, *sorted(kwargs.items()))
        if key not in found:
            frequencies, scaling = make(config, *args, **kwargs)
            found[key] = frequencies.to(device), scaling
        return found[key]

    return made


def depends_on_length(trunk: nn.Module) -> bool:
    """Whether the trunk has rotary embeddings that depend on a sequence's length."""
    return any(_kinds(module) & {LONGROPE, DYNAMIC} for module in trunk.modules())


def growth_limit(model: nn.Module) -> int | None:
    """The length beyond which every length has frequencies of its own (dynamic NTK); None if the model has no such
    rule.

    It is read from the modules, since Hunyuan's configuration calls a fixed scaling "dynamic" too.
    """
    limits = {_original_length(module) for module in model.modules() if DYNAMIC in _kinds(module)}
    return min(limits, default=None)


def _kinds(module: nn.Module) -> set[Any]:
    """The kinds of a rotary module. Some modules have one for each kind of layer."""
    kind = getattr(module, "rope_type", None)
    return set(kind.values()) if isinstance(kind, dict) else {kind}


def _original_length(module: nn.Module) -> int:
    return int(module.original_max_seq_len)  # type: ignore[arg-type]


def _by_length(module: nn.Module, whole: Callable[..., Any], lengths_T: list[Tensor]) -> Callable[..., Any]:
    def forward(x: Tensor, position_ids: Tensor, layer_type: str | None = None) -> Any:
        kind: Any = module.rope_type
        kind = kind if layer_type is None else kind[layer_type]
        named = {} if layer_type is None else {"layer_type": layer_type}
        if kind == LONGROPE:
            groups = _longrope_groups(module, lengths_T[0], layer_type)
        elif kind == DYNAMIC:
            groups = _dynamic_groups(module, lengths_T[0], layer_type)
        else:
            return whole(x, position_ids, **named)
        tables: list[Tensor] = []
        for rows, last in groups:
            # an extra position selects the frequencies, whatever the tokens' own positions are
            positions = position_ids.new_empty(1, len(rows) + 1)
            positions[:, :-1], positions[:, -1] = position_ids[:, rows], last
            parts = whole(x, positions, **named)
            tables = tables or [part.new_empty(1, position_ids.shape[1], part.shape[2]) for part in parts]
            for table, part in zip(tables, parts, strict=True):
                table[:, rows] = part[:, :-1]
        return tuple(tables)

    return forward


def _longrope_groups(module: nn.Module, lengths_T: Tensor, layer_type: str | None) -> Iterator[tuple[Tensor, int]]:
    """Yield the tokens of short and of long sequences, each with a position that makes transformers use their
    frequencies.
    """
    parameters: Any = module.config.rope_parameters  # type: ignore[union-attr]
    parameters = parameters if layer_type is None else parameters[layer_type]
    limit = parameters["original_max_position_embeddings"]
    for long in (False, True):
        yield ((lengths_T > limit) == long).nonzero().squeeze(1), limit if long else 0


def _dynamic_groups(module: nn.Module, lengths_T: Tensor, layer_type: str | None) -> Iterator[tuple[Tensor, int]]:
    """Yield the tokens of each length beyond the original one, and all other tokens, with the last position of the
    length.
    """
    original = _original_length(module)
    lengths_T = lengths_T.clamp(min=original)
    for length in torch.unique(lengths_T).tolist():
        _forget_length(module, original, layer_type)
        yield (lengths_T == length).nonzero().squeeze(1), length - 1


def _forget_length(module: nn.Module, original: int, layer_type: str | None) -> None:
    """Reset a module, so that it makes frequencies for the next call: it keeps those of the longest call so far."""
    prefix = "" if layer_type is None else f"{layer_type}_"
    setattr(module, f"{prefix}inv_freq", getattr(module, f"{prefix}original_inv_freq"))
    setattr(module, f"{prefix}max_seq_len_cached", original)
