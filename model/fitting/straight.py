"""Runs the parts of a trunk without transformers' code around them.

Around joined layers, a trunk's own code makes masks, looks its configuration up and wraps its output: a thirtieth of a
decode step. What this code does with the parts is recorded in a trial. Then the parts are called alone, if that gives
the same bits for other tokens.

Legend: T tokens of the step, H hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from elastic_moe.model.fitting.attention_half import FittedLayer
from elastic_moe.model.fitting.latent_half import LatentLayer
from elastic_moe.model.fitting.state_layers import FittedStateLayer
from elastic_moe.model.fitting.whole_stack import LayerRun
from elastic_moe.model.operators.trials import OTHERWISE
from elastic_moe.model.states.batch import states_of
from elastic_moe.model.trunk.attention import Window
from elastic_moe.model.trunk.step_batch import ShapeProbe, step_context


@dataclass(slots=True)
class _Now:
    """What the arguments of a step's calls are made of."""

    hidden: Tensor
    """[1, T, H] embedded tokens."""
    position_ids: Tensor
    """[1, T]"""
    embeddings: list[Any]
    """What the rotary modules have returned so far."""


@dataclass(frozen=True, slots=True)
class _Argument:
    """An argument of a module: a constant, or what a step has."""

    kind: str
    value: Any = None
    """The constant, the shape before the tokens, or the number of the rotary module's call."""

    def __call__(self, now: _Now) -> Any:
        if self.kind == "constant":
            return self.value
        if self.kind == "embeddings":
            return now.embeddings[self.value]
        if self.kind == "hidden":
            return now.hidden
        return now.position_ids.expand(*self.value, -1)


@dataclass(frozen=True, slots=True)
class _Arguments:
    """Of a module, by position and by keyword."""

    args: Sequence[_Argument]
    kwargs: Mapping[str, _Argument]

    def __call__(self, now: _Now) -> tuple[list[Any], dict[str, Any]]:
        return [make(now) for make in self.args], {name: make(now) for name, make in self.kwargs.items()}


class StraightTrunk:
    """Calls a trunk's parts one after another: embedding, rotary modules, layers, norm, output head."""

    def __init__(
        self,
        embedding: nn.Module,
        rotary: Sequence[tuple[nn.Module, _Arguments]],
        layers: Sequence[tuple[nn.Module, _Arguments]],
        ends: tuple[nn.Module, nn.Module],
        softcap: float | None,
    ) -> None:
        """`ends`: the norm behind the layers, and the output head."""
        self._embedding = embedding
        self._rotary = rotary
        # most layers are given the same arguments, which are made once
        self._kinds: list[_Arguments] = []
        self._layers: list[tuple[nn.Module, int]] = []
        for layer, arguments in layers:
            if arguments not in self._kinds:
                self._kinds.append(arguments)
            self._layers.append((layer, self._kinds.index(arguments)))
        self._norm, self._head = ends
        self._softcap = softcap

    def __call__(self, input_ids: Tensor, position_ids: Tensor, kept: Tensor | None) -> Tensor:
        """Logits [n, V] of the n tokens `kept`, or of all. `input_ids` and `position_ids`: [1, T]."""
        hidden: Tensor = self._embedding(input_ids)
        now = _Now(hidden, position_ids, [])
        for module, arguments in self._rotary:
            args, kwargs = arguments(now)
            now.embeddings.append(module(*args, **kwargs))
        given = [kind(now) for kind in self._kinds]
        for layer, kind in self._layers:
            args, kwargs = given[kind]
            hidden = layer.forward(hidden, *args, **kwargs)
        hidden = self._norm(hidden)
        return self.capped(self._head(hidden if kept is None else hidden[:, kept]))[0]

    def capped(self, logits: Tensor) -> Tensor:
        return logits if self._softcap is None else torch.tanh(logits / self._softcap) * self._softcap


@dataclass(frozen=True, slots=True)
class _Call:
    """A call of one of a trunk's modules in a trial."""

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    out: Any


@torch.inference_mode()
def find_straight(trunk: Any, lengths_T: list[Tensor]) -> StraightTrunk | None:
    """A trunk's parts without the code around them; None if a trial shows that this code does more than to call them.

    Every decoder layer must be joined. `lengths_T` is that of `rotate_by_length`; its tensor is changed.
    """
    body = trunk.base_model
    lists = [child for child in body.children() if isinstance(child, nn.ModuleList) and len(child)]
    if len(lists) != 1 or not all(_is_joined(layer) for layer in lists[0]):
        return None
    layers, head = list(lists[0]), trunk.get_output_embeddings()
    others = [child for child in (*body.children(), *trunk.children()) if child is not body and child not in lists]
    # code of a layer's own may use whatever it is given
    strict = {layer for layer in layers if isinstance(layer.forward, LatentLayer)}
    found: StraightTrunk | None = None
    try:
        for seed, tokens in ((1, 3), (2, 5), (3, 1)):
            generator = torch.Generator().manual_seed(seed)
            input_ids, position_ids = (torch.randint(64, (1, tokens), generator=generator) for _ in range(2))
            lengths_T[0] = position_ids[0] + 1
            kept = torch.tensor([0, tokens - 1])
            with _recorded(others, layers, head) as calls, step_context(ShapeProbe()), states_of(None):
                logits = trunk(
                    input_ids=input_ids,
                    position_ids=position_ids,
                    attention_mask=torch.ones(1, tokens, dtype=torch.bool),
                    use_cache=False,
                    logits_to_keep=kept,
                ).logits[0]
                expected, calls[:] = list(calls), []
                if found is None:
                    found = _straight(trunk, layers, strict, expected, position_ids, logits)
                    continue
                if not torch.equal(found(input_ids, position_ids, kept), logits):
                    return None
                if not _same_calls(expected, calls, layers):
                    return None
    except OTHERWISE:  # a part is missing, or is called in another way
        return None
    return found


def _is_joined(layer: nn.Module) -> bool:
    """Whether a layer needs no more than its input, cosines and sines, positions, and a mask."""
    return isinstance(layer, LayerRun) or isinstance(layer.forward, FittedLayer | FittedStateLayer | LatentLayer)


@contextmanager
def _recorded(modules: Sequence[nn.Module], layers: Sequence[nn.Module], head: nn.Module) -> Iterator[list[_Call]]:
    """Records the calls of all these modules. Each of the layers returns random numbers of its own, and so does the
    output head: numbers that are large enough for any cap on logits to show."""
    calls: list[_Call] = []
    own = [vars(layer).get("forward") for layer in layers]

    def stand_in(number: int) -> Callable[..., Tensor]:
        def forward(*args: Any, **kwargs: Any) -> Tensor:
            given = args[0] if args else kwargs["hidden_states"]
            made = torch.randn(given.shape, generator=torch.Generator().manual_seed(number)).to(given.dtype)
            calls.append(_Call(layers[number], args, kwargs, made))
            return made

        return forward

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Any:
        if module is head:
            out = 50 * torch.randn(out.shape, generator=torch.Generator().manual_seed(0)).to(out.dtype)
        calls.append(_Call(module, args, kwargs, out))
        return out

    handles = [module.register_forward_hook(note, with_kwargs=True) for module in modules]
    for number, layer in enumerate(layers):
        layer.forward = stand_in(number)
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()
        for layer, forward in zip(layers, own, strict=True):
            del layer.forward
            if forward is not None:
                layer.forward = forward


def _straight(
    trunk: Any,
    layers: Sequence[nn.Module],
    strict: Collection[nn.Module],
    calls: Sequence[_Call],
    position_ids: Tensor,
    logits: Tensor,
) -> StraightTrunk:
    """The parts that a trial has called. Raises ValueError if they do not follow one another."""
    embedding, *rest = calls
    first, last = (next(n for n, call in enumerate(rest) if call.module is layer) for layer in (layers[0], layers[-1]))
    rotary, run, ends = rest[:first], rest[first : last + 1], rest[last + 1 :]
    if [call.module for call in run] != list(layers) or len(ends) != 2:
        raise ValueError("its parts do not follow one another")
    now = _Now(embedding.out, position_ids, [call.out for call in rotary])
    rotary_calls = [(call.module, _arguments(call.args, call.kwargs, now)) for call in rotary]
    layer_calls = []
    for call in run:
        args, kwargs = _beside_input(call)
        layer_calls.append((call.module, _arguments(args, kwargs, now, strict=call.module in strict)))
    softcap = getattr(trunk.config.get_text_config(), "final_logit_softcapping", None)
    for cap in (None, softcap):
        parts = ends[0].module, ends[1].module
        made = StraightTrunk(embedding.module, rotary_calls, layer_calls, parts, cap)
        if torch.equal(made.capped(ends[1].out)[0], logits):
            return made
    raise ValueError("logits are changed behind the output head")


def _beside_input(call: _Call) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A layer's arguments beside its input. None at the end of those by position is left out."""
    args = list(call.args[1:])
    while args and args[-1] is None:
        args.pop()
    return tuple(args), {name: value for name, value in call.kwargs.items() if name != "hidden_states"}


def _arguments(args: Sequence[Any], kwargs: Mapping[str, Any], now: _Now, *, strict: bool = True) -> _Arguments:
    """What arguments are. Raises ValueError if one is something else. Unless `strict`, such a keyword is left out."""
    by_place = [_argument(value, now) for value in args]
    by_name = {name: _argument(value, now) for name, value in kwargs.items()}
    if None in by_place or (strict and None in by_name.values()):
        raise ValueError("an argument is not known")
    return _Arguments(
        args=[made for made in by_place if made is not None],
        kwargs={name: made for name, made in by_name.items() if made is not None},
    )


def _argument(value: Any, now: _Now) -> _Argument | None:
    if value is now.hidden:
        return _Argument("hidden")
    number = next((n for n, made in enumerate(now.embeddings) if made is value), None)
    if number is not None:
        return _Argument("embeddings", number)
    if value is None or isinstance(value, bool | int | float | str | Window):
        return _Argument("constant", value)
    if isinstance(value, Tensor) and value.shape[-1:] == now.position_ids.shape[-1:]:
        before = tuple(value.shape[:-1])
        if value.dtype == now.position_ids.dtype and torch.equal(now.position_ids.expand(*before, -1), value):
            return _Argument("positions", before)
    return None


def _same_calls(expected: Sequence[_Call], calls: Sequence[_Call], layers: Sequence[nn.Module]) -> bool:
    """Whether the layers were given the same in both, but for arguments that were left out."""
    theirs, ours = ([call for call in some if call.module in layers] for some in (expected, calls))
    if [call.module for call in theirs] != [call.module for call in ours]:
        return False
    for their, our in zip(theirs, ours, strict=True):
        before, after = their.args[0] if their.args else their.kwargs["hidden_states"], our.args[0]
        (their_args, their_kwargs), (our_args, our_kwargs) = _beside_input(their), _beside_input(our)
        if not torch.equal(before, after) or not _equal(their_args, our_args):
            return False
        if not all(_equal(their_kwargs.get(name), value) for name, value in our_kwargs.items()):
            return False
    return True


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, tuple | list) and isinstance(other, tuple | list):
        return len(one) == len(other) and all(map(_equal, one, other))
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return torch.equal(one, other)
    return not isinstance(one, Tensor) and one == other
