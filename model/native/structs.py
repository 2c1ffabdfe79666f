"""Mirrors the structures that native functions read, as their .cpp files declare them. Loading compares their sizes."""

from __future__ import annotations

import ctypes


class Norm(ctypes.Structure):
    """See block.h."""

    _fields_ = (
        ("weight", ctypes.c_void_p),
        ("size", ctypes.c_int64),
        ("epsilon", ctypes.c_float),
        ("rounds", ctypes.c_int32),
        ("centred", ctypes.c_int64),
        ("bias", ctypes.c_void_p),
    )


class Matrix(ctypes.Structure):
    """See linear.h."""

    _fields_ = (("packed", ctypes.c_void_p), ("bias", ctypes.c_void_p), ("form", ctypes.c_int64))


class Block(ctypes.Structure):
    """See block.cpp."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("hidden", "heads", "key_heads", "key_size", "value_size")),
        *((name, Norm) for name in ("before", "query_norm", "key_norm", "value_norm", "behind", "after")),
        *((name, Matrix) for name in ("query", "key", "value", "out")),
        ("sinks", ctypes.c_void_p),
        *((name, ctypes.c_float) for name in ("scale", "factor")),
        *((name, ctypes.c_int32) for name in ("gated", "turns_first")),
    )


class Head(ctypes.Structure):
    """See block.h."""

    _fields_ = (("depth", ctypes.c_int64), ("columns", ctypes.c_int64), ("matrix", Matrix))


class LatentBlock(ctypes.Structure):
    """See latent_block.cpp."""

    _fields_ = (
        *(
            (name, ctypes.c_int64)
            for name in ("hidden", "heads", "query_rank", "made", "rotated", "latent", "value_size")
        ),
        *((name, Norm) for name in ("before", "query_norm", "latent_norm", "after")),
        *((name, Matrix) for name in ("query_down", "query", "latents", "out")),
        *((name, ctypes.c_void_p) for name in ("key_up", "value_up")),
        ("scale", ctypes.c_float),
        ("pairs", ctypes.c_int32),
    )


class Layer(ctypes.Structure):
    """See layers.cpp."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("block", "router", "router_bias")),
        *((name, ctypes.c_int64) for name in ("num_experts", "top_k")),
        *((name, ctypes.c_int32) for name in ("normalise", "rounds")),
        *((name, ctypes.c_void_p) for name in ("keys", "values")),
    )


class Experts(ctypes.Structure):
    """See layers.cpp."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("width", "num_experts")),
        ("tables", ctypes.c_void_p),
        *((name, ctypes.c_int32) for name in ("bits", "interleaved", "gate")),
        *((name, ctypes.c_float) for name in ("alpha", "limit")),
        *((name, ctypes.c_void_p) for name in ("supply", "routes")),
    )


class FeedForward(ctypes.Structure):
    """See layers.cpp."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("hidden", "num_experts", "top_k", "width")),
        *((name, ctypes.c_void_p) for name in ("router", "router_bias", "added")),
        *((name, ctypes.c_int64) for name in ("groups", "top_groups", "best")),
        *((name, ctypes.c_int32) for name in ("scored", "wide", "logistic", "normalise", "rounds", "gelu")),
        ("scale", ctypes.c_float),
        *((name, Matrix) for name in ("gate", "up", "down")),
        ("share", ctypes.c_void_p),
    )


class StateProduct(ctypes.Structure):
    """See state_block.cpp."""

    _fields_ = (("matrix", Matrix), *((name, ctypes.c_int64) for name in ("columns", "depth", "source")))


class StateColumns(ctypes.Structure):
    """See state_block.cpp."""

    _fields_ = tuple((name, ctypes.c_int64) for name in ("product", "first", "count", "at"))


class StateBlock(ctypes.Structure):
    """See state_block.cpp."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("hidden", "kind", "num_products", "num_columns")),
        *((name, ctypes.c_void_p) for name in ("products", "columns")),
        *((name, Norm) for name in ("before", "after")),
        *((name, ctypes.c_int64) for name in ("channels", "taps_width")),
        *((name, ctypes.c_void_p) for name in ("taps", "taps_bias")),
        *((name, ctypes.c_int64) for name in ("key_heads", "value_heads", "key_size", "value_size")),
        *((name, ctypes.c_int64) for name in ("by_channel", "decays")),
        *((name, ctypes.c_void_p) for name in ("rates", "shift", "skip")),
        *((name, ctypes.c_float) for name in ("least", "most")),
        *((name, ctypes.c_int64) for name in ("norm_size", "norm_group")),
        ("norm_weight", ctypes.c_void_p),
        ("norm_epsilon", ctypes.c_float),
        *((name, ctypes.c_int32) for name in ("silu", "norm_rounds", "gate_first", "gate_silu")),
        ("out", Matrix),
    )


class TwoParts(ctypes.Structure):
    """See layers.cpp."""

    _fields_ = (
        ("half", FeedForward),
        *((name, Norm) for name in ("router_norm", "behind_shared", "before_experts")),
        *((name, Norm) for name in ("behind_experts", "behind")),
        *((name, ctypes.c_void_p) for name in ("columns", "scales")),
        *((name, ctypes.c_float) for name in ("router_factor", "factor")),
    )


SUPPLY_NEXT = ctypes.CFUNCTYPE(
    ctypes.c_int64,
    ctypes.c_int64,
    ctypes.c_int64,
    *[ctypes.POINTER(ctypes.c_int64)] * 3,
)
"""(layer, count, experts, rows or null, ready) -> number of ready experts; see experts.h."""


class Supply(ctypes.Structure):
    """See experts.h."""

    _fields_ = (
        ("next", SUPPLY_NEXT),
        ("layer", ctypes.c_int64),
        ("log", ctypes.POINTER(ctypes.c_int64)),
        *((name, ctypes.c_int64) for name in ("log_size", "log_used")),
    )


class SequenceRow(ctypes.Structure):
    """See attention.cpp. It is a row of NativeBatch's tensor of int64 numbers."""

    _fields_ = tuple((name, ctypes.c_int64) for name in ("row", "start", "end", "table"))


MIRRORED: dict[str, tuple[type[ctypes.Structure], ...]] = {
    "emoe_attention_sizes": (SequenceRow,),
    "emoe_block_sizes": (Norm, Matrix, Block, Head),
    "emoe_latent_block_sizes": (LatentBlock,),
    "emoe_layers_sizes": (Layer, Experts, FeedForward, TwoParts),
    "emoe_state_block_sizes": (StateProduct, StateColumns, StateBlock),
    "emoe_experts_sizes": (Supply,),
}
"""Function of the library that writes the bytes of its structures -> the same structures here."""


def mismatch(library: ctypes.CDLL, mirrored: dict[str, tuple[type[ctypes.Structure], ...]]) -> str | None:
    """Says which structure has another size in the library than in `mirrored`; None if all agree."""
    for function, structures in mirrored.items():
        sizes = (ctypes.c_int64 * len(structures))()
        getattr(library, function)(sizes)
        for structure, size in zip(structures, sizes, strict=True):
            if size != ctypes.sizeof(structure):
                return (
                    f"{structure.__name__} takes {size} bytes in the library and {ctypes.sizeof(structure)} in "
                    "model/native/structs.py"
                )
    return None
