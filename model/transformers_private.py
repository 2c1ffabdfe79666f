"""Holds every use of transformers that its documentation does not promise. Look here first when it is upgraded.

tests/model/test_private_seams.py names each of them with its expected signature, so that an upgrade fails a test
instead of losing a path silently. This file imports nothing of this project.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping
from typing import Any

from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForMultimodalLM, PretrainedConfig, PreTrainedModel, cache_utils
from transformers.cache_utils import (
    DynamicIndexedLayer,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    LinearAttentionCacheLayerMixin,
    LinearAttentionLayer,
)
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, ExpertsInterface
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

__all__ = [
    "ALL_EXPERTS_FUNCTIONS",
    "CONFIG_MAPPING",
    "Concatenate",
    "DynamicIndexedLayer",
    "DynamicLayer",
    "DynamicSlidingWindowLayer",
    "ExpertsInterface",
    "LinearAttentionAndFullAttentionLayer",
    "LinearAttentionAndSlidingWindowAttentionLayer",
    "LinearAttentionCacheLayerMixin",
    "LinearAttentionLayer",
    "MergeModulelist",
    "WeightConverter",
    "WeightRenaming",
    "dot_natural_key",
    "get_model_conversion_mapping",
    "rename_source_key",
]

SERVED_CACHE_LAYERS = {
    DynamicIndexedLayer,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    LinearAttentionLayer,
    # keeps nothing; transformers 5.17 has no such layer yet
    *([cache_utils.DummyLayer] if hasattr(cache_utils, "DummyLayer") else []),
}
"""The kinds of layers of transformers' cache that the data plane can stand in for."""

STATES_REFUSAL = (
    None
    if hasattr(cache_utils.Cache, "get_conv_state")
    else "layers with a state per sequence need transformers 5.21 or later"
)
"""Why models with a state per sequence cannot be served; None if they can. Older models take their states out of the
cache's layers, and change them in place."""

EXPERT_FLAGS = ("_apply_gate", "is_transposed", "has_bias", "has_gate")
"""Attributes that transformers' decorator gives to expert modules and that its experts interface reads."""

EXPANDS_LATENTS = "expand_kv"
"""The method by which attention modules make keys and values [1, N, T, D] of latents [1, 1, T, R] and [1, 1, T, P]."""

INDEXER_CHOOSES = "index_topk"
"""The attribute of an indexer that says how many keys it chooses for each token."""

ROTARY = "apply_rotary_pos_emb"
"""The name by which the attention modules of a modelling file call its rotary embedding."""

ROTARY_OF_PAIRS = "apply_rotary_pos_emb_interleave"
"""The name of one that rotates neighbours against each other."""


def apply_gate(module: nn.Module, gate_up: Tensor) -> Tensor:
    """Apply the activation of an expert module: [R, 2F] -> [R, F]."""
    gated: Tensor = module._apply_gate(gate_up)  # type: ignore[operator]
    return gated


def causal_class(config: PretrainedConfig) -> type[PreTrainedModel] | None:
    """The class of causal language models for a configuration of this class; None if transformers has none.

    A few of them are listed among the models that take images, though they have no part for any.
    """
    kind: Any = AutoModelForCausalLM._model_mapping.get(type(config), None)
    if kind is not None:
        return kind  # type: ignore[no-any-return]
    return None if config.sub_configs else multimodal_class(config)


def multimodal_class(config: PretrainedConfig) -> type[PreTrainedModel] | None:
    """The class of models that take text and other input, for a configuration of this class; None if there is none."""
    kind: Any = AutoModelForMultimodalLM._model_mapping.get(type(config), None)
    return kind  # type: ignore[no-any-return]


def implementations(config: Any) -> tuple[str, str]:
    """The names of the attention function and the experts function that models of this configuration call."""
    return config._attn_implementation, config._experts_implementation


def set_implementations(config: Any, attention: str, experts: str) -> None:
    config._attn_implementation, config._experts_implementation = attention, experts


def is_indexer(module: nn.Module) -> bool:
    """Whether a module chooses the keys that each token attends to, one by one (DeepSeek's sparse attention)."""
    parts = hasattr(module, INDEXER_CHOOSES) and hasattr(module, "weights_proj")
    return parts and "position_ids" in inspect.signature(module.forward).parameters


def tied_weights(model: PreTrainedModel) -> Mapping[str, str]:
    """Full name of a parameter -> full name of the parameter whose memory it shares."""
    tied: Mapping[str, str] = model.all_tied_weights_keys
    return tied


def may_be_missing(model: PreTrainedModel) -> Collection[str]:
    """Patterns of parameters that a checkpoint may lack."""
    patterns: Collection[str] | None = model._keys_to_ignore_on_load_missing
    return patterns or ()


def rotary_function(file: Any, name: str = ROTARY) -> Callable[..., Any] | None:
    """The rotary embedding function of a modelling file (a Python module); None if none has this name."""
    function: Callable[..., Any] | None = getattr(file, name, None)
    return function


def replace_rotary_function(file: Any, function: Callable[..., Any], name: str = ROTARY) -> None:
    """Make every model of this modelling file in this process call `function` from now on."""
    setattr(file, name, function)
