"""Joins all decoder layers of a trunk into one module, whose forward is one native call per step.

Trials find out whether a trunk allows it. The feed-forward half of each layer must be a router and experts and nothing
else. The trunk must pass the output of each layer to the next one, and the same other arguments to all layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from elastic_moe.model.experts.store import attach
from elastic_moe.model.fitting.attention_half import FittedLayer, decoder_layers
from elastic_moe.model.fitting.halves import Rotation, Tail, fed_forward, native_embeddings, native_input
from elastic_moe.model.native.layers import JointLayer, JointLayers
from elastic_moe.model.native.router import Router
from elastic_moe.model.operators.trials import OTHERWISE
from elastic_moe.model.trunk.step_batch import ShapeProbe, current_batch, step_context

_WHAT_LAYERS_SHARE = ("attention_mask", "position_embeddings")


def join_layers(trunk: nn.Module, layers: Sequence[nn.Module], experts: Sequence[nn.Module]) -> str | None:
    """Replace all `layers` of a trunk, which `fit_layers` has recognised, by one module.

    Returns None if this was done; otherwise the reason why not, and the trunk is unchanged. `experts` are the trunk's
    expert modules. A probe replaces their forward, so call `attach` again afterwards.
    """
    count = len(decoder_layers(trunk))
    if len(layers) < count:
        return f"the attention half of {count - len(layers)} of {count} layers is not joined"
    if len(layers) != len(experts):
        return f"{count - len(experts)} of {count} layers are dense"
    lists = [
        (parent, name)
        for parent in trunk.modules()
        for name, child in parent.named_children()
        if isinstance(child, nn.ModuleList) and len(child) > 1 and list(child) == list(layers)
    ]
    if len(lists) != 1:
        return "the layers are not one list of two or more"
    [(parent, name)] = lists
    with torch.inference_mode():
        parts = []
        for number, layer in enumerate(layers):
            part = _joint_layer(layer, experts, number)
            if isinstance(part, str):
                return part
            parts.append(part)
        rotations = {layer.forward.rotation for layer in layers if isinstance(layer.forward, FittedLayer)}
        if len(rotations) != 1:
            return "the layers take cosines of different widths"
        if len({(p.router.top_k, p.block.head_size) for p in parts}) > 1:
            return "the layers differ in experts per token or in their heads' size"
        if not _one_after_another(trunk, parent, name, len(layers)):
            return "the trunk does more between its layers than hand on what the one before has made"
    run = LayerRun(layers, JointLayers(parts), parts[0].attention_layer, rotations.pop())
    setattr(parent, name, nn.ModuleList([run]))
    return None


def joint_layers(trunk: nn.Module) -> JointLayers | None:
    """The layers that `join_layers` has joined, or None."""
    return next((module.joint for module in trunk.modules() if isinstance(module, LayerRun)), None)


class LayerRun(nn.Module):
    """All decoder layers of a trunk. It runs them in one native call, or one after the other for other inputs."""

    def __init__(self, layers: Sequence[nn.Module], joint: JointLayers, first: int, rotation: Rotation) -> None:
        """`first`: number of the first layer in the KV cache. All layers get the same mask, and so the same blocks."""
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.joint = joint
        self._first = first
        self._rotation = rotation

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Any:
        batch: Any = current_batch()
        mask: Any = kwargs.get("attention_mask")
        embeddings = native_embeddings(
            kwargs.get("position_embeddings"), hidden_states.shape[1], self.joint.head_size, self._rotation
        )
        dispatcher = getattr(batch, "dispatcher", None)
        if (
            dispatcher is None
            or dispatcher.joint is None
            or embeddings is None
            or not native_input(batch, hidden_states, mask)
        ):
            for layer in self.layers:
                hidden_states = layer(hidden_states, **kwargs)
            return hidden_states
        out_TH, index_LTK = self.joint(
            batch.of(self._first).fused,
            batch.cache,
            dispatcher.joint,
            hidden_states[0],
            *embeddings,
            mask.size,
            dispatcher.threads,
        )
        dispatcher.note(index_LTK)
        return out_TH[None]


def _joint_layer(layer: nn.Module, experts: Sequence[nn.Module], number: int) -> JointLayer | str:
    """The layer's block and router if it has no other parts; otherwise the reason why it cannot be joined."""
    fitted: Any = layer.forward
    if not isinstance(fitted, FittedLayer):
        return "a layer attends to latents"
    if not isinstance(fitted.tail, Tail) or not fitted.tail.plain:
        return "a layer does more than to add its halves to its input"
    feed_forward = fitted.tail.feed_forward
    routers = [module.forward for module in feed_forward.modules() if isinstance(module.forward, Router)]
    if len(routers) != 1 or experts[number] not in list(feed_forward.modules()):
        return "a feed-forward half has no native router"
    router = routers[0]

    def probe(n: int, hidden: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        # the result differs for different layers, experts and weights
        return hidden * ((index + 1) * weight).sum(-1, keepdim=True).to(hidden.dtype) + n

    attach(experts, probe)
    x_TH = torch.randn(6, router.packed.depth, generator=torch.Generator().manual_seed(0)).bfloat16()
    _, scores, index = router(x_TH)
    try:
        got = fed_forward(feed_forward, x_TH[None])
    except OTHERWISE as error:
        return f"a trial call of a feed-forward half failed with {type(error).__name__}"
    expected = probe(number, x_TH, index, scores)[None]
    if not isinstance(got, Tensor) or got.shape != expected.shape or not torch.equal(got, expected):
        return "a feed-forward half computes more than a router and experts, such as a shared expert"
    return JointLayer(block=fitted.block, router=router, attention_layer=fitted.attention_layer)


class _Recorder(nn.Module):
    """Stands for a layer: records its arguments, and returns a tensor that no other layer returns."""

    def __init__(self, number: int, calls: list[tuple[Tensor, dict[str, Any], Tensor]]) -> None:
        super().__init__()
        self._number = number
        self._calls = calls

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        generator = torch.Generator().manual_seed(self._number)
        out = torch.randn(hidden_states.shape, generator=generator).to(hidden_states.dtype)
        self._calls.append((hidden_states, {name: kwargs.get(name) for name in _WHAT_LAYERS_SHARE}, out))
        return out


def _one_after_another(trunk: nn.Module, parent: nn.Module, name: str, count: int) -> bool:
    """Whether the trunk passes values through its `count` layers in such a way that one module can replace them."""
    original = getattr(parent, name)
    logits = []
    try:
        for numbers in (range(count), [count - 1]):
            calls: list[tuple[Tensor, dict[str, Any], Tensor]] = []
            setattr(parent, name, nn.ModuleList([_Recorder(n, calls) for n in numbers]))
            with step_context(ShapeProbe()):
                out = trunk(
                    input_ids=torch.arange(3)[None],
                    position_ids=torch.arange(3)[None],
                    attention_mask=torch.ones(1, 3, dtype=torch.bool),
                    use_cache=False,
                )
            logits.append(out.logits)
            if len(calls) != len(numbers):
                return False
            (_, shared, before), *later = calls
            for hidden, theirs, after in later:
                if hidden is not before or not all(_same(shared[key], theirs[key]) for key in shared):
                    return False
                before = after
        return torch.equal(*logits)
    except OTHERWISE:
        return False
    finally:
        setattr(parent, name, original)


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, tuple) and isinstance(other, tuple):
        return len(one) == len(other) and all(map(_same, one, other))
    return one is other or (not isinstance(one, Tensor) and one == other)
