"""Finds the layers of a model that keep a state per sequence, and what they keep, by running the model.

Such a layer asks a cache for its states and gives it new ones, by methods that all families of transformers share. A
cache that only records takes the place of the real one, and notes who calls it. So no family's name matters.

Legend: T tokens of the run, H hidden, C channels of a convolution.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

_CACHE_ARGUMENTS = ("cache_params", "past_key_values")
"""Names by which modules of transformers take their cache."""


class StateKind(StrEnum):
    CONVOLUTION = "convolution"
    """The last inputs of a convolution over tokens, [C, kernel size]."""
    RECURRENT = "recurrent"


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """One state that a layer keeps for each sequence. A layer may keep several of a kind, told apart by `index`."""

    kind: StateKind
    index: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count * self.dtype.itemsize


@dataclass(frozen=True, slots=True, kw_only=True)
class StateLayer:
    """A module that keeps states."""

    module: nn.Module
    layer_idx: int
    cache_argument: str
    """Name of the argument of its forward that takes the cache."""
    keeps: tuple[Kept, ...]
    hidden_size: int
    dtype: torch.dtype
    """The dtype of the hidden states that the module gets."""

    @property
    def nbytes(self) -> int:
        """Bytes of one sequence's states."""
        return sum(kept.nbytes for kept in self.keeps)


class UnknownUse(Exception):
    """A module uses its states in a way that cannot be served. The message is one line that says how."""


def find_state_layers(model: nn.Module, run: Callable[[], object]) -> tuple[StateLayer, ...]:
    """Find the layers by one forward pass of `model`, which `run` makes on one sequence and without a cache.

    The layers come in the order in which they run. Raises UnknownUse.
    """
    recorder = _Recorder()
    with _recording(model, recorder):
        run()
    if recorder.complaint is not None:
        raise UnknownUse(recorder.complaint)
    return tuple(
        StateLayer(
            module=module,
            layer_idx=int(module.layer_idx),  # type: ignore[arg-type]
            cache_argument=_cache_argument(module) or "",
            keeps=tuple(kept.values()),
            hidden_size=recorder.inputs[module].shape[-1],
            dtype=recorder.inputs[module].dtype,
        )
        for module, kept in recorder.kept.items()
    )


def _cache_argument(module: nn.Module) -> str | None:
    parameters = inspect.signature(type(module).forward).parameters
    return next((name for name in _CACHE_ARGUMENTS if name in parameters), None)


@contextmanager
def _recording(model: nn.Module, recorder: _Recorder) -> Iterator[None]:
    """While the block runs, every module below a model that takes a cache gets the recorder."""
    handles = []
    for module in model.modules():
        name = _cache_argument(module)
        # a model makes masks from what its cache holds, and hands the cache on; so it must not get the recorder
        if name is None or isinstance(module, PreTrainedModel):
            continue
        handles.append(module.register_forward_pre_hook(recorder.entering(name), with_kwargs=True))
        handles.append(module.register_forward_hook(recorder.leaving, always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@dataclass(slots=True, eq=False)
class _Recorder:
    """Stands for transformers' cache, keeps nothing, and notes which module wants to keep what."""

    kept: dict[nn.Module, dict[tuple[StateKind, int], Kept]] = field(default_factory=dict)
    inputs: dict[nn.Module, Tensor] = field(default_factory=dict)
    """The hidden states [1, T, H] that each module got last."""
    complaint: str | None = None
    _running: list[nn.Module] = field(default_factory=list)
    """Modules that run now, the innermost last."""

    def entering(self, cache_argument: str) -> Callable[..., Any]:
        def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            hidden = args[0] if args else kwargs.get("hidden_states")
            if isinstance(hidden, Tensor):
                self.inputs[module] = hidden
            self._running.append(module)
            at = [*inspect.signature(type(module).forward).parameters].index(cache_argument) - 1
            if at < len(args):
                return (*args[:at], self, *args[at + 1 :]), kwargs
            return args, kwargs | {cache_argument: self}

        return enter

    def leaving(self, module: nn.Module, args: Any, output: Any) -> None:
        self._running.pop()
        if module in self.kept:
            hidden = self.inputs.get(module)
            made = output[0] if isinstance(output, tuple) and output else output
            fits = hidden is not None and isinstance(made, Tensor) and made.shape[:-1] == hidden.shape[:-1]
            if not fits or made.dim() != 3:
                self.complaint = f"{type(module).__name__} keeps states and does not map hidden states to hidden states"

    def _user(self) -> dict[tuple[StateKind, int], Kept]:
        module = self._running[-1]
        if not hasattr(module, "layer_idx"):
            self.complaint = f"{type(module).__name__} keeps states and has no number of its layer"
        return self.kept.setdefault(module, {})

    def _keep(self, kind: StateKind, index: int, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self._user()[kind, index] = Kept(kind=kind, index=index, shape=shape, dtype=dtype)

    def __getattr__(self, name: str) -> Any:
        raise UnknownUse(f"{type(self._running[-1]).__name__} asks its cache for {name}")

    # --- What transformers' modules call ------------------------------------------------------------------------

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        self._user()
        return None

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        self._user()
        return None

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:
        return False

    def is_recording_past(self, layer_idx: int) -> bool:
        return False

    def update_conv_state(
        self, conv_states: Tensor, layer_idx: int, state_idx: int = 0, conv_kernel_size: int | None = None, **_: Any
    ) -> Tensor:
        width = conv_states.shape[-1] if conv_kernel_size is None else conv_kernel_size
        self._keep(StateKind.CONVOLUTION, state_idx, (*conv_states.shape[1:-1], width), conv_states.dtype)
        return with_left_context(None, conv_states, width)

    def update_recurrent_state(self, recurrent_states: Tensor, layer_idx: int, state_idx: int = 0, **_: Any) -> Tensor:
        self._keep(StateKind.RECURRENT, state_idx, tuple(recurrent_states.shape[1:]), recurrent_states.dtype)
        return recurrent_states

    def get_linear_cache(self, layer_idx: int) -> Tensor | None:
        return self.get_recurrent_state(layer_idx)

    def set_linear_cache(self, layer_idx: int, linear_cache: Tensor) -> None:
        self.update_recurrent_state(linear_cache, layer_idx)

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0


def with_left_context(before: Tensor | None, new: Tensor, width: int) -> Tensor:
    """The inputs of a convolution [1, C, T] behind those before them [1, C, width], as transformers' cache joins them.

    Without any before, the result is padded with zeros to `width` at least.
    """
    if before is None:
        return nn.functional.pad(new, (max(0, width - new.shape[-1]), 0))
    return torch.cat([before, new], dim=-1)
