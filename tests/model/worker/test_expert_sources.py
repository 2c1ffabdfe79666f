"""Copies of experts: what a GPU adds up there is what the CPU adds up, and what arrives damaged is refused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from elastic_moe.cluster.errors import PlacementError
from elastic_moe.cluster.messages.epochs import ExpertCopy
from elastic_moe.model.experts.interface import Tensors
from elastic_moe.model.record_layout import PAGE
from elastic_moe.model.staging import beside_steps
from elastic_moe.model.tiers.records import column_sums, column_sums_there
from elastic_moe.model.worker import expert_sources
from elastic_moe.model.worker.expert_sources import from_copies, from_copy, to_copies, to_copy
from tests.model import pretended_cuda
from tests.model.pretended_tensors import DEVICE, OnDevice, entered

CPU = torch.device("cpu")


def expert(seed: int = 0) -> Tensors:
    """A matrix of some pages and a bit, one of less than a page, and a vector."""
    g = torch.Generator().manual_seed(seed)
    sizes = {"gate_up_proj": (96, 70), "down_proj": (7, 9), "down_proj_bias": (7,)}
    return {name: torch.randn(size, generator=g).bfloat16() for name, size in sizes.items()}


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> None:
    pretended_cuda.pretend(monkeypatch)


def sent(tensors: Tensors, *, far: bool) -> ExpertCopy:
    [copy] = bundle({(1, 2): tensors}) if far else [to_copy(1, 2, tensors)]
    return copy


def bundle(experts: Mapping[tuple[int, int], Tensors]) -> list[ExpertCopy]:
    """Sent from the device."""
    with entered():
        there = {pair: {name: OnDevice(t) for name, t in tensors.items()} for pair, tensors in experts.items()}
        return to_copies(nullcontext(there), DEVICE)


def arrived(copies: Sequence[ExpertCopy], device: torch.device) -> list[Tensors]:
    if device.type == "cpu":
        return list(map(from_copy, copies))
    with entered():
        return from_copies(copies, device)


@given(st.integers(0, 5), st.integers(0, 2**32))
def test_sums_are_the_same_on_a_device(pages: int, seed: int) -> None:
    raw = np.random.default_rng(seed).integers(0, 256, pages * PAGE, dtype=np.uint8)
    assert (column_sums_there(torch.from_numpy(raw)).numpy().view(np.uint64) == column_sums(raw)).all()


@pytest.mark.usefixtures("pretended")
def test_a_copy_is_the_same_from_any_device_to_any() -> None:
    tensors = expert()
    copies = [sent(tensors, far=far) for far in (False, True)]
    assert copies[0].digest == copies[1].digest
    for copy in copies:
        assert set(copy.tensors) == set(tensors)
        for device in (CPU, DEVICE):
            [there] = arrived([copy], device)
            for name, tensor in there.items():
                assert tensor.device.type == device.type
                assert torch.equal(tensor.near if isinstance(tensor, OnDevice) else tensor, tensors[name])


@pytest.mark.usefixtures("pretended")
@pytest.mark.parametrize("name", ["gate_up_proj", "down_proj"])
def test_a_damaged_copy_is_refused(name: str) -> None:
    copy = sent(expert(), far=True)
    damaged = copy.tensors[name].copy()
    damaged[len(damaged) // 2] ^= 1
    for device in (CPU, DEVICE):
        with pytest.raises(PlacementError, match="expert 2 of layer 1 arrived damaged"):
            arrived([replace(copy, tensors={**copy.tensors, name: damaged})], device)
        with pytest.raises(PlacementError, match="expert 2 of layer 1 arrived damaged"):
            arrived([replace(copy, tensors={**copy.tensors, name: copy.tensors[name][:-2]})], device)


@pytest.mark.usefixtures("pretended")
def test_a_bundle_of_experts_of_several_layers() -> None:
    """Layers may differ in the shapes of their experts. What is damaged is told, and which expert it is."""
    small = {name: tensor[:5].contiguous() for name, tensor in expert(9).items()}
    experts = {(0, 4): expert(1), (3, 0): expert(2), (1, 1): small, (2, 7): expert(3)}
    copies = bundle(experts)
    assert {(copy.layer, copy.expert): copy.digest for copy in copies} == {
        (layer, number): to_copy(layer, number, tensors).digest for (layer, number), tensors in experts.items()
    }
    for device in (CPU, DEVICE):
        for copy, there in zip(copies, arrived(copies, device), strict=True):
            for name, tensor in there.items():
                near = tensor.near if isinstance(tensor, OnDevice) else tensor
                assert torch.equal(near, experts[copy.layer, copy.expert][name])
    bad = [replace(copies[0], tensors=copies[1].tensors), *copies[1:]]
    with pytest.raises(PlacementError, match=f"expert {copies[0].expert} of layer {copies[0].layer} arrived damaged"):
        arrived(bad, DEVICE)


@pytest.mark.usefixtures("pretended")
def test_what_is_damaged_on_its_way_into_a_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The digest is that of the device's memory, not that of the memory from which it was copied."""
    copy = sent(expert(), far=False)

    class Damages:
        def __init__(self, device: torch.device) -> None:
            self._whole = beside_steps(device)

        def __enter__(self) -> object:
            hand_over = self._whole.__enter__()

            def damaged(tensor: torch.Tensor) -> torch.Tensor:
                there = hand_over(tensor)
                if len(there):
                    there[0] += 1
                return there

            return damaged

        def __exit__(self, *error: object) -> None:
            self._whole.__exit__(*error)  # type: ignore[arg-type]

    monkeypatch.setattr(expert_sources, "beside_steps", Damages)
    with entered(), pytest.raises(PlacementError, match="arrived damaged"):
        from_copies([copy], DEVICE)
