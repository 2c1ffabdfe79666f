"""Gives a trunk the form in which this machine runs it fastest; what it computes stays the same."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from model.layer_runs import join_layers
from model.linear import pack_linears
from model.native import library
from model.native.trunk import fit_trunk, has_native_form
from model.native_layers import fit_layers


def fit(trunk: nn.Module, experts: Sequence[nn.Module]) -> int:
    """Pack the trunk's matrices and join its small operators, in place. Returns the bytes of packed weights.

    `experts` are its expert modules, which must be attached to somebody afterwards.
    """
    packed_bytes = pack_linears(trunk)
    lib = library() if has_native_form(trunk) else None
    if lib is not None:
        packed_bytes += fit_trunk(lib, trunk)
        join_layers(trunk, fit_layers(lib, trunk, experts), experts)
    return packed_bytes
