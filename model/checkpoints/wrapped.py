"""Finds the text model inside a checkpoint whose model takes images or sound too.

Such a configuration has a part for text, and transformers has a causal language model for that part alone. The stored
tensors of the text part get the names that a checkpoint of the text model alone would have. All other tensors are left
out, so they are never read.
"""

from __future__ import annotations

from collections.abc import Mapping

from transformers import PretrainedConfig, PreTrainedModel

from elastic_moe.cluster.errors import CheckpointError
from elastic_moe.model.checkpoints.packed import Stored
from elastic_moe.model.transformers_private import (
    WeightRenaming,
    causal_class,
    dot_natural_key,
    get_model_conversion_mapping,
    rename_source_key,
)


def text_part(config: PretrainedConfig) -> PretrainedConfig:
    """The configuration of the causal language model inside `config`; `config` itself if it has no such part.

    Whether input and output embeddings are one matrix is decided by the whole model, which has the output matrix.
    """
    text = config.get_text_config(decoder=True)
    if not isinstance(text, PretrainedConfig):
        raise CheckpointError(f"config.json: text_config: expected an object, found {type(text).__name__}")
    if text is config or causal_class(text) is None:
        return config
    text.tie_word_embeddings = bool(getattr(config, "tie_word_embeddings", False))
    return text


def text_tensors(whole: PreTrainedModel, text: PreTrainedModel, tensors: Mapping[str, Stored]) -> dict[str, Stored]:
    """The tensors of the model `text`, a part of the model `whole`, by their names in checkpoints of `text` alone.

    Both models are on the meta device. transformers' tables rename what is stored, as when it loads `whole`. What is
    converted besides (experts that are stacked) is left to the tables of `text`. Raises CheckpointError if `whole` does
    not have exactly one such part.
    """
    places = _places(whole, text)
    renamings = [t for t in get_model_conversion_mapping(whole) if isinstance(t, WeightRenaming)]
    wanted = whole.state_dict()
    found: dict[str, Stored] = {}
    for name in sorted(tensors, key=dot_natural_key):
        renamed, _ = rename_source_key(name, renamings, [], whole.base_model_prefix, wanted)
        for there, here in places.items():
            if renamed.startswith(there):
                found[here + renamed[len(there) :]] = tensors[name]
                break
    return found


def _places(whole: PreTrainedModel, text: PreTrainedModel) -> dict[str, str]:
    """Beginning of names in `whole` -> beginning of the same names in `text`. The longest come first."""
    inside = [name for name, module in whole.named_modules() if type(module) is type(text)]
    if len(inside) == 1:
        return {f"{inside[0]}.": ""}
    body = text.base_model_prefix
    bodies = [name for name, module in whole.named_modules() if type(module) is type(text.base_model)]
    if len(bodies) != 1:
        raise CheckpointError(
            f"{type(whole).__name__}: expected one part that is a {type(text.base_model).__name__}, found {len(bodies)}"
        )
    places = {f"{bodies[0]}.": f"{body}."}
    # tensors may be stored without the prefix of the whole model's base
    places[f"{bodies[0].removeprefix(f'{whole.base_model_prefix}.')}."] = f"{body}."
    places |= {f"{name}.": f"{name}." for name, _ in text.named_children() if name != body}
    return dict(sorted(places.items(), key=lambda place: -len(place[0])))
