"""Chooses the code that serves a model on this machine: every choice of a path is made here, in `fit`.

    part             the paths, fastest first
    layers           all in one native call (whole_stack.py); one after another
    attention half   a layer's half in one native call (attention_half.py, latent_half.py, state_layers.py); module by
                     module
    attention        native (native/attention.py); FlashAttention (trunk/flash.py), with a kernel for single tokens
                     (gpu/decode.py); matrix products (trunk/attention.py)
    router, norms,   native, or kernels on GPUs (small_ops.py, model/operators/), if a module is recognised
    rotary           by what it computes; transformers' own code
    states           all tokens of a layer in one native call (state_layers.py); native for single tokens and scans
                     (states/rules.py); transformers' own code
    feed-forward     router, experts and shared expert in one native call (feed_forward.py); module by module
    linears          native panels; oneDNN's layout; plain matrices (trunk/linear.py)
    experts          on CPU native or PyTorch, expert by expert (experts/cpu.py); on GPUs stacked (experts/stacked.py)
    exchange         native (native/exchange.py); PyTorch's operators around a transport (exchange/dispatch.py)

All paths of a part compute the same. A function that tries a path returns it, or a sentence that says why the path
cannot be used. These sentences are the reasons of the FitReport (cluster/fit.py).
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from elastic_moe.cluster.errors import UserError
from elastic_moe.cluster.expert_forms import ExpertForm
from elastic_moe.cluster.fit import CodePath, FitNotes, FitReport, Part, PartFit
from elastic_moe.model.experts.cpu import CpuExperts, not_native
from elastic_moe.model.experts.interface import LayerExperts
from elastic_moe.model.experts.stacked import StackedExperts
from elastic_moe.model.experts.tiered_stacks import TieredStacks
from elastic_moe.model.experts.unpacking import Packing
from elastic_moe.model.fitting.attention_half import FittedLayer, decoder_layers, fit_layers
from elastic_moe.model.fitting.feed_forward import join_feed_forwards
from elastic_moe.model.fitting.latent_half import LatentLayer
from elastic_moe.model.fitting.latents import LatentLayers, cache_latents, watch_expansions
from elastic_moe.model.fitting.probe import TrunkShapes, probe_shapes
from elastic_moe.model.fitting.small_ops import fit_gpu_trunk, fit_trunk
from elastic_moe.model.fitting.state_layers import FittedStateLayer, fit_states, join_state_halves, join_states
from elastic_moe.model.fitting.whole_stack import join_layers
from elastic_moe.model.gpu.refusals import gpu_refusal
from elastic_moe.model.native import attention as native_attention
from elastic_moe.model.native import library, unavailable
from elastic_moe.model.native.experts import NativeExperts, find_gate
from elastic_moe.model.native.refusals import native_refusal
from elastic_moe.model.states.finding import StateLayer
from elastic_moe.model.trunk.attention_path import MATMUL, AttentionPath, KVShape, VarlenVariant
from elastic_moe.model.trunk.flash import find_variant, singles_are_right
from elastic_moe.model.trunk.indexer import choose_by_cache, index_layer
from elastic_moe.model.trunk.linear import pack_linears
from elastic_moe.model.trunk.tied import pack_tied

_STATEFUL = "some layers keep a state per sequence"


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """What `fit` has chosen for a trunk, for its attention and for its experts."""

    packed_bytes: int
    """Bytes of the trunk's packed weights."""
    shapes: TrunkShapes
    attention: AttentionPath
    experts: list[LayerExperts]
    """[L] the objects that hold and compute the experts of each MoE layer. They hold no expert at first."""
    states: tuple[StateLayer, ...]
    """The layers that keep a state per sequence, in order. Their forward takes packed tokens now."""
    rows: tuple[PartFit, ...]
    """The report's rows about the trunk and attention."""

    def exchange_refusal(self) -> str | None:
        """Why this worker cannot exchange tokens natively; None if it can. Call it when experts are held."""
        if not all(isinstance(layer, CpuExperts) and layer.native is not None for layer in self.experts):
            return "the experts are not native"
        return None if len(set(self.shapes.layers)) == 1 else "the MoE layers differ in their shapes"

    def report(self) -> FitReport:
        """Which path serves each part. Call it when experts are held: only their sizes show if native code fits."""
        refusal = self.exchange_refusal()
        notes = FitNotes(self.rows if refusal is None else map(_apart, self.rows))
        for layer in self.experts:
            notes.add(Part.EXPERTS, _experts_label(layer), *experts_path(layer))
        notes.add(Part.EXCHANGE, "workers of a node", CodePath.TORCH if refusal else CodePath.NATIVE, refusal)
        return FitReport(rows=notes.rows())


def fit(
    trunk: nn.Module,
    experts: Sequence[nn.Module],
    *,
    block_size: int,
    form: ExpertForm = ExpertForm.PLAIN,
    trunk_form: ExpertForm = ExpertForm.PLAIN,
) -> Fit:
    """Choose the code for a trunk and its experts. Packs the trunk's matrices and joins its small operators, in place.

    `experts` are its expert modules, without weights; call `attach` for them afterwards. `block_size` is the number of
    tokens in a block of the KV cache. Raises UserError if this machine cannot serve experts in `form`, or the trunk's
    matrices in `trunk_form`.
    """
    notes = FitNotes()
    like = next(trunk.parameters())
    refusal = native_refusal(like.dtype, like.device)
    if trunk_form is not ExpertForm.PLAIN and refusal is not None:
        raise UserError(f"trunk_dtype: {trunk_form} needs the native library: {refusal}; bfloat16 does not need it")
    choose_by_cache(trunk)
    expansions = watch_expansions(trunk)
    shapes = probe_shapes(trunk, experts)
    states = fit_states(trunk, notes)
    latents = cache_latents(expansions)
    shapes = replace(shapes, kv=shapes.kv | latents.shapes)
    for layer, why in latents.expanded.items():
        if index_layer(layer) in shapes.kv:
            raise UserError(f"layer {layer} attends to chosen keys, which needs latents in the cache: {why}")
    attention, apart = attention_path(shapes.kv, dtype=like.dtype, device=like.device, block_size=block_size)
    _note_attention(shapes, latents, attention, apart, notes)
    lib, joined_states = library() if refusal is None else None, 0
    packed_bytes = 0 if lib is None else pack_tied(trunk, notes, trunk_form)
    packed_bytes += pack_linears(trunk, notes, plain=states.plain, form=trunk_form)
    if lib is not None:
        packed_bytes += fit_trunk(lib, trunk, notes)
        join_states(lib, states.layers)
        joined_states = len(join_state_halves(trunk, states.layers, experts, notes))
    kernels = gpu_refusal(like.dtype, like.device) is None
    if kernels:
        fit_gpu_trunk(trunk, notes)
    if attention.lib is not None:
        packed_bytes += latents.pack(attention.lib)
        joined = fit_layers(attention.lib, trunk, experts, notes)
        apart = _STATEFUL if states.layers else join_layers(trunk, joined, experts)
        if apart is not None:
            join_feed_forwards(attention.lib, trunk, experts)
    else:
        apart = refusal or f"attention is not native: {apart}"
    _note_trunk(trunk, len(experts), None if kernels else refusal, apart, notes)
    _note_layers(trunk, states.layers, apart, notes)
    if notes.count(Part.ATTENTION_HALF) == joined_states:
        why = refusal or "no layer has a part named self_attn"
        notes.add(Part.ATTENTION_HALF, "attention layers", CodePath.TRANSFORMERS, why, count=len(shapes.kv))
    expert_layers = [layer_experts(module, form) for module in experts]
    return Fit(
        packed_bytes=packed_bytes,
        shapes=shapes,
        attention=attention,
        experts=expert_layers,
        states=states.layers,
        rows=notes.rows(),
    )


def attention_path(
    shapes: Mapping[int, KVShape], *, dtype: torch.dtype, device: torch.device, block_size: int
) -> tuple[AttentionPath, str | None]:
    """Which code computes attention over caches of all these shapes, and why no faster code does."""
    refusal = native_refusal(dtype, device)
    for s in set(shapes.values()):
        refusal = refusal or native_attention.refusal(
            block_size=block_size, key_size=s.key_size, value_size=s.value_size
        )
    if refusal is None:
        return AttentionPath(lib=library()), None
    if device.type != "cpu" and any(s.latent for s in shapes.values()):
        return MATMUL, "FlashAttention does not read latents"
    variant = find_variant(shapes.values(), dtype=dtype, device=device, block_size=block_size)
    if isinstance(variant, VarlenVariant):
        kernels = gpu_refusal(dtype, device) is None
        kernels = kernels and singles_are_right(shapes.values(), dtype=dtype, device=device, block_size=block_size)
        return AttentionPath(varlen=variant, kernels=kernels), None
    return MATMUL, refusal if device.type == "cpu" else variant


def layer_experts(module: nn.Module, form: ExpertForm = ExpertForm.PLAIN) -> LayerExperts:
    """Make the object that holds and computes a layer's experts. `module` is the trunk's expert module, without
    weights.

    It keeps weights in `form`. Raises UserError if this machine cannot serve such weights.
    """
    like = next(itertools.chain(module.parameters(), module.buffers()))
    if like.device.type != "cpu":
        packing = None if form is ExpertForm.PLAIN else Packing(form, like.dtype, like.device)
        return TieredStacks(module, kernels=gpu_refusal(like.dtype, like.device) is None, packing=packing)
    refusal = native_refusal(like.dtype, like.device)
    lib = library() if refusal is None else None
    gate = None if lib is None else find_gate(module)
    if lib is not None and gate is not None:
        return CpuExperts(module, NativeExperts(lib, module, gate, form))
    if form is not ExpertForm.PLAIN:
        raise not_native(form, unavailable() or "it is for bfloat16 on CPU, and for gates that it knows")
    return CpuExperts(module, refusal or "no known gate gives the values of theirs")


# --- The report -------------------------------------------------------------------------------------------------------


def _note_attention(
    shapes: TrunkShapes, latents: LatentLayers, attention: AttentionPath, reason: str | None, notes: FitNotes
) -> None:
    path = CodePath.TORCH if attention.varlen is None else CodePath.FLASH
    if attention.lib is not None:
        path = CodePath.NATIVE
    for layer, shape in shapes.kv.items():
        why = reason
        if layer < 0:
            what = f"indexer keys of {shape.key_size}"
        elif shape.latent:
            what = f"latents of {shape.value_size}+{shape.key_size - shape.value_size}"
        else:
            what = f"{shape.num_heads} key heads of {shape.key_size}+{shape.value_size}"
        if layer in latents.expanded:
            expanded = f"keys and values are cached, not latents: {latents.expanded[layer]}"
            why = expanded if reason is None else f"{reason}; {expanded}"
        notes.add(Part.ATTENTION, what, path, why)


def _note_trunk(trunk: nn.Module, moe_layers: int, refusal: str | None, apart: str | None, notes: FitNotes) -> None:
    """Note router, norms, rotary and attention halves.

    `refusal` says why no part of the trunk is native, and `apart` why the layers are not one call. None means they are.
    """
    if refusal is not None:
        for part in (Part.ROUTER, Part.NORMS, Part.ROTARY):
            notes.add(part, "all", CodePath.TRANSFORMERS, refusal)
    elif (others := moe_layers - notes.count(Part.ROUTER)) > 0:
        why = "no module chooses experts by a matrix of its own"
        notes.add(Part.ROUTER, "others", CodePath.TRANSFORMERS, why, count=others)
    for layer in decoder_layers(trunk) if notes.count(Part.ATTENTION_HALF) == 0 else ():
        notes.add(Part.ATTENTION_HALF, type(layer).__name__, CodePath.TRANSFORMERS, apart)


def _note_layers(trunk: nn.Module, states: Sequence[StateLayer], apart: str | None, notes: FitNotes) -> None:
    """Note the decoder layers, which run one by one if `apart` says why: some by native calls, others by their own
    code."""
    parents = {child: module for module in trunk.modules() for child in module.children()}
    stateful = [parents.get(layer.module, layer.module) for layer in states]
    for layer in dict.fromkeys([*decoder_layers(trunk), *stateful]):
        path = CodePath.JOINED
        if apart is not None:
            fitted = isinstance(layer.forward, FittedLayer | LatentLayer | FittedStateLayer)
            path = CodePath.NATIVE if fitted else CodePath.TRANSFORMERS
        notes.add(Part.LAYERS, type(layer).__name__, path, apart)


def _apart(row: PartFit) -> PartFit:
    """The row as it is if experts are not native: then even joined layers run one after another."""
    if row.path is not CodePath.JOINED or row.part is not Part.LAYERS:
        return row
    return replace(row, path=CodePath.TRANSFORMERS, reason="the experts are not native")


def _experts_label(layer: LayerExperts) -> str:
    kept = (
        layer.native if isinstance(layer, CpuExperts) else layer.packing if isinstance(layer, StackedExperts) else None
    )
    return "MoE layers" if kept is None or kept.form is ExpertForm.PLAIN else f"MoE layers in {kept.form}"


def experts_path(layer: LayerExperts) -> tuple[CodePath, str | None]:
    """Which code computes a layer's experts, and why no faster code does."""
    if isinstance(layer, CpuExperts):
        return (CodePath.NATIVE if layer.native is not None else CodePath.TORCH), layer.reason
    return CodePath.STACKED, None
