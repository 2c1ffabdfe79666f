"""Stands a packed weight for the stored tensors that make it, so that the rest of the room sees weights only.

`quantization_config` decides what is packed. Where the files contradict it, the error names both.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from elastic_moe.cluster.errors import CheckpointError
from elastic_moe.cluster.expert_forms import ExpertForm
from elastic_moe.model.checkpoints.stored import StoredTensor
from elastic_moe.model.formats.configuration import Packing
from elastic_moe.model.formats.interface import VALUES, BadPart, Codes, Format, Header, Naming
from elastic_moe.model.formats.small_floats import FLOAT8

Made = TypeVar("Made")

_SIGNS = ("_scale_inv", ".qweight", ".weight_packed", "_proj_blocks")
"""Endings by which a packed weight shows where the configuration says nothing of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedTensor:
    """A weight that several stored tensors make. It reads like a StoredTensor in float32."""

    name: str
    format: Format
    parts: Mapping[str, StoredTensor]
    """The stored tensors by their roles."""
    names: Mapping[str, str]
    """Names of the stored tensors, by their roles."""
    shape: tuple[int, ...]

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32

    @property
    def file(self) -> Path:
        return self.parts[VALUES].file

    @property
    def start(self) -> int:
        return self.parts[VALUES].start

    @property
    def nbytes(self) -> int:
        """Bytes on the disk."""
        return sum(part.nbytes for part in self.parts.values())

    def read(self, first: int | None = None) -> Tensor:
        """Read and unpack the weight [shape]; with `first`, only its row `first` along dimension 0: [1, shape[1:]].

        A matrix is read whole. Blocks on the disk. Raises CheckpointError, which names the tensor, for values that the
        format does not have.
        """
        weight = self._made(self.format.unpack, first)
        return weight if first is None or len(self.shape) > 2 else weight[first : first + 1]

    @property
    def kept(self) -> ExpertForm:
        """The form in which the weight can be kept without rounding it."""
        return self.format.kept({role: Header(part.dtype, part.shape) for role, part in self.parts.items()})

    def read_codes(self, first: int | None = None) -> Codes:
        """Read the weight in the form `kept`; see `read`."""
        return self._made(self.format.codes, first)

    def _made(self, make: Callable[[Mapping[str, Tensor]], Made], first: int | None) -> Made:
        split = first is not None and len(self.shape) > 2
        row = first if split else None
        parts = {
            role: part.read(row if part.shape[:1] == self.shape[:1] else None) for role, part in self.parts.items()
        }
        try:
            return make(parts)
        except BadPart as error:
            raise _error(self.parts, self.names, error) from error


Stored = StoredTensor | PackedTensor


def find_packed(config: Path, packing: Packing | None, tensors: Mapping[str, StoredTensor]) -> dict[str, Stored]:
    """The weights of a checkpoint by name: packed ones in place of the stored tensors that make them.

    `config` is the file that `packing` was read from, for messages. Raises CheckpointError for a tensor that is
    missing, has the wrong shape or contradicts the configuration. Reads no weight.
    """
    if packing is None:
        _refuse_packed(config, tensors)
        return dict(tensors)
    found: dict[str, PackedTensor] = {}
    for name, stored in tensors.items():
        if (weight := _packed(config, packing, name, stored, tensors)) is not None:
            found[weight.name] = weight
    if not found:
        first = next(iter(tensors.values())).file if tensors else config.parent
        raise CheckpointError(
            f"{config}: quantization_config: quant_method {packing.method!r} says that weights are packed as "
            f"{packing.labels()}, but {first} has none that are"
        )
    used = {name for weight in found.values() for name in weight.names.values()}
    plain = {name: stored for name, stored in tensors.items() if name not in used}
    _refuse_stray(config, packing, plain)
    return plain | found


def _packed(
    config: Path, packing: Packing, name: str, stored: StoredTensor, tensors: Mapping[str, StoredTensor]
) -> PackedTensor | None:
    """The weight whose values the tensor holds; None if it holds no packed values."""
    errors: list[CheckpointError] = []
    for form in packing.formats_of(_module(name)):
        found = [
            (naming, base, _names(naming, name, base, tensors))
            for naming in form.namings
            if form.holds(stored.dtype) and (base := naming.base(name)) is not None
        ]
        if not found:
            continue
        # the naming by which most is found; without scales, only a name that is that of a weight has values
        naming, base, names = max(found, key=lambda one: len(one[2]))
        if len(names) == 1 and not naming.values and not name.endswith(".weight"):
            continue
        try:
            return _checked(config, packing, form, naming, base + naming.makes, names, tensors)
        except CheckpointError as error:
            errors.append(error)
    if errors:
        raise errors[0]
    return None


def _names(naming: Naming, name: str, base: str, tensors: Mapping[str, StoredTensor]) -> dict[str, str]:
    found = {VALUES: name}
    for role, endings in naming.others.items():
        there = next((base + ending for ending in endings if base + ending in tensors), None)
        if there is not None:
            found[role] = there
    return found


def _checked(
    config: Path,
    packing: Packing,
    form: Format,
    naming: Naming,
    name: str,
    names: dict[str, str],
    tensors: Mapping[str, StoredTensor],
) -> PackedTensor:
    parts = {role: tensors[stored] for role, stored in names.items()}
    values = parts[VALUES]
    for role in sorted(naming.others.keys() - naming.optional - names.keys()):
        missing = name.removesuffix(naming.makes) + naming.others[role][0]
        raise CheckpointError(
            f"{values.file}: {names[VALUES]} is packed as {form.label} (quantization_config of {config.name}), but its "
            f"{role}, {missing}, are missing"
        )
    if (pattern := packing.leaves_alone(_module(name))) is not None:
        raise CheckpointError(
            f"{values.file}: {names[VALUES]} is packed as {form.label}, but quantization_config of {config} leaves "
            f"{pattern!r} unpacked"
        )
    try:
        shape = form.shape({role: Header(part.dtype, part.shape) for role, part in parts.items()})
    except BadPart as error:
        raise _error(parts, names, error, f" (quantization_config of {config.name})") from error
    return PackedTensor(name=name, format=form, parts=parts, names=names, shape=shape)


def _module(name: str) -> str:
    return name.rpartition(".")[0] if name.endswith((".weight", ".qweight", ".weight_packed")) else name


def _error(
    parts: Mapping[str, StoredTensor], names: Mapping[str, str], error: BadPart, more: str = ""
) -> CheckpointError:
    return CheckpointError(f"{parts[error.role].file}: {names[error.role]} {error}{more}")


def _refuse_packed(config: Path, tensors: Mapping[str, StoredTensor]) -> None:
    """Raise CheckpointError for tensors that only a quantization_config could explain."""
    for name, stored in tensors.items():
        if stored.dtype in FLOAT8 or name.endswith(_SIGNS):
            raise CheckpointError(
                f"{stored.file}: {name} in {_dtype(stored)} is part of a packed weight, but {config} has no "
                "quantization_config"
            )


def _refuse_stray(config: Path, packing: Packing, plain: Mapping[str, StoredTensor]) -> None:
    """Raise CheckpointError for a weight that is stored plainly and has scales, and for values of another format."""
    for name, stored in plain.items():
        weight = name.removesuffix("_inv").removesuffix("_scale")
        if name.endswith(("_scale_inv", ".weight_scale")) and weight in plain:
            raise CheckpointError(
                f"{stored.file}: {name} has scales, but {weight} is stored in {_dtype(plain[weight])}, which is not "
                f"{packing.labels()} as quantization_config of {config.name} has it"
            )
        if stored.dtype in FLOAT8 or name.endswith((".qweight", ".weight_packed")):
            raise CheckpointError(
                f"{stored.file}: {name} in {_dtype(stored)} is not packed as {packing.labels()}, as "
                f"quantization_config of {config.name} says"
            )


def _dtype(stored: StoredTensor) -> str:
    return str(stored.dtype).removeprefix("torch.")
