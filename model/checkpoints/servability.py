"""Finds out whether the engine can serve a model, by one dry run on the meta device, before any weight is read.

The engine computes three things itself, and transformers' modelling code must leave them to it: experts (through the
experts interface), attention with its key-value cache (through the attention interface), and masks. A mask is
described, not made: it is causal, or causal within a sliding window. The dry run registers a probe for each of the
three and looks at the calls that arrive. The states of recurrent layers go through transformers' cache, where another
probe finds them (model/states/finding.py). The model's name does not matter. So new families are served, or refused
with a reason, and no list of names must be kept up to date.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, PreTrainedModel

from elastic_moe.model.checkpoints.quiet import quiet_transformers
from elastic_moe.model.states.finding import StateLayer, UnknownUse, find_state_layers
from elastic_moe.model.torch_private import READS_A_VALUE, TorchDispatchMode
from elastic_moe.model.transformers_private import (
    EXPANDS_LATENTS,
    EXPERT_FLAGS,
    SERVED_CACHE_LAYERS,
    STATES_REFUSAL,
    DynamicLayer,
    ExpertsInterface,
    LinearAttentionCacheLayerMixin,
    implementations,
    is_indexer,
    set_implementations,
)

PROBE = "emoe_probe"
TOKENS = 3
"""Tokens of the dry run."""

_HONOURED = {"scaling", "dropout", "sliding_window", "softcap", "s_aux", "is_causal", "position_ids"}
"""Keyword arguments of an attention call that the engine's attention obeys, or that do not change its result."""


class NotServable(Exception):
    """The model cannot be served. The message is one line that says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerKV:
    """What one attention layer keeps of each token."""

    numbers: int
    """Numbers in the cache: those of keys and values, or of the latents that these are made of, and of an indexer's
    keys."""
    expanded: int
    """Numbers in the keys and values."""
    window: int | None
    """The last tokens that the layer attends to; None: all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """What the dry run has found about a model."""

    expert_modules: tuple[str, ...]
    """[L] names of the expert modules, in the order in which a token meets them."""
    num_experts: int
    top_k: int
    hidden_size: int
    vocab_size: int
    kv: tuple[LayerKV, ...]
    """What each attention layer keeps of each token."""
    state_bytes: int
    """Bytes that one sequence's states take at any length, over all layers; 0 if the model keeps none."""

    @property
    def kv_numbers(self) -> int:
        """Numbers that the cache holds of one token, over all layers."""
        return sum(layer.numbers for layer in self.kv)


@dataclass(slots=True)
class _Trace:
    """What the probes saw in one forward pass."""

    experts: list[nn.Module] = field(default_factory=list)
    top_k: set[int] = field(default_factory=set)
    hidden_sizes: set[int] = field(default_factory=set)
    attention_layers: list[int] = field(default_factory=list)
    state_layers: tuple[StateLayer, ...] = ()
    kv: list[LayerKV] = field(default_factory=list)
    complaint: str | None = None

    def forget_calls(self) -> None:
        self.experts.clear()
        self.attention_layers.clear()
        self.kv.clear()


def dry_run(model: PreTrainedModel) -> Shape:
    """Find the shape of `model`, which must be on the meta device. Raises NotServable if it cannot be served."""
    modules = [(name, module) for name, module in model.named_modules() if is_expert_module(module)]
    _check_structure(model, modules)
    trace = _Trace()
    logits = _forward(model, trace)
    if trace.complaint is not None:
        raise NotServable(trace.complaint)
    if [id(module) for module in trace.experts] != [id(module) for _, module in modules]:
        raise NotServable("its expert layers are not each run once, in the order of its layers")
    _check_caches(model, trace)
    if min(trace.top_k) < 1:
        raise NotServable("its router gives a token no expert: num_experts_per_tok must be at least 1")
    sizes = {num_experts(module) for _, module in modules}
    if len(sizes) > 1 or len(trace.top_k) > 1 or len(trace.hidden_sizes) > 1:
        raise NotServable("its layers differ in their number of experts or in experts per token")
    return Shape(
        expert_modules=tuple(name for name, _ in modules),
        num_experts=sizes.pop(),
        top_k=trace.top_k.pop(),
        hidden_size=trace.hidden_sizes.pop(),
        vocab_size=int(logits.shape[-1]),
        kv=tuple(trace.kv),
        state_bytes=sum(layer.nbytes for layer in trace.state_layers),
    )


def is_expert_module(module: nn.Module) -> bool:
    """Whether transformers computes this module through its experts interface."""
    return all(hasattr(module, flag) for flag in EXPERT_FLAGS)


def num_experts(module: nn.Module) -> int:
    """E: the first dimension of every parameter of an expert module."""
    return int(next(module.parameters()).shape[0])


# --- What shows without running ---------------------------------------------------------------------------------------


def _check_structure(model: PreTrainedModel, experts: list[tuple[str, nn.Module]]) -> None:
    text = model.config.get_text_config()
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and module is not model and module.config is not text:
            raise NotServable(f"it takes other input than text ({type(module).__name__})")
    if not experts:
        if _family_has_experts(model):
            raise NotServable("it has no MoE layer: its configuration makes every layer a dense one")
        if not _mentions_experts(model):
            raise NotServable("it is not a Mixture-of-Experts model: no layer has experts")
        raise NotServable("its experts do not go through transformers' experts interface")
    other = sorted(type(layer).__name__ for layer in _cache_layers(model) if type(layer) not in SERVED_CACHE_LAYERS)
    if other:
        raise NotServable(f"it keeps other state than keys and values per token, or a state per sequence ({other[0]})")
    for name, module in experts:
        params = list(module.named_parameters())
        if len({param.shape[0] for _, param in params if param.dim() > 1}) != 1 or any("." in key for key, _ in params):
            raise NotServable(f"the parameters of {name} are not stacked by expert")
        if getattr(module, "has_post_expert_norm", False):
            raise NotServable("its experts apply a norm of their own after each expert")
        if len(inspect.signature(type(module).forward).parameters) != 4:
            raise NotServable(f"{type(module).__name__} takes more than hidden states and the router's choice")


def _mentions_experts(model: PreTrainedModel) -> bool:
    names = (type(module).__name__.lower() for module in model.modules())
    return any("expert" in name or "moe" in name for name in names)


def _family_has_experts(model: PreTrainedModel) -> bool:
    """Whether this family computes experts through the interface in layers that have experts."""
    classes = vars(sys.modules[type(model).__module__]).values()
    return any(isinstance(kind, type) and hasattr(kind, "_apply_gate") for kind in classes)


def _cache_layers(model: PreTrainedModel) -> list[Any]:
    """What transformers' cache keeps for each layer of the model."""
    return list(DynamicCache(config=model.config).layers)


def _check_caches(model: PreTrainedModel, trace: _Trace) -> None:
    """Check that each layer has the attention and the states that transformers keeps a cache for."""
    layers = _cache_layers(model)
    attends = [number for number, layer in enumerate(layers) if isinstance(layer, DynamicLayer)]
    keeps = {number for number, layer in enumerate(layers) if isinstance(layer, LinearAttentionCacheLayerMixin)}
    if sorted(trace.attention_layers) != attends:
        raise NotServable(
            "not every layer has exactly one attention that goes through transformers' attention interface "
            f"({len(trace.attention_layers)} calls in {len(attends)} layers)"
        )
    if not attends:
        raise NotServable("no layer of it attends to earlier tokens")
    if {layer.layer_idx for layer in trace.state_layers} != keeps:
        raise NotServable("it keeps states per sequence in other layers than those that transformers' cache names")
    unknown = _other_recurrent(model, {layer.module for layer in trace.state_layers})
    if unknown is not None:
        raise NotServable(f"it keeps states per sequence that do not go through transformers' cache ({unknown})")


def _other_recurrent(model: nn.Module, found: set[nn.Module]) -> str | None:
    """The class of a module that seems to keep states and neither is one of `found` nor contains or is part of one."""
    if model in found:
        return None
    for child in model.children():
        if (other := _other_recurrent(child, found)) is not None:
            return other
    looks = any(hasattr(model, name) for name in ("A_log", "dt_bias", "conv1d", "conv"))
    return type(model).__name__ if looks and found.isdisjoint(model.modules()) else None


# --- The dry run ------------------------------------------------------------------------------------------------------

_running: ContextVar[_Trace] = ContextVar("dry_run")


class _NumbersForMeta(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Returns 1 if code reads the value of a meta tensor, as length-dependent rotary embeddings do."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is READS_A_VALUE:
            return 1
        return func(*args, **(kwargs or {}))


def _forward(model: PreTrainedModel, trace: _Trace) -> Tensor:
    """Run a forward pass in which the probes fill `trace`. Returns the logits."""
    ids = torch.ones(1, TOKENS, dtype=torch.long, device="meta")
    numbers: Any = _NumbersForMeta()  # type: ignore[no-untyped-call]
    with _implementation(model, PROBE), quiet_transformers(), torch.no_grad(), numbers:
        token = _running.set(trace)
        try:
            positions = torch.ones(1, TOKENS, dtype=torch.long, device="meta")
            if any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in _cache_layers(model)):
                if STATES_REFUSAL is not None:
                    raise NotServable(STATES_REFUSAL)
                trace.state_layers = find_state_layers(model, lambda: _run(model, ids, positions))
                # the same calls come again
                trace.forget_calls()
            logits = _run(model, ids, positions)
        except NotServable:
            raise
        except UnknownUse as error:
            raise NotServable(str(error)) from error
        except (
            RuntimeError,
            ValueError,
            TypeError,
            AttributeError,
            KeyError,
            IndexError,
            NotImplementedError,
        ) as error:
            line = str(error).strip().split("\n")[0][:200]
            raise NotServable(f"a dry run of it failed ({type(error).__name__}: {line})") from error
        finally:
            _running.reset(token)
    return logits


def _run(model: PreTrainedModel, ids: Tensor, positions: Tensor) -> Tensor:
    logits: Tensor = model(input_ids=ids, position_ids=positions, use_cache=False).logits
    return logits


@contextmanager
def _implementation(model: PreTrainedModel, name: str) -> Iterator[None]:
    """While the block runs, the model uses the implementation `name` for attention, masks and experts."""
    configs: dict[int, Any] = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}
    before = {key: implementations(config) for key, config in configs.items()}
    for config in configs.values():
        set_implementations(config, name, name)
    try:
        yield
    finally:
        for key, config in configs.items():
            set_implementations(config, *before[key])


def _probe_experts(module: nn.Module, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    trace = _running.get()
    trace.experts.append(module)
    trace.top_k.add(int(index.shape[-1]))
    trace.hidden_sizes.add(int(hidden.shape[-1]))
    if tuple(index.shape) != (TOKENS, index.shape[-1]) or tuple(hidden.shape[:-1]) != (TOKENS,):
        trace.complaint = "its router does not give every token a fixed number of experts"
    return torch.empty_like(hidden)


def _probe_mask(
    *_: Any,
    config: Any = None,
    local_size: int | None = None,
    use_vmap: bool = False,
    allow_is_bidirectional_skip: bool = False,
    **__: Any,
) -> Tensor:
    """Make a mask that remembers why it cannot be served, if it cannot."""
    mask = torch.zeros(1, 1, TOKENS, TOKENS, dtype=torch.bool, device="meta")
    chunked = local_size is not None and local_size == getattr(config, "attention_chunk_size", None)
    complaint = (
        "tokens attend within chunks"
        if chunked
        else "it is not causal"
        if allow_is_bidirectional_skip
        else "it follows rules of the model's own"
        if use_vmap
        else None
    )
    mask.emoe_complaint = complaint  # type: ignore[attr-defined]
    mask.emoe_window = local_size  # type: ignore[attr-defined]
    return mask


def _probe_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    trace = _running.get()
    trace.attention_layers.append(getattr(module, "layer_idx", -1))
    expanded = key.shape[1] * (key.shape[3] + value.shape[3])
    window = getattr(attention_mask, "emoe_window", None)
    trace.kv.append(LayerKV(numbers=_cached_numbers(module, expanded), expanded=expanded, window=window))
    trace.complaint = trace.complaint or _attention_complaint(module, key, attention_mask, kwargs)
    return query.new_empty(1, query.shape[2], query.shape[1], value.shape[3]), None


def _cached_numbers(module: Any, expanded: int) -> int:
    if not callable(getattr(module, EXPANDS_LATENTS, None)):
        return expanded
    indexers = [part for part in module.children() if is_indexer(part)]
    return int(module.kv_lora_rank + module.qk_rope_head_dim + sum(part.head_dim for part in indexers))


def _attention_complaint(module: nn.Module, key: Tensor, mask: Tensor | None, kwargs: dict[str, Any]) -> str | None:
    odd = sorted(
        name for name, value in kwargs.items() if name not in _HONOURED and value is not None and value is not False
    )
    indexer = getattr(module, "indexer", module)
    if odd == ["indices"] and (indexer is None or is_indexer(indexer)):
        odd = []
    if odd:
        return f"{type(module).__name__} asks its attention for {', '.join(odd)}"
    if key.shape[2] != TOKENS:
        return f"{type(module).__name__} attends to other keys than one per token"
    if mask is None:
        return f"{type(module).__name__} attends without a mask"
    if not hasattr(mask, "emoe_complaint"):
        return f"{type(module).__name__} makes an attention mask of its own"
    if mask.emoe_complaint is not None:
        return f"its attention mask is not supported: {mask.emoe_complaint}"
    return None


ExpertsInterface.register(PROBE, _probe_experts)
AttentionInterface.register(PROBE, _probe_attention)
AttentionMaskInterface.register(PROBE, _probe_mask)
