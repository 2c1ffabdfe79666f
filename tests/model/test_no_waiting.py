"""A step on a GPU reads no value from the device before its tokens: it runs on the meta device, which has no values.

Attention is torch's own operator, whose interface the meta device has.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import elastic_moe.model.fitting.fit
import elastic_moe.model.sampling.sampling
import elastic_moe.model.staging
from elastic_moe.cluster.expert_forms import ExpertForm
from elastic_moe.cluster.placement import Placement, contiguous
from elastic_moe.model.checkpoints.checkpoint import open_checkpoint
from elastic_moe.model.checkpoints.loading import expert_modules, iter_experts, load_trunk
from elastic_moe.model.exchange.dispatch import TransportDispatcher
from elastic_moe.model.exchange.dispatcher import Dispatcher
from elastic_moe.model.exchange.transports import LocalTransport
from elastic_moe.model.experts.rounding import rounded
from elastic_moe.model.experts.store import ExpertStore
from elastic_moe.model.experts.tiered_stacks import TieredStacks
from elastic_moe.model.fitting.fit import fit
from elastic_moe.model.sampling.sampling import sample
from elastic_moe.model.trunk.flash import VarlenVariant
from elastic_moe.model.trunk.step_batch import SequenceSlice
from elastic_moe.model.worker.runner import ModelRunner
from tests.model.families import FAMILIES, tiny_checkpoint
from tests.model.groups import ToyExperts, workers
from tests.model.sampling.test_sampling import state

META = torch.device("meta")
WAIT = {"phimoe-longrope": "which factors to take is a question of transformers' own to the positions"}
"""Families whose modules read values from the device."""


class FarAway:
    """A transport of two ranks. The other rank sends as many bytes as are expected."""

    rank = 0
    size = 2
    launches = True

    def all_to_all(self, send: Sequence[Sequence[Tensor]], recv_bytes: Sequence[int] | None) -> list[Tensor]:
        assert recv_bytes is not None, "sizes that must be asked for"
        return [torch.empty(n if rank else 0, dtype=torch.uint8, device=META) for rank, n in enumerate(recv_bytes)]

    def check(self) -> None: ...

    def abort(self) -> None: ...

    def close(self) -> None: ...


def serve(
    family: str,
    variant: VarlenVariant,
    slots: Sequence[int],
    factory: Any,
    monkeypatch: pytest.MonkeyPatch,
    form: ExpertForm = ExpertForm.PLAIN,
) -> Tensor:
    """Logits of a step with two decodes and a chunk. Experts are rounded to `form`."""
    checkpoint = open_checkpoint(tiny_checkpoint(family, factory))
    cpu = torch.device("cpu")
    trunk = load_trunk(checkpoint, dtype=torch.bfloat16, device=cpu).to(META)
    modules = expert_modules(trunk)
    info = checkpoint.info
    placement: Placement = contiguous(info.num_layers, info.num_logical_experts, workers(*slots))
    monkeypatch.setattr(elastic_moe.model.fitting.fit, "find_variant", lambda *_, **__: variant)
    fitted = fit(trunk, modules, block_size=16, form=form)
    store = ExpertStore(fitted.experts)
    pairs = [(n, e) for n in range(info.num_layers) for e in placement.experts_of(placement.workers[0].id, n)]
    store.reserve([sum(n == layer for layer, _ in pairs) for n in range(info.num_layers)])
    for layer, expert, tensors in iter_experts(checkpoint, pairs, dtype=torch.bfloat16, device=cpu):
        if form is not ExpertForm.PLAIN:
            tensors = rounded(tensors, form, transposed=bool(modules[layer].is_transposed))
        store.put(layer, expert, {name: tensor.to(META) for name, tensor in tensors.items()})
    runner = ModelRunner(trunk, modules, fitted, device=META)
    runner.allocate(num_blocks=8, block_size=16, dtype=torch.bfloat16)
    transport = LocalTransport() if len(slots) == 1 else FarAway()
    dispatcher: Dispatcher = TransportDispatcher(placement, 0, store, transport, device=META)
    runner.dispatcher = dispatcher
    pieces = [
        SequenceSlice(token_ids=[3], start=20, block_ids=[4, 2], prompt_length=7),
        SequenceSlice(token_ids=[3], start=3, block_ids=[1], prompt_length=7),
        SequenceSlice(token_ids=[3] * 9, start=12, block_ids=[3, 0], prompt_length=30),
    ]
    return runner.run(pieces, [11, 4][: len(slots)])


@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in WAIT])
def test_a_step_asks_nothing(
    family: str, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits = serve(family, VarlenVariant(paged=False), [8], tmp_path_factory, monkeypatch)
    assert logits.shape[0] == 3


@pytest.mark.parametrize("form", [ExpertForm.INT8, ExpertForm.INT4])
@pytest.mark.parametrize("slots", [[8], [4, 4]])
def test_a_step_of_packed_experts_asks_nothing(
    form: ExpertForm, slots: list[int], tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits = serve("gpt_oss", VarlenVariant(paged=False), slots, tmp_path_factory, monkeypatch, form)
    assert logits.shape[0] == 3


@pytest.mark.parametrize("variant", [VarlenVariant(paged=True), VarlenVariant(paged=True, passes_begins=False)])
def test_a_step_of_two_workers_asks_nothing(
    variant: VarlenVariant, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert serve("qwen3_moe", variant, [4, 4], tmp_path_factory, monkeypatch).shape[0] == 3


def test_a_layer_of_which_experts_are_missing_asks_for_its_choices_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Experts lie in the stacks, beside them, and in slots into which they come during the step."""
    module = ToyExperts(8, 64, 32, 0, torch.bfloat16).to(META)
    stacks = TieredStacks(module)
    for expert in range(3):
        stacks.put(expert, {name: tensor.to(META) for name, tensor in module.weights[expert].items()})
    stacks.keep_only({0, 1})
    stacks.put(2, {name: tensor.to(META) for name, tensor in module.weights[2].items()})
    slot = torch.empty(stacks.layout(module.weights[0]).nbytes, dtype=torch.uint8, device=META)

    def next_ready(experts: list[int], tokens: list[int] | None) -> list[int]:
        for expert in range(3, 8):
            if expert in stacks._in_slots:
                stacks.unbind(expert)
        if tokens is not None:
            left.extend([[e for e in experts if e < 3], *([e] for e in experts if e >= 3)])
        batch = left.pop(0) if left else []
        for expert in batch:
            if expert >= 3:
                stacks.bind(expert, slot)
        return batch

    left: list[list[int]] = []
    stacks.supply(0, next_ready)
    stacks.serve(range(8))
    asked: list[tuple[int, ...]] = []

    def to_host(tensors: list[Tensor]) -> list[Tensor]:
        asked.extend(tuple(tensor.shape) for tensor in tensors)
        return [torch.tensor([[0, 2], [7, 4], [1, -1], [4, 3]])]

    monkeypatch.setattr(elastic_moe.model.staging, "to_host", to_host)
    x_RH = torch.empty(4, 64, dtype=torch.bfloat16, device=META)
    index_RK = torch.empty(4, 2, dtype=torch.int32, device=META)
    out = stacks.forward(x_RH, index_RK, torch.empty(4, 2, device=META))
    assert (out.shape, asked, left) == ((4, 64), [(4, 2)], [])


def test_sampling_asks_only_at_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    fields: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"top_k": 5, "logprobs": 2, "presence_penalty": 0.5},
        {"top_p": 0.9, "min_p": 0.01, "logprobs": 5, "logit_bias": ((7, 2.0),)},
        {"allowed_token_ids": (3, 4, 5), "bad_words": ((3,), (1, 2))},
    ]
    states = [state((1, 2), (3,), eos=(), **{"max_tokens": 8, "seed": n} | given) for n, given in enumerate(fields)]
    logits = torch.empty(4, 100, device=META)
    # what it would fetch: a token of each row, and for two rows ids and numbers of the chosen and the likely tokens
    fetched: list[int] = []
    monkeypatch.setattr(
        elastic_moe.model.sampling.sampling,
        "_fetch",
        lambda tokens, tables: fetched.extend([len(tokens), *(t.numel() for _, t in tables)]),
    )
    sample(logits, states)
    assert fetched == [4, 6, 12]
