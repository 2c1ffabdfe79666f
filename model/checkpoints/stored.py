"""Finds each tensor in safetensors files, and reads just its bytes.

Headers are checked in full, so that a damaged download is found before anything is loaded. Bytes are read into memory
of their own and not mapped: the pages of a mapped file count as the process's memory until the file is unmapped.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from elastic_moe.cluster.errors import CheckpointError
from elastic_moe.model.checkpoints.raw import read_json

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
}
_MAX_HEADER_BYTES = 100_000_000
"""The limit that the safetensors format sets."""
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTensor:
    """A tensor's place: bytes start .. end of `file`, row-major, little-endian."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.start

    def read(self, first: int | None = None) -> Tensor:
        """Read the whole tensor [shape]; with `first`, only its row `first` along dimension 0: [1, shape[1:]].

        The result owns its memory. Blocks on the disk. Raises CheckpointError if the file has become unreadable.
        """
        shape, start, nbytes = self.shape, self.start, self.nbytes
        if first is not None:
            nbytes //= shape[0]
            shape, start = (1, *shape[1:]), start + first * nbytes
        raw = torch.empty(nbytes, dtype=torch.uint8)
        _read_into(self.file, start, memoryview(raw.numpy()))  # type: ignore[arg-type]
        return raw.view(self.dtype).view(shape)


def _read_into(path: Path, start: int, out: memoryview) -> None:
    try:
        with path.open("rb", buffering=0) as file:
            file.seek(start)
            done = 0
            while done < len(out):
                # the system reads at most 2 GB at a time
                count = file.readinto(out[done:])
                if not count:
                    raise CheckpointError(f"{path}: ends at byte {start + done}, within a tensor")
                done += count
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error


def stored_tensors(directory: Path) -> dict[str, StoredTensor]:
    """Find every tensor of a checkpoint, by name, in model.safetensors or in the shards that its index lists.

    Raises CheckpointError for missing, truncated or contradictory files, and for checkpoints of pickles.
    """
    single, index = directory / SINGLE, directory / INDEX
    if single.is_file():
        return read_header(single)
    if not index.is_file():
        raise CheckpointError(_nothing_to_read(directory))
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise CheckpointError(f"{index}: weight_map must map tensor names to file names")
    return _from_shards(directory, weight_map)


def _from_shards(directory: Path, weight_map: Mapping[str, str]) -> dict[str, StoredTensor]:
    """Read the headers of all shards. As in transformers, the index names the files, and each file says what it holds.

    If two files hold a tensor of one name, the last file wins. A tensor that the index lists and no file holds is an
    error only if the model needs it (see conversion.py).
    """
    tensors: dict[str, StoredTensor] = {}
    for shard in sorted(set(weight_map.values())):
        if Path(shard).name != shard:
            raise CheckpointError(f"{directory / INDEX}: {shard!r} is not a file of this directory")
        if not (directory / shard).is_file():
            raise CheckpointError(f"{directory / shard}: missing, though {INDEX} lists it")
        tensors |= read_header(directory / shard)
    return tensors


def _nothing_to_read(directory: Path) -> str:
    pickles = sorted(path.name for pattern in _PICKLES for path in directory.glob(pattern))
    if pickles:
        return (
            f"{directory / pickles[0]}: a pickle, which can run code when it is opened, is not read; "
            "convert the checkpoint to safetensors"
        )
    return f"{directory}: has neither {SINGLE} nor {INDEX}"


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Find the tensors of one safetensors file. Raises CheckpointError if header and file do not agree."""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            text = file.read(length) if length <= min(size - 8, _MAX_HEADER_BYTES) else None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
    if text is None:
        raise CheckpointError(f"{path}: truncated, or not safetensors: {size} bytes, and a header of {length}")
    try:
        header = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: its header is not valid JSON") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: its header is not a JSON object")
    header.pop("__metadata__", None)
    tensors = {name: _entry(path, name, fields, base=8 + length) for name, fields in header.items()}
    needed = max((tensor.end for tensor in tensors.values()), default=0)
    if needed > size:
        raise CheckpointError(f"{path}: truncated: {size} bytes, but its header describes {needed}")
    return tensors


def _entry(path: Path, name: str, fields: Any, *, base: int) -> StoredTensor:
    try:
        dtype, shape, (start, end) = fields["dtype"], tuple(fields["shape"]), fields["data_offsets"]
        count = math.prod(shape)
        valid = 0 <= start <= end and all(isinstance(size, int) and size >= 0 for size in shape)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: its header describes {name} wrongly") from error
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise CheckpointError(f"{path}: {name} has the data type {dtype}, which is not supported")
    if not valid or end - start != count * _DTYPES[dtype].itemsize:
        raise CheckpointError(f"{path}: {name} of shape {list(shape)} in {dtype} does not take {end - start} bytes")
    return StoredTensor(file=path, dtype=_DTYPES[dtype], shape=shape, start=base + start, end=base + end)
