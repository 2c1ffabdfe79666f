"""Bounds on the numbers of a configuration, so that a wrong one costs an error line and not minutes or all memory.

transformers makes lists and modules as long as the configuration says, before anybody compares it with the files.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch.overrides import TorchFunctionMode

from elastic_moe.cluster.errors import CheckpointError
from elastic_moe.cluster.lines import counted

BUILDING_S = 10.0
"""Seconds of CPU time that building a model without its weights may take. The largest published models take about one.
"""

MOST_POSITIONS = 2**31 - 1

_LAYERS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers")
_MORE_LAYERS = (
    *("encoder_layers", "decoder_layers", "num_encoder_layers", "num_decoder_layers", "num_nextn_predict_layers"),
)
_SPARE_LAYERS = 16
_LAYERS_WITHOUT_FILES = 1000
_MOST_LABELS = 100_000
"""transformers makes a name for each label, though a language model has no labels."""
_NUMBER = re.compile(r"(?:^|\.)(\d{1,9})(?:\.|$)")


def check_counts(file: Path, raw: Mapping[str, Any], names: Iterable[str] | None) -> None:
    """Compare the numbers of layers in the configuration `raw` with the `names` of stored tensors (None if unknown).

    Raises CheckpointError, which names the field of `file`, if a number of layers is below 1 or far above that of the
    stored tensors.
    """
    stored = None if names is None else _stored_layers(names)
    most = _LAYERS_WITHOUT_FILES if stored is None else 2 * stored + _SPARE_LAYERS
    found = "" if stored is None else f"; the files have {stored}"
    for name, value in _numbers(raw):
        field = name.rpartition(".")[2]
        if field in _LAYERS and value < 1:
            raise CheckpointError(f"{file}: {name}: expected at least 1 layer, found {value}")
        if field in (*_LAYERS, *_MORE_LAYERS) and value > most:
            raise CheckpointError(f"{file}: {name}: expected at most {counted(most, 'layer')}{found}; found {value}")
        if field == "num_labels" and not 0 <= value <= _MOST_LABELS:
            raise CheckpointError(f"{file}: {name}: expected a number from 0 to {_MOST_LABELS}, found {value}")


def _numbers(raw: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """Yield every number of the configuration with its dotted name, also those of a nested configuration."""
    for key, value in raw.items():
        if isinstance(value, dict):
            yield from _numbers(value, f"{prefix}{key}.")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield f"{prefix}{key}", value


def _stored_layers(names: Iterable[str]) -> int:
    """One more than the highest layer number. A layer number is the first number in a tensor's name."""
    numbers = (match for name in names if (match := _NUMBER.search(name)))
    return max((int(match[1]) + 1 for match in numbers), default=0)


class BuildingTakesTooLong(RuntimeError):
    """The model that is being built is far larger than any published one."""


class WithinCpuTime(TorchFunctionMode):
    """Within the block, this thread's calls of torch raise BuildingTakesTooLong after `seconds` of CPU time.

    The thread's CPU time counts, so that a busy machine makes no difference.
    """

    def __init__(self, seconds: float = BUILDING_S, clock: Callable[[], float] = time.thread_time) -> None:
        super().__init__()
        self._seconds = seconds
        self._clock = clock
        self._end = clock() + seconds

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self._clock() > self._end:
            raise BuildingTakesTooLong(f"building it takes more than {self._seconds:.0f} s of computing")
        return func(*args, **(kwargs or {}))
