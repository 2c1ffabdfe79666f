"""Finds the layers of a trunk that keep a state per sequence, and gives them a forward for packed tokens.

*Joined* layers run all tokens of a step in one native call, and so does the half of a decoder layer that such a layer
makes with the norms beside it: transformers' code and PyTorch's operators took a sixth of a step between the calls. A
layer is recognised by a trial: of random tokens and states, the call must make what its own code makes with native
functions (model/states/packed.py), but for roundings, as native code has exponential functions of its own. The half
must then make the bits of its parts.
"""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from elastic_moe.cluster.fit import CodePath, FitNotes, Part
from elastic_moe.model.experts.store import attach
from elastic_moe.model.fitting.halves import fed_forward, matrix_of, norm_of
from elastic_moe.model.fitting.probe import run_one_token
from elastic_moe.model.native import library
from elastic_moe.model.native.block import GatedNorm, Matrix
from elastic_moe.model.native.refusals import native_refusal
from elastic_moe.model.operators.trials import OTHERWISE
from elastic_moe.model.states.batch import current_states, states_of
from elastic_moe.model.states.block import Convolution, Rule, StateBlock, StateProduct
from elastic_moe.model.states.finding import StateLayer, find_state_layers
from elastic_moe.model.states.packed import PackedStates, Trial, slots_of
from elastic_moe.model.transformers_private import LinearAttentionCacheLayerMixin
from elastic_moe.model.trunk.step_batch import ShapeProbe, step_context


@dataclass(frozen=True, slots=True, kw_only=True)
class FittedStates:
    layers: tuple[StateLayer, ...] = ()
    """The layers in the order in which they run. Their forward takes packed tokens."""
    plain: Collection[nn.Module] = ()
    """Linear layers whose weights the layers' own code reads, so that they must stay as they are."""


@torch.inference_mode()
def fit_states(trunk: nn.Module, notes: FitNotes) -> FittedStates:
    """Replace the forward of each layer that keeps states. A probe must have taken the place of the trunk's experts."""
    config = getattr(trunk, "config", None)
    if config is None or not any(
        isinstance(layer, LinearAttentionCacheLayerMixin) for layer in DynamicCache(config=config).layers
    ):
        return FittedStates()
    called: set[nn.Module] = set()
    linears = [module for module in trunk.modules() if isinstance(module, nn.Linear)]
    handles = [module.register_forward_pre_hook(lambda module, _: called.add(module)) for module in linears]
    layers = find_state_layers(trunk, lambda: run_one_token(trunk))
    for handle in handles:
        handle.remove()
    for number, layer in enumerate(layers):
        _fit(layer, number, notes)
    inside = {module for layer in layers for module in layer.module.modules()}
    return FittedStates(layers=layers, plain=[linear for linear in linears if linear in inside - called])


def _fit(layer: StateLayer, number: int, notes: FitNotes) -> None:
    like = next(layer.module.parameters())
    refusal = native_refusal(layer.dtype, like.device)
    packed = PackedStates(layer, number, None if refusal else library())
    layer.module.forward = packed
    kinds = sorted({kept.kind for kept in layer.keeps})
    native = kinds == sorted(packed.native)
    path = CodePath.NATIVE if native else CodePath.TRANSFORMERS
    why = None if native else refusal
    if not native and not refusal:
        others = " and ".join(kind for kind in kinds if kind not in packed.native)
        why = f"no native function gives the values of its {others} states for single tokens"
    if native and packed.scans is None:
        why = "for single tokens only: no native function gives the values of a prompt"
    if not packed.goes_on:
        why = f"{why or 'for single tokens only'}; a prompt is run token by token behind its first chunk"
    notes.add(Part.STATES, type(layer.module).__name__, path, why)


# --- Joined layers ----------------------------------------------------------------------------------------------------


def join_states(lib: ctypes.CDLL, layers: Sequence[StateLayer]) -> int:
    """Join each layer that is recognised. Returns the number of these.

    Call it when the layers' linear layers are packed and their norms are native.
    """
    count = 0
    for layer in layers:
        packed = layer.module.forward
        if isinstance(packed, PackedStates):
            count += any(packed.join(block) for block in _candidates(lib, layer.module))
    return count


def _candidates(lib: ctypes.CDLL, module: Any) -> list[StateBlock]:
    found: list[StateBlock] = []
    for make in (_delta_of_one_matrix, _delta_of_four, _delta_by_channel, _selective):
        try:
            found.append(make(lib, module))
        except OTHERWISE:  # an attribute is missing or of another kind
            continue
    return found


Columns = list[tuple[int, int]]
"""Which product each column comes from, and which one of its columns it is."""


def _delta_of_one_matrix(lib: ctypes.CDLL, module: Any) -> StateBlock:
    """Of a layer whose matrix mixes the parts of all heads (Qwen3-Next)."""
    products = _products(module.in_proj_qkvz, module.in_proj_ba)
    numbers = [torch.arange(product.matrix.packed.columns)[None, None] for product in products]
    # the module's own code says which column belongs to which part
    query, key, value, gate, betas, steps = (part.flatten() for part in module.fix_query_key_value_ordering(*numbers))
    parts = [(0, torch.cat((query, key, value))), (0, gate), (1, steps), (1, betas)]
    return _delta(lib, module, products, [[(n, int(at)) for at in part] for n, part in parts])


def _delta_of_four(lib: ctypes.CDLL, module: Any) -> StateBlock:
    """Of a layer with a matrix for each part (Qwen3.5)."""
    products = _products(*(getattr(module, f"in_proj_{name}") for name in ("qkv", "z", "a", "b")))
    return _delta(lib, module, products, [_all(products, n) for n in range(4)])


def _delta(lib: ctypes.CDLL, module: Any, products: list[StateProduct], columns: list[Columns]) -> StateBlock:
    rule = Rule(
        selective=False,
        sizes=(module.num_k_heads, module.head_k_dim, module.num_v_heads, module.head_v_dim),
        rates_V=-module.A_log.detach().float().exp(),
        shift=module.dt_bias.detach(),
    )
    return StateBlock(
        lib,
        products=products,
        columns=columns,
        convolution=_convolution(module),
        rule=rule,
        norm=_gated_norm(module.norm),
        out=_matrix(module.out_proj),
    )


def _delta_by_channel(lib: ctypes.CDLL, module: Any) -> StateBlock:
    """Of a layer whose decays and gate are made by two matrices each. Each number of a key decays by itself (KDA)."""
    forget = module.forget_gate
    products = _products(module.q_proj, module.k_proj, module.v_proj, module.b_proj, forget.f_a_proj, module.g_a_proj)
    products += [
        StateProduct(matrix=_matrix(forget.f_b_proj), source=4),
        StateProduct(matrix=_matrix(module.g_b_proj), source=5),
    ]
    rule = Rule(
        selective=False,
        sizes=(module.num_heads, module.head_dim) * 2,
        rates_V=-forget.A_log.detach().float().exp().flatten(),
        shift=forget.dt_bias.detach(),
    )
    convolved = [column for n in range(3) for column in _all(products, n)]
    return StateBlock(
        lib,
        products=products,
        columns=[convolved, _all(products, 7), _all(products, 6), _all(products, 3)],
        convolution=_convolution(module),
        rule=rule,
        norm=_gated_norm(module.o_norm),
        out=_matrix(module.o_proj),
    )


def _selective(lib: ctypes.CDLL, module: Any) -> StateBlock:
    """Of Mamba-2, whose matrix makes the gate first, then what is convolved, and then the steps."""
    heads, head_size, groups, state_size = module.num_heads, module.head_dim, module.n_groups, module.ssm_state_size
    inner = heads * head_size
    ends = [0, inner, 2 * inner + 2 * groups * state_size, 2 * inner + 2 * groups * state_size + heads]
    gate, convolved, steps = ([(0, at) for at in range(*pair)] for pair in itertools.pairwise(ends))
    least, most = module.time_step_limit
    rule = Rule(
        selective=True,
        sizes=(groups, state_size, heads, head_size),
        rates_V=-torch.exp(module.A_log.detach().float()),
        shift=module.dt_bias.detach(),
        skip_V=module.D.detach(),
        limits=(float(least), float(most)),
    )
    return StateBlock(
        lib,
        products=_products(module.in_proj),
        columns=[convolved, gate, steps, []],
        convolution=_convolution(module),
        rule=rule,
        norm=_gated_norm(module.norm),
        out=_matrix(module.out_proj),
    )


def _convolution(module: Any) -> Convolution:
    conv: nn.Conv1d = module.conv1d
    bias_C = None if conv.bias is None else conv.bias.detach()
    return Convolution(
        weight_CW=conv.weight.detach().squeeze(1).contiguous(), bias_C=bias_C, silu=module.activation == "silu"
    )


def _products(*linears: Any) -> list[StateProduct]:
    return [StateProduct(matrix=_matrix(linear)) for linear in linears]


def _all(products: Sequence[StateProduct], number: int) -> Columns:
    return [(number, at) for at in range(products[number].matrix.packed.columns)]


def _matrix(linear: Any) -> Matrix:
    matrix = matrix_of(linear)
    if matrix is None:
        raise TypeError("a linear layer is not packed")
    return matrix


def _gated_norm(module: Any) -> GatedNorm:
    norm = module.forward
    if not isinstance(norm, GatedNorm):
        raise TypeError("the norm is not native")
    return norm


# --- Joined halves of decoder layers ----------------------------------------------------------------------------------


class FittedStateLayer:
    """The forward of a decoder layer whose half with states is joined. It calls the original for other inputs."""

    def __init__(
        self, original: Callable[..., Any], block: StateBlock, number: int, feed_forward: nn.Module | None
    ) -> None:
        """`number`: the layer's place in the store of states."""
        self._original = original
        self.block = block
        self.number = number
        self.feed_forward = feed_forward

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        batch = current_states()
        if args or batch is None or hidden_states.dtype != torch.bfloat16 or not hidden_states.is_contiguous():
            return self._original(hidden_states, *args, **kwargs)
        slots = slots_of(batch.store.layers[self.number])
        sum_TH, normed_TH = self.block.half(hidden_states[0], batch.segments, *slots)
        if self.feed_forward is None:
            return sum_TH[None]
        return sum_TH + fed_forward(self.feed_forward, normed_TH[None])


@torch.inference_mode()
def join_state_halves(
    trunk: nn.Module, layers: Sequence[StateLayer], experts: Sequence[nn.Module], notes: FitNotes
) -> list[nn.Module]:
    """Join the half of each decoder layer around a joined layer that is recognised. Call `join_states` before.

    Returns the decoder layers that were joined; their `forward` is a FittedStateLayer now. They are added to `notes`.
    `experts` are the trunk's expert modules. A probe replaces their forward, so call `attach` again afterwards.
    """
    attach(experts, lambda layer, hidden, index, weight: hidden * weight.sum(-1, keepdim=True).to(hidden.dtype))
    parents = {child: module for module in trunk.modules() for child in module.children()}
    found = []
    for layer in layers:
        packed, parent = layer.module.forward, parents.get(layer.module)
        if not isinstance(packed, PackedStates) or packed.block is None or parent is None:
            continue
        fitted = _half_of(parent, layer, packed.block, packed.number)
        if fitted is not None:
            parent.forward = fitted
            found.append(parent)
            notes.add(Part.ATTENTION_HALF, type(parent).__name__, CodePath.JOINED)
    return found


def _half_of(parent: nn.Module, layer: StateLayer, block: StateBlock, number: int) -> FittedStateLayer | None:
    """The joined forward of a decoder layer, if its parts are a layer with states, norms, and a feed-forward half."""
    others = [child for child in parent.children() if child is not layer.module]
    norms = [norm for norm in map(norm_of, others) if norm is not None]
    rest = [child for child in others if norm_of(child) is None]
    # without a feed-forward half there is no second norm
    if len(norms) != len(rest) + 1 or len(rest) > 1:
        return None
    fitted = FittedStateLayer(parent.forward, block, number, rest[0] if rest else None)
    for before, *after in itertools.permutations(norms):
        try:
            block.use_norms(before, after[0] if after else None)
            if _same(parent.forward, fitted, layer, number):
                return fitted
        except OTHERWISE:
            continue
    return None


def _same(original: Callable[..., Any], fitted: Callable[..., Any], layer: StateLayer, number: int) -> bool:
    results = []
    for forward in (original, fitted):
        trial = Trial.of(layer, number)
        tokens = trial.hidden.shape[1]
        embeddings = torch.ones(1, tokens, 16).bfloat16()
        with step_context(ShapeProbe()), states_of(trial.batch):
            out = forward(
                trial.hidden.clone(),
                attention_mask=None,
                position_ids=torch.arange(tokens)[None],
                position_embeddings=(embeddings, embeddings),
                past_key_values=None,
                use_cache=False,
            )
        results.append([out, *trial.states.values()])
    return all(isinstance(out, Tensor) for out, *_ in results) and all(map(torch.equal, *results))
