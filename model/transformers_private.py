"""Holds every use of transformers that its documentation does not promise. Look here first when it is upgraded.

tests/model/test_private_seams.py names each of them with its expected signature, so that an upgrade fails a test
instead of losing a path silently. This file imports nothing of this project.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
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
    "DynamicLayer",
    "DynamicSlidingWindowLayer",
    "ExpertsInterface",
    "MergeModulelist",
    "WeightConverter",
    "WeightRenaming",
    "dot_natural_key",
    "get_model_conversion_mapping",
    "rename_source_key",
]

EXPERT_FLAGS = ("_apply_gate", "is_transposed", "has_bias", "has_gate")
"""Attributes that transformers' decorator gives to expert modules and that its experts interface reads."""

_ROTARY = "apply_rotary_pos_emb"
"""The name by which the attention modules of a modelling file call its rotary embedding."""


def apply_gate(module: nn.Module, gate_up: Tensor) -> Tensor:
    """Apply the activation of an expert module: [R, 2F] -> [R, F]."""
    gated: Tensor = module._apply_gate(gate_up)  # type: ignore[operator]
    return gated


def has_causal_model(config: PretrainedConfig) -> bool:
    """Whether transformers has a causal language model for a configuration of this class."""
    return type(config) in AutoModelForCausalLM._model_mapping


def implementations(config: Any) -> tuple[str, str]:
    """The names of the attention function and the experts function that models of this configuration call."""
    return config._attn_implementation, config._experts_implementation


def set_implementations(config: Any, attention: str, experts: str) -> None:
    config._attn_implementation, config._experts_implementation = attention, experts


def tied_weights(model: PreTrainedModel) -> Mapping[str, str]:
    """Full name of a parameter -> full name of the parameter whose memory it shares."""
    tied: Mapping[str, str] = model.all_tied_weights_keys
    return tied


def may_be_missing(model: PreTrainedModel) -> Collection[str]:
    """Patterns of parameters that a checkpoint may lack."""
    patterns: Collection[str] | None = model._keys_to_ignore_on_load_missing
    return patterns or ()


def rotary_function(file: Any) -> Callable[..., Any] | None:
    """The rotary embedding function of a modelling file (a Python module); None if none has the usual name."""
    function: Callable[..., Any] | None = getattr(file, _ROTARY, None)
    return function


def replace_rotary_function(file: Any, function: Callable[..., Any]) -> None:
    """Make every model of this modelling file in this process call `function` from now on."""
    setattr(file, _ROTARY, function)
