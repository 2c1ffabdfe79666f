"""Layers with states, and the halves of decoder layers around them, run in one native call that makes their values."""

from __future__ import annotations

import ctypes

import pytest
import torch
from torch import Tensor, nn

from elastic_moe.cluster.fit import FitNotes
from elastic_moe.model.checkpoints.checkpoint import open_checkpoint
from elastic_moe.model.checkpoints.loading import expert_modules, load_trunk
from elastic_moe.model.fitting import fit as fitting
from elastic_moe.model.fitting.state_layers import FittedStateLayer, join_state_halves, join_states
from elastic_moe.model.states.batch import StateBatch, states_of
from elastic_moe.model.states.block import Segments
from elastic_moe.model.states.finding import StateKind, StateLayer
from elastic_moe.model.states.packed import PackedStates, Trial
from elastic_moe.model.states.store import StateMove
from elastic_moe.model.trunk.step_batch import ShapeProbe, step_context
from tests.model.families import tiny_checkpoint

HALVES = ["qwen3_next", "qwen3_5_moe_text", "kimi_linear", "nemotron_h"]
JOINED = [*HALVES, "granitemoehybrid-mamba"]
OTHERS = ["jamba", "minimax", "lfm2_moe"]


@pytest.fixture
def trunk(
    request: pytest.FixtureRequest,
    lib: ctypes.CDLL,
    tmp_path_factory: pytest.TempPathFactory,
) -> nn.Module:
    """The trunk of the family that a test asks for."""
    path = tiny_checkpoint(request.param, tmp_path_factory)
    return load_trunk(open_checkpoint(str(path)), dtype=torch.bfloat16, device=torch.device("cpu"))


@pytest.fixture
def layers(trunk: nn.Module, monkeypatch: pytest.MonkeyPatch) -> tuple[StateLayer, ...]:
    """The trunk's layers with states, which are not joined yet."""
    monkeypatch.setattr(fitting, "join_states", lambda *_: 0)
    return fitting.fit(trunk, expert_modules(trunk), block_size=16).states


@pytest.mark.parametrize("trunk", OTHERS, indirect=True)
def test_layers_of_another_kind_keep_their_code(lib: ctypes.CDLL, layers: tuple[StateLayer, ...]) -> None:
    assert layers
    assert join_states(lib, layers) == 0


@pytest.mark.parametrize("trunk", JOINED, indirect=True)
def test_the_values_of_their_own_code(lib: ctypes.CDLL, layers: tuple[StateLayer, ...]) -> None:
    """Single tokens, prompts and snapshots in one step. What native functions of its own code make, to a few roundings:
    functions with exponentials are native too."""
    number, layer = 0, layers[0]
    results = []
    for _ in range(2):
        trial = Trial.of(layer, number)
        with torch.inference_mode(), states_of(trial.batch):
            results.append([layer.module(trial.hidden), *trial.states.values()])
        joined = join_states(lib, layers)
    assert joined == len(layers)
    (own, *own_states), (out, *states) = results
    assert (out != own).sum() <= out.numel() // 100
    assert torch.allclose(out.float(), own.float(), rtol=2**-7, atol=1e-3)
    for mine, theirs in zip(states, own_states, strict=True):
        assert torch.allclose(mine.float(), theirs.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("trunk", JOINED, indirect=True)
@pytest.mark.parametrize("threads", [1, 2])
def test_the_same_bits_in_any_company_and_however_a_prompt_is_cut(
    lib: ctypes.CDLL, layers: tuple[StateLayer, ...], threads: int
) -> None:
    assert join_states(lib, layers) == len(layers)
    torch.set_num_threads(threads)
    layer = layers[0]
    hidden = torch.randn(1, 24, layer.hidden_size, generator=torch.Generator().manual_seed(1)).bfloat16()
    store = Store(layer)
    single, prompt = StateMove(source=0, target=3, snapshots=((1, 6),)), StateMove(source=None, target=5)
    # a single token, a prompt of 22 tokens, and another single token
    together = run(layer, hidden, [(1, single), (22, prompt), (1, StateMove(source=1, target=4))], store)
    whole = {key: tensor.clone() for key, tensor in store.layers[0].items()}
    assert all(torch.equal(tensor[3], tensor[6]) for tensor in whole.values())
    store = Store(layer)
    apart = [run(layer, hidden[:, :1], [(1, single)], store)]
    # the prompt is cut into chunks: one of several tokens with a snapshot, one of a single token, and the rest
    cuts = [(8, None, 2, ((3, 6), (8, 7))), (1, 7, 8, ()), (13, 8, 5, ())]
    at = 1
    for length, source, target, snapshots in cuts:
        move = StateMove(source=source, target=target, snapshots=snapshots)
        apart.append(run(layer, hidden[:, at : at + length], [(length, move)], store))
        at += length
    apart.append(run(layer, hidden[:, 23:], [(1, StateMove(source=1, target=4))], store))
    assert torch.equal(together, torch.cat(apart, 1))
    for key, tensor in store.layers[0].items():
        assert all(torch.equal(tensor[slot], whole[key][slot]) for slot in (0, 1, 3, 4, 5)), key
        assert torch.equal(tensor[2], tensor[7]), key


@pytest.mark.parametrize("trunk", HALVES, indirect=True)
def test_halves_are_joined_and_make_the_bits_of_their_parts(
    lib: ctypes.CDLL, trunk: nn.Module, layers: tuple[StateLayer, ...]
) -> None:
    assert join_states(lib, layers) == len(layers)
    found = join_state_halves(trunk, layers, expert_modules(trunk), FitNotes())
    assert len(found) == len(layers)
    assert all(isinstance(layer.forward, FittedStateLayer) for layer in found)
    parent, fitted = found[0], found[0].forward
    assert isinstance(fitted, FittedStateLayer)
    results = []
    for forward in (fitted._original, fitted):
        trial = Trial.of(layers[0], 0)
        with torch.inference_mode(), step_context(ShapeProbe()), states_of(trial.batch):
            out = forward(trial.hidden, attention_mask=None, position_embeddings=None, past_key_values=None)
        results.append([out, *trial.states.values()])
        # so the second one is the native call alone
        fitted._original = None  # type: ignore[assignment]
    assert all(map(torch.equal, *results)), parent


@pytest.mark.parametrize("trunk", ["granitemoehybrid-mamba"], indirect=True)
def test_a_half_that_scales_its_sum_is_not_joined(
    lib: ctypes.CDLL, trunk: nn.Module, layers: tuple[StateLayer, ...]
) -> None:
    assert join_states(lib, layers) == len(layers)
    assert join_state_halves(trunk, layers, expert_modules(trunk), FitNotes()) == []


@pytest.mark.parametrize("trunk", JOINED[:1], indirect=True)
def test_what_makes_other_values_is_not_used(
    lib: ctypes.CDLL, layers: tuple[StateLayer, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    packed = layers[0].module.forward
    assert isinstance(packed, PackedStates)

    def other(x_TH: Tensor, segments: Segments, convolutions_SCW: Tensor, states: Tensor) -> Tensor:
        return x_TH

    assert not packed.join(other)  # type: ignore[arg-type]
    assert packed.block is None


class Store:
    """Random states in place of a StateStore."""

    def __init__(self, layer: StateLayer) -> None:
        generator = torch.Generator().manual_seed(2)
        self.layers = [
            {
                (kept.kind, kept.index): torch.randn(9, *kept.shape, generator=generator).to(kept.dtype)
                for kept in layer.keeps
            }
        ]


def run(layer: StateLayer, hidden: Tensor, chunks: list[tuple[int, StateMove]], store: Store) -> Tensor:
    """The first layer's output for chunks of some tokens."""
    batch = StateBatch.build(chunks, store, torch.device("cpu"))  # type: ignore[arg-type]
    with torch.inference_mode(), states_of(batch):
        out = layer.module(hidden[:, : sum(length for length, _ in chunks)])
    assert {kind for kind, _ in store.layers[0]} == set(StateKind)
    made: Tensor = out[0] if isinstance(out, tuple) else out
    return made
