"""Recognises norms by what they compute, and gives them native code: those with a gate, layer norms, and others."""

from __future__ import annotations

import ctypes
import inspect
import itertools
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from elastic_moe.cluster.fit import CodePath, FitNotes, Part
from elastic_moe.model.native.block import BareNorm, GatedNorm, Norm
from elastic_moe.model.operators.trials import OTHERWISE
from elastic_moe.model.rms_norm import GatedRmsNorm, LayerNorm, RmsNorm


class MakeNorm(Protocol):
    def __call__(self, *, formula: RmsNorm) -> Callable[[Tensor], Tensor]: ...


def fit_norm(module: nn.Module, make: MakeNorm, path: CodePath, notes: FitNotes) -> None:
    """Give the module a forward that `make` makes, if it is recognised as a norm."""
    found = find_norm(module)
    kind = type(module).__name__
    if not isinstance(found, str):
        module.forward = make(formula=found)
        notes.add(Part.NORMS, kind, path)
    elif "norm" in kind.lower():
        # the name decides only whether the report mentions the module
        notes.add(Part.NORMS, kind, CodePath.TRANSFORMERS, found)


def fit_other_norms(lib: ctypes.CDLL, module: nn.Module, notes: FitNotes) -> bool:
    """Give the module a native forward if it is recognised as a norm with a gate, a layer norm, or one without
    weights.
    """
    gated = _find_gated_norm(module)
    layer = _find_layer_norm(module)
    epsilon = _find_bare_norm(module)
    if gated is not None:
        module.forward = GatedNorm(lib=lib, formula=gated, original=module.forward)
    elif layer is not None:
        module.forward = Norm(lib=lib, formula=layer)
    elif epsilon is not None:
        module.forward = BareNorm(lib=lib, epsilon=epsilon)
    else:
        return False
    notes.add(Part.NORMS, type(module).__name__, CodePath.NATIVE)
    return True


def _find_layer_norm(module: nn.Module) -> LayerNorm | None:
    """What the module makes of bfloat16 rows if it is a layer normalisation with a weight, and with a bias or none."""
    own = dict(module.named_parameters())
    weight, bias = own.pop("weight", None), own.pop("bias", None)
    if weight is None or weight.dim() != 1 or own or not _takes_rows(module):
        return None
    if bias is not None and bias.shape != weight.shape:
        return None
    wide = [None if v is None else v.detach().float().contiguous() for v in (weight, bias)]
    probe = _rows_of_all_sizes(len(weight)) + 1  # a mean to take off
    try:
        expected = module(probe)
    except OTHERWISE:
        return None
    for epsilon in _constants(module):
        assert wide[0] is not None
        formula = LayerNorm(weight=wide[0], bias=wide[1], epsilon=epsilon)
        if _nearly_same(formula(probe), expected):
            return formula
    return None


def _find_bare_norm(module: nn.Module) -> float | None:
    """The epsilon of a normalisation by the root mean square without weights; None if the module is none."""
    parts = [*module.parameters(), *module.children()]
    if parts or not _constants(module) or not _takes_rows(module):
        return None
    probe = _rows_of_all_sizes(32)
    try:
        expected = module(probe)
    except OTHERWISE:
        return None
    for epsilon in _constants(module):
        formula = RmsNorm(weight=torch.ones(32, dtype=torch.float32), epsilon=epsilon, rounds=False)
        if _nearly_same(formula(probe), expected):
            return epsilon
    return None


def _takes_rows(module: nn.Module) -> bool:
    return len(inspect.signature(module.forward).parameters) == 1


def _constants(module: nn.Module) -> list[float]:
    return [v for v in vars(module).values() if isinstance(v, float)]


def _rows_of_all_sizes(columns: int) -> Tensor:
    """Eight random rows, whose numbers are small in the first and large in the last."""
    sizes = torch.logspace(-2, 2, 8)[:, None]
    return (torch.randn(8, columns, generator=torch.Generator().manual_seed(0)) * sizes).bfloat16()


def _nearly_same(got: Tensor, expected: Any) -> bool:
    """Whether all values are the same but for a few roundings to bfloat16: sums are added up in another order."""
    if not isinstance(expected, Tensor) or expected.dtype != torch.bfloat16 or expected.shape != got.shape:
        return False
    few = (got != expected).sum() <= got.numel() // 100
    return bool(few) and torch.allclose(got.float(), expected.float(), rtol=2**-7, atol=1e-5)


def _find_gated_norm(module: nn.Module) -> GatedRmsNorm | None:
    """What the module makes of rows and of a gate in bfloat16; None if no formula gives the same."""
    parameters = list(module.parameters())
    if len(parameters) != 1 or parameters[0].dim() != 1 or len(inspect.signature(module.forward).parameters) != 2:
        return None
    weight = parameters[0].detach()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(8, len(weight), generator=generator) * torch.logspace(-2, 2, 8)[:, None]
    probe, gate = x.bfloat16(), torch.randn(x.shape, generator=generator).bfloat16()
    try:
        expected = module(probe, gate)
    except OTHERWISE:
        return None
    if not isinstance(expected, Tensor) or expected.dtype != torch.bfloat16 or expected.shape != probe.shape:
        return None
    numbers = vars(module).values()
    groups = {len(weight), *(v for v in numbers if type(v) is int and v > 0 and len(weight) % v == 0)}
    constants = [v for v in numbers if isinstance(v, float)]
    for epsilon, group, flags in itertools.product(
        constants, sorted(groups), itertools.product((True, False), repeat=3)
    ):
        rounds, gate_first, silu = flags
        formula = GatedRmsNorm(
            weight=weight.float().contiguous(),
            epsilon=epsilon,
            group=group,
            rounds=rounds,
            gate_first=gate_first,
            silu=silu,
        )
        if torch.equal(formula(probe, gate), expected):
            return formula
    return None


def find_norm(module: nn.Module) -> RmsNorm | str:
    """What the module computes in bfloat16; otherwise the reason why it is not recognised as a norm."""
    parameters = list(module.parameters())
    if len(parameters) != 1 or parameters[0].dim() != 1 or list(module.children()):
        return "it has other parameters than one vector"
    weight = parameters[0].detach()
    if len(inspect.signature(module.forward).parameters) != 1:
        return "it takes other arguments than rows"
    probe = torch.randn(8, len(weight), generator=torch.Generator().manual_seed(0)) * torch.logspace(-2, 2, 8)[:, None]
    probe = probe.bfloat16().to(weight.device)
    try:
        expected = module(probe)
    except (RuntimeError, TypeError, ValueError) as error:  # it expects something else than rows
        return f"a trial call failed with {type(error).__name__}"
    if not isinstance(expected, Tensor) or expected.dtype != torch.bfloat16 or expected.shape != probe.shape:
        return "it does not make bfloat16 rows of bfloat16 rows"
    constants = [float(v) for v in vars(module).values() if isinstance(v, float)]
    factors = [factor.contiguous() for factor in (weight.float(), 1 + weight.float())]
    for factor, epsilon, rounds in itertools.product(factors, constants, (True, False)):
        formula = RmsNorm(weight=factor, epsilon=epsilon, rounds=rounds)
        if torch.equal(formula(probe), expected):
            return formula
    return "no formula of a root mean square normalisation gives its values"
