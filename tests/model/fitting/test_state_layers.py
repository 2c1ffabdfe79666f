"""Single tokens of layers with states run by native calls alone where these make the bits of the layer's own code."""

from __future__ import annotations

import ctypes

import pytest
import torch
from torch import Tensor

from elastic_moe.model.checkpoints.checkpoint import open_checkpoint
from elastic_moe.model.checkpoints.loading import expert_modules, load_trunk
from elastic_moe.model.fitting import fit as fitting
from elastic_moe.model.fitting.state_layers import join_states
from elastic_moe.model.states.finding import StateKind, StateLayer
from elastic_moe.model.states.packed import PackedStates, StateBatch, states_of
from elastic_moe.model.states.recurrent import Slots
from elastic_moe.model.states.store import StateMove
from tests.model.families import tiny_checkpoint

JOINED = ["qwen3_next", "qwen3_5_moe_text", "nemotron_h", "granitemoehybrid-mamba"]
OTHERS = ["kimi_linear", "jamba", "minimax", "lfm2_moe"]


@pytest.fixture
def layers(
    request: pytest.FixtureRequest,
    lib: ctypes.CDLL,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> tuple[StateLayer, ...]:
    """The layers with states of the family that a test asks for, which are not joined yet."""
    monkeypatch.setattr(fitting, "join_states", lambda *_: 0)
    path = tiny_checkpoint(request.param, tmp_path_factory)
    trunk = load_trunk(open_checkpoint(str(path)), dtype=torch.bfloat16, device=torch.device("cpu"))
    return fitting.fit(trunk, expert_modules(trunk), block_size=16).states


@pytest.mark.parametrize("layers", OTHERS, indirect=True)
def test_layers_of_another_kind_keep_their_code(lib: ctypes.CDLL, layers: tuple[StateLayer, ...]) -> None:
    assert layers
    assert join_states(lib, layers) == 0


@pytest.mark.parametrize("layers", JOINED, indirect=True)
def test_the_same_bits_in_any_company(lib: ctypes.CDLL, layers: tuple[StateLayer, ...]) -> None:
    """Two single tokens, alone and around a prompt, one of them with a snapshot."""
    layer = layers[0]
    hidden = torch.randn(1, 5, layer.hidden_size, generator=torch.Generator().manual_seed(1)).bfloat16()
    single, snapped = StateMove(source=0, target=3), StateMove(source=1, target=4, snapshots=((1, 6),))
    prompt = StateMove(source=None, target=5)
    alone, mixed = [(1, single), (1, snapped)], [(1, single), (3, prompt), (1, snapped)]
    before = [run(layer, hidden, chunks) for chunks in (alone, mixed)]
    assert join_states(lib, layers) == len(layers)
    after = [run(layer, hidden, chunks) for chunks in (alone, mixed)]
    for expected, got in zip(before, after, strict=True):
        assert all(map(torch.equal, expected, got))


@pytest.mark.parametrize("layers", JOINED[:1], indirect=True)
def test_what_makes_other_bits_is_not_used(lib: ctypes.CDLL, layers: tuple[StateLayer, ...]) -> None:
    packed = layers[0].module.forward
    assert isinstance(packed, PackedStates)

    def other(x_RH: Tensor, convolution: Slots, recurrent: Slots) -> Tensor:
        return x_RH

    assert not packed.join(other)
    assert packed._joined is None


class Store:
    """Random states in place of a StateStore."""

    def __init__(self, layer: StateLayer) -> None:
        generator = torch.Generator().manual_seed(2)
        self.layers = [
            {
                (kept.kind, kept.index): torch.randn(7, *kept.shape, generator=generator).to(kept.dtype)
                for kept in layer.keeps
            }
        ]


def run(layer: StateLayer, hidden: Tensor, chunks: list[tuple[int, StateMove]]) -> list[Tensor]:
    """The first layer's output for chunks of some tokens, and all its states afterwards."""
    store = Store(layer)
    batch = StateBatch.build(chunks, store, torch.device("cpu"))  # type: ignore[arg-type]
    with torch.inference_mode(), states_of(batch):
        out = layer.module(hidden[:, : sum(length for length, _ in chunks)])
    assert {kind for kind, _ in store.layers[0]} == set(StateKind)
    return [out, *store.layers[0].values()]
