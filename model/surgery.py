"""Gives a trunk the form in which this machine runs it fastest; what it computes stays the same."""

from __future__ import annotations

from torch import nn

from model.linear import pack_linears
from model.native import library
from model.native.trunk import fit_trunk, has_native_form


def fit(trunk: nn.Module) -> int:
    """Pack the trunk's matrices and join its small operators, in place. Returns the bytes of packed weights."""
    packed_bytes = pack_linears(trunk)
    lib = library() if has_native_form(trunk) else None
    return packed_bytes if lib is None else packed_bytes + fit_trunk(lib, trunk)
