"""Finds which stored tensors make which parameters of a model, and by what conversion.

A checkpoint names and lays out tensors as its authors did. transformers renames, stacks and joins them while it loads
(its conversion mapping). This file applies that mapping once, to names and shapes alone. So it finds missing and
misshapen tensors before anything is read, separates the trunk from the experts, and can convert one expert by itself in
the same way.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from elastic_moe.cluster.errors import CheckpointError
from elastic_moe.model.checkpoints.packed import Stored
from elastic_moe.model.transformers_private import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    get_model_conversion_mapping,
    may_be_missing,
    rename_source_key,
    tied_weights,
)


@dataclass(slots=True, kw_only=True)
class TensorGroup:
    """Stored tensors that are converted together."""

    target: str
    """Name of the first parameter that the tensors make."""
    converter: WeightConverter | None
    """None if the group is one tensor that is only renamed."""
    sources: dict[str, list[str]] = field(default_factory=dict)
    """Pattern of the converter -> names of stored tensors, in the order in which they are stacked."""

    @property
    def names(self) -> list[str]:
        return [name for names in self.sources.values() for name in names]


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertGroup:
    """A group that makes one parameter [E, ...] of an expert module, and can make one expert's part of it alone."""

    parameter: str
    """Name of the parameter within the expert module, such as gate_up_proj."""
    group: TensorGroup
    fused: bool
    """True if one stored tensor holds all experts along dimension 0; False if each expert has a tensor of its own."""

    def sources_of(self, expert: int) -> dict[str, str]:
        """Pattern of the converter -> name of the stored tensor that holds this expert's part."""
        return {pattern: names[0 if self.fused else expert] for pattern, names in self.group.sources.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversion:
    """The stored tensors that make the trunk, and those that make each expert."""

    trunk: tuple[str, ...]
    """Names of the stored tensors that the trunk is made of."""
    experts: tuple[tuple[ExpertGroup, ...], ...]
    """[L] groups of each MoE layer, one per parameter of its expert module."""


def find_conversion(
    model: PreTrainedModel, expert_modules: Sequence[str], num_experts: int, tensors: Mapping[str, Stored]
) -> Conversion:
    """Find the conversion of `tensors` into the parameters of `model`, which must be on the meta device.

    Raises CheckpointError if a tensor is missing or has the wrong shape, or if the experts are stored in such a way
    that one cannot be read alone.
    """
    wanted = model.state_dict()
    groups = _groups(model, wanted, sorted(tensors, key=dot_natural_key))
    owners = {f"{name}.{key}": layer for layer, name in enumerate(expert_modules) for key in _parameters(model, name)}
    check = _ShapeCheck(model=model, wanted=wanted, tensors=tensors)
    trunk: list[str] = []
    made: set[str] = set()
    experts: list[list[ExpertGroup]] = [[] for _ in expert_modules]
    for group in groups:
        if group.target not in owners:
            trunk += group.names
            made |= check.trunk(group)
            continue
        made.add(group.target)
        parameter = group.target.rpartition(".")[2]
        experts[owners[group.target]].append(check.expert(group, parameter, num_experts))
    _refuse_missing(model, set(wanted) - made, tensors)
    return Conversion(trunk=tuple(trunk), experts=tuple(tuple(parts) for parts in experts))


def convert(group: TensorGroup, tensors: Mapping[str, Sequence[Tensor]], model: PreTrainedModel) -> dict[str, Tensor]:
    """Convert `tensors` (pattern -> tensors in order) into parameters, by full name."""
    if group.converter is None:
        ((only,),) = tensors.values()
        return {group.target: only}
    converter = deepcopy(group.converter)
    for pattern, parts in tensors.items():
        for part in parts:
            converter.add_tensor(group.target, group.target, pattern, cast(Any, _ready(part)))
    made = converter.convert(group.target, model=model, config=model.config)
    return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}


def _ready(tensor: Tensor) -> Callable[[], Tensor]:
    # a converter calls the functions that it has collected, so that it reads each tensor as late as possible
    return lambda: tensor


def _parameters(model: PreTrainedModel, module: str) -> list[str]:
    return [name for name, _ in model.get_submodule(module).named_parameters()]


def _groups(model: PreTrainedModel, wanted: dict[str, Tensor], names: Sequence[str]) -> list[TensorGroup]:
    """Group stored tensors by the parameter that they make. Tensors that make none (extra prediction layers) are left
    out.
    """
    transforms = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    prefix = model.base_model_prefix
    groups: dict[str, TensorGroup] = {}
    for name in names:
        target, pattern = rename_source_key(name, renamings, converters, prefix, wanted)
        if target not in wanted and name in wanted:
            target, pattern = name, None
        if target not in wanted:
            continue
        converter = by_pattern[pattern] if pattern is not None else None
        group = groups.setdefault(target, TensorGroup(target=target, converter=converter))
        group.sources.setdefault(pattern or name, []).append(name)
    return list(groups.values())


# --- Shapes -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class _ShapeCheck:
    """Runs conversions on the meta device to check that they make parameters of the model's shapes."""

    model: PreTrainedModel
    wanted: Mapping[str, Tensor]
    tensors: Mapping[str, Stored]

    def trunk(self, group: TensorGroup) -> set[str]:
        """Check the shapes of the parameters that the group makes, and return the parameters' names."""
        made = self._convert(group, {pattern: list(map(self._meta, names)) for pattern, names in group.sources.items()})
        for name, value in made.items():
            if name in self.wanted and value.shape != self.wanted[name].shape:
                raise self._misfit(group, list(value.shape), list(self.wanted[name].shape))
        return set(made)

    def expert(self, group: TensorGroup, parameter: str, count: int) -> ExpertGroup:
        """Check every expert's part of the group, and return the group as one of an expert module."""
        want = self.wanted[group.target].shape
        fused = all(len(names) == 1 and self._rows(names[0]) == count for names in group.sources.values())
        if not fused:
            self._one_each(group, count)
        result = ExpertGroup(parameter=parameter, group=group, fused=fused)
        first = result.sources_of(0)
        made = self._convert(group, {pattern: [self._meta(name, fused)] for pattern, name in first.items()})
        value = made.get(group.target)
        if len(made) != 1 or value is None or value.dim() != len(want):
            raise CheckpointError(f"{self._where(group)}: its experts are stored in a way that is not supported")
        if value.shape != (1, *want[1:]):
            raise self._misfit(group, list(value.shape[1:]), list(want[1:]))
        for pattern, names in group.sources.items():
            for name in names:
                if self.tensors[name].shape != self.tensors[first[pattern]].shape:
                    raise self._stray(group)
        return result

    def _one_each(self, group: TensorGroup, count: int) -> None:
        if group.converter is None:
            raise self._misfit(group, list(self.tensors[group.names[0]].shape), list(self.wanted[group.target].shape))
        for pattern in group.converter.source_patterns:
            names = group.sources.get(pattern, [])
            if len(names) != count:
                what = f"{len(names)} tensors like {pattern.lstrip('.')} for {group.target}, expected {count}"
                raise CheckpointError(f"{self._where(group)}: {what}")

    def _rows(self, name: str) -> int:
        shape = self.tensors[name].shape
        return shape[0] if len(shape) > 1 else -1

    def _meta(self, name: str, one_row: bool = False) -> Tensor:
        shape = self.tensors[name].shape
        return torch.empty((1, *shape[1:]) if one_row else shape, device="meta")

    def _convert(self, group: TensorGroup, tensors: Mapping[str, Sequence[Tensor]]) -> dict[str, Tensor]:
        try:
            return convert(group, tensors, self.model)
        except (RuntimeError, ValueError, IndexError, TypeError, KeyError, AttributeError) as error:
            raise self._stray(group) from error

    def _stray(self, group: TensorGroup) -> CheckpointError:
        name = self._odd_one(group)
        stored = self.tensors[name]
        return CheckpointError(
            f"{stored.file}: {name} has the shape {list(stored.shape)}, which does not fit into {group.target}"
        )

    def _misfit(self, group: TensorGroup, found: list[int], want: list[int]) -> CheckpointError:
        name = self._odd_one(group)
        stored = self.tensors[name]
        return CheckpointError(
            f"{stored.file}: {name} has the shape {list(stored.shape)}: {group.target} would have {found}, "
            f"but config.json asks for {want}"
        )

    def _odd_one(self, group: TensorGroup) -> str:
        """The stored tensor whose shape differs from the others of its pattern; the first one if all are alike."""
        for names in group.sources.values():
            usual = Counter(self.tensors[name].shape for name in names).most_common(1)[0][0]
            for name in names:
                if self.tensors[name].shape != usual:
                    return name
        return group.names[0]

    def _where(self, group: TensorGroup) -> str:
        return str(self.tensors[group.names[0]].file)


def _refuse_missing(model: PreTrainedModel, missing: set[str], tensors: Mapping[str, Stored]) -> None:
    """Raise CheckpointError for parameters that no stored tensor makes, unless they are tied to one that is stored."""
    tied = tied_weights(model)
    twins: dict[str, set[str]] = defaultdict(set)
    for one, other in tied.items():
        twins[one].add(other)
        twins[other].add(one)
    ignored = [re.compile(pattern) for pattern in may_be_missing(model)]
    absent = [
        name
        for name in sorted(missing, key=dot_natural_key)
        if not (twins[name] - missing) and not any(pattern.search(name) for pattern in ignored)
    ]
    if absent:
        more = f" and {len(absent) - 1} more" if len(absent) > 1 else ""
        where = next(iter(tensors.values())).file.parent if tensors else "the checkpoint"
        raise CheckpointError(f"{where}: has no tensor for {absent[0]}{more}")
