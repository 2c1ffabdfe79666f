"""Runs a layer that keeps states over the packed tokens of a step.

A layer that is recognised runs all of them in one native call (model/states/block.py). transformers' code would hand
the state of one packed sequence on to the next one. So it gets the sequences apart: those with one token each as one
batch, and the others one by one.

Legend: T tokens of the step, R sequences with one token, H hidden.
"""

from __future__ import annotations

import ctypes
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from elastic_moe.model.states.batch import Decodes, Piece, StateBatch, current_states, states_of
from elastic_moe.model.states.block import StateBlock
from elastic_moe.model.states.finding import Kept, StateKind, StateLayer, with_left_context
from elastic_moe.model.states.recurrent import Slots
from elastic_moe.model.states.rules import replace_functions, scans_begin_with, slots_in_use
from elastic_moe.model.states.store import StateMove, States

_OTHERWISE = (RuntimeError, TypeError, ValueError, LookupError, AttributeError, AssertionError)
"""Errors that a trial raises if a layer's code expects something else."""


class SequenceCache:
    """What transformers' code takes for its cache: the states of one layer, of one sequence or of a batch."""

    def __init__(self, states: States) -> None:
        """`states` is empty at the beginning of sequences. Afterwards it holds the new states."""
        self.states = states

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        return self.states.get((StateKind.CONVOLUTION, state_idx))

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        return self.states.get((StateKind.RECURRENT, state_idx))

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:
        return bool(self.states)

    def is_recording_past(self, layer_idx: int) -> bool:
        return False

    def update_conv_state(
        self, conv_states: Tensor, layer_idx: int, state_idx: int = 0, conv_kernel_size: int | None = None, **_: Any
    ) -> Tensor:
        key = StateKind.CONVOLUTION, state_idx
        width = conv_states.shape[-1] if conv_kernel_size is None else conv_kernel_size
        inputs = with_left_context(self.states.get(key), conv_states, width)
        self.states[key] = inputs[..., -width:]
        return inputs

    def update_recurrent_state(self, recurrent_states: Tensor, layer_idx: int, state_idx: int = 0, **_: Any) -> Tensor:
        self.states[StateKind.RECURRENT, state_idx] = recurrent_states
        return recurrent_states

    # MiniMax-Text-01 has names of its own
    def get_linear_cache(self, layer_idx: int) -> Tensor | None:
        return self.get_recurrent_state(layer_idx)

    def set_linear_cache(self, layer_idx: int, linear_cache: Tensor) -> None:
        self.update_recurrent_state(linear_cache, layer_idx)


class PackedStates:
    """The forward of a layer that keeps states, for packed tokens. Outside of a step it calls the original."""

    def __init__(self, layer: StateLayer, number: int, lib: ctypes.CDLL | None = None) -> None:
        """`number`: the layer's place in the store. `lib` is used if it computes single tokens as the layer does."""
        self._original: Callable[..., Any] = layer.module.forward
        self._cache_argument = layer.cache_argument
        self._required = _without_default(layer)
        """Arguments that the original wants to have, and does not use."""
        self._makes_pair = False
        """Whether the original returns something beside hidden states, such as attention weights."""
        replace_functions(layer.module, lib)
        self.native: tuple[StateKind, ...] = () if lib is None else self._find_native(layer)
        """Kinds of states that native code updates for single tokens."""
        self.scans: set[str] | None = None
        """Scans that native code computes over the tokens of a prompt; None if it computes none."""
        self.scans = None if lib is None else self._find_scans(layer)
        self.block: StateBlock | None = None
        """Runs all tokens in one native call. It is None if the layer's own code runs them."""
        self.number = number
        self._layer = layer
        self.goes_on = self._goes_on(layer)
        """Whether several tokens can go on from a state at once."""

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        batch = current_states()
        if batch is None:
            return self._original(hidden_states, *args, **kwargs)
        slots = batch.store.layers[self.number]
        if self.block is not None:
            out = self.block(hidden_states[0].contiguous(), batch.segments, *slots_of(slots))[None]
        else:
            # no token is padding, so the mask says nothing; what has a row for each token would not fit the parts
            settings = {
                name: value
                for name, value in kwargs.items()
                if name != self._cache_argument and not isinstance(value, Tensor | tuple)
            }
            out = self._run_parts(batch, slots, hidden_states, settings)
        return (out, None) if self._makes_pair else out

    def _run_parts(self, batch: StateBatch, slots: States, hidden: Tensor, settings: dict[str, Any]) -> Tensor:
        """Run the layer's own code on the sequences apart: [1, T, H]."""
        parts: list[tuple[Any, Tensor]] = []
        if batch.decodes is not None:
            rows = batch.decodes.rows
            made = self._step(hidden[0, rows][:, None], batch.decodes, slots, settings, self.native)[:, 0]
            if not batch.pieces:
                return made[None]
            parts.append((rows, made))
        parts += [
            (slice(piece.begin, piece.end), self._piece(piece, slots, hidden, settings)) for piece in batch.pieces
        ]
        out = parts[0][1].new_empty(1, hidden.shape[1], parts[0][1].shape[-1])
        for rows, values in parts:
            out[0, rows] = values
        return out

    @torch.inference_mode()
    def join(self, block: StateBlock) -> bool:
        """Run all tokens by `block` from now on, if it gives the values of the layer's own code. Returns if it does.

        The same step is run by the layer's own code, with its native functions, and by `block`.
        """
        if set(self.native) != set(StateKind):
            return False
        results = []
        for candidate in (None, block):
            trial = Trial.of(self._layer, self.number)
            try:
                with states_of(trial.batch):
                    self.block = candidate
                    out = self(trial.hidden)
            except _OTHERWISE:
                break
            finally:
                self.block = None
            results.append([out[0] if isinstance(out, tuple) else out, *trial.states.values()])
        if len(results) == 2 and all(map(_close, *results)):
            self.block = block
        return self.block is not None

    def _step(
        self,
        hidden_R1H: Tensor,
        decodes: Decodes,
        slots: States,
        settings: dict[str, Any],
        native: Sequence[StateKind],
    ) -> Tensor:
        """Run one token of R sequences, and move their states: [R, 1, H]."""
        sources, targets = decodes.sources, decodes.targets
        # native code reads states where they lie, and writes them where they belong
        apart = {
            kind: Slots(states=slots[kind, 0], sources=sources, targets=targets)
            for kind in native
            if (kind, 0) in slots
        }
        cache = SequenceCache(
            {key: tensor[:0] if key[0] in apart else tensor.index_select(0, sources) for key, tensor in slots.items()}
        )
        with slots_in_use(apart):
            out = self._call(hidden_R1H, cache, settings)
        for key, tensor in slots.items():
            if key[0] not in apart:
                tensor.index_copy_(0, targets, cache.states[key])
        _keep_snapshots(decodes, slots)
        return out

    def _piece(self, piece: Piece, slots: States, hidden: Tensor, settings: dict[str, Any]) -> Tensor:
        """[tokens of the piece, H]"""
        source = piece.move.source
        begin = {} if source is None else {key: tensor[source : source + 1].clone() for key, tensor in slots.items()}
        cache = SequenceCache(begin)
        outputs: list[Tensor] = []
        at = piece.begin
        for tokens, slot in (*piece.move.snapshots, (piece.end - piece.begin, piece.move.target)):
            end = piece.begin + tokens
            while at < end:
                # the first tokens of a sequence need no state, so that any code can run them at once
                upto = end if self.goes_on or not cache.states else at + 1
                outputs.append(self._run(hidden[:, at:upto], cache, settings)[0])
                at = upto
            for key, tensor in slots.items():
                tensor[slot] = cache.states[key][0]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    # --- Trials -------------------------------------------------------------------------------------------------

    def _find_native(self, layer: StateLayer) -> tuple[StateKind, ...]:
        """The kinds of states for which native code agrees with the layer's own, to some roundings."""
        usable = {
            StateKind.CONVOLUTION: all(kept.dtype == torch.bfloat16 for kept in _of(layer, StateKind.CONVOLUTION)),
            StateKind.RECURRENT: all(kept.dtype == torch.float32 for kept in _of(layer, StateKind.RECURRENT)),
        }
        return tuple(
            kind for kind in StateKind if usable[kind] and len(_of(layer, kind)) == 1 and self._agrees(layer, kind)
        )

    @torch.inference_mode()
    def _agrees(self, layer: StateLayer, kind: StateKind) -> bool:
        """Whether native code for states of one kind gives the layer's own values, for single tokens."""
        slots = _random_states(layer, 4)
        rows = torch.arange(2)
        decodes = Decodes(rows=rows, sources=rows, targets=rows + 2, snapshots=())
        results = []
        for native in ((), (kind,)):
            after = {key: tensor.clone() for key, tensor in slots.items()}
            try:
                out = self._step(_random_hidden(layer, 2, 1), decodes, after, {}, native)
            except _OTHERWISE:
                return False
            results.append([out, *after.values()])
        return all(_close(*pair) for pair in zip(*results, strict=True))

    @torch.inference_mode()
    def _find_scans(self, layer: StateLayer) -> set[str] | None:
        """The native scans, if they give the layer's own values for several tokens, at the beginning and later."""
        used: set[str] = set()
        results = []
        for native in (None, used):
            self.scans = native
            made: list[Tensor] = []
            try:
                for states in ({}, _random_states(layer, 1)):
                    cache = SequenceCache(dict(states))
                    made.append(self._run(_random_hidden(layer, 1, 5), cache, {}))
                    made += [cache.states[key] for key in _keys(layer)]
            except _OTHERWISE:
                return None
            results.append(made)
        return used if used and all(_close(*pair) for pair in zip(*results, strict=True)) else None

    @torch.inference_mode()
    def _goes_on(self, layer: StateLayer) -> bool:
        """Whether two tokens at once do with a state what they do one by one. Some code ignores it."""
        hidden = _random_hidden(layer, 1, 2)
        results = []
        for parts in ([hidden], [hidden[:, :1], hidden[:, 1:]]):
            cache = SequenceCache(_random_states(layer, 1))
            outputs = [self._run(part, cache, {}) for part in parts]
            results.append([torch.cat(outputs, dim=1), *(cache.states[key] for key in _keys(layer))])
        return all(_close(*pair) for pair in zip(*results, strict=True))

    def _run(self, hidden: Tensor, cache: SequenceCache, settings: dict[str, Any]) -> Tensor:
        """Run some tokens of one sequence: [1, T, H]."""
        with scans_begin_with(cache.states.get((StateKind.RECURRENT, 0)), self.scans):
            return self._call(hidden, cache, settings)

    def _call(self, hidden: Tensor, cache: SequenceCache, settings: dict[str, Any]) -> Tensor:
        out = self._original(hidden, **(self._required | settings | {self._cache_argument: cache}))
        self._makes_pair = isinstance(out, tuple)
        made: Tensor = out[0] if self._makes_pair else out
        return made


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """A step of random tokens and states: single tokens, prompts from their beginning and from a state, snapshots."""

    batch: StateBatch
    hidden: Tensor
    """[1, T, H]"""
    states: States

    @classmethod
    def of(cls, layer: StateLayer, number: int) -> Trial:
        """`number`: the layer's place in the store. The same values each time."""
        moves = [
            (1, StateMove(source=0, target=3, snapshots=((1, 4),))),
            (5, StateMove(source=None, target=5, snapshots=((2, 6), (5, 7)))),
            (1, StateMove(source=1, target=8)),
            (3, StateMove(source=2, target=9)),
        ]
        states = _random_states(layer, 10)
        # a store has more than a batch needs
        store: Any = _Store(layers={number: states})
        return cls(
            batch=StateBatch.build(moves, store, torch.device("cpu")),
            hidden=_random_hidden(layer, 1, sum(length for length, _ in moves)),
            states=states,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Store:
    """Stands for a StateStore."""

    layers: dict[int, States]


def slots_of(states: States) -> tuple[Tensor, Tensor]:
    """What a StateBlock takes: the states of the layer's convolution, and its recurrent ones."""
    return states[StateKind.CONVOLUTION, 0], states[StateKind.RECURRENT, 0]


def _keep_snapshots(decodes: Decodes, slots: States) -> None:
    for target, slot in decodes.snapshots:
        for tensor in slots.values():
            tensor[slot] = tensor[target]


def _without_default(layer: StateLayer) -> dict[str, None]:
    parameters = list(inspect.signature(layer.module.forward).parameters.values())[1:]
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return {p.name: None for p in parameters if p.default is p.empty and p.kind in kinds}


def _of(layer: StateLayer, kind: StateKind) -> list[Kept]:
    return [kept for kept in layer.keeps if kept.kind is kind]


def _keys(layer: StateLayer) -> list[tuple[StateKind, int]]:
    return [(kept.kind, kept.index) for kept in layer.keeps]


def _random_states(layer: StateLayer, count: int) -> States:
    return {(kept.kind, kept.index): _random(layer, (count, *kept.shape), kept.dtype) for kept in layer.keeps}


def _random_hidden(layer: StateLayer, sequences: int, tokens: int) -> Tensor:
    return _random(layer, (sequences, tokens, layer.hidden_size), layer.dtype)


def _random(layer: StateLayer, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    device = next(layer.module.parameters()).device
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(device, dtype)


def _close(a: Tensor, b: Tensor) -> bool:
    """Whether two results are the same but for roundings to 8 bits."""
    return bool((a.float() - b.float()).abs().max() <= 2**-5 * a.float().abs().max())
