"""Copies of experts: what a GPU adds up there is what the CPU adds up, and what arrives damaged is refused."""

from __future__ import annotations

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
from elastic_moe.model.worker.expert_sources import from_copy, to_copy
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
    with entered():
        return to_copy(1, 2, {name: OnDevice(t) for name, t in tensors.items()} if far else tensors)


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
            with entered():
                arrived = from_copy(copy, device)
            for name, tensor in arrived.items():
                assert tensor.device.type == device.type
                assert torch.equal(tensor.near if isinstance(tensor, OnDevice) else tensor, tensors[name])


@pytest.mark.usefixtures("pretended")
@pytest.mark.parametrize("name", ["gate_up_proj", "down_proj"])
def test_a_damaged_copy_is_refused(name: str) -> None:
    copy = sent(expert(), far=True)
    damaged = copy.tensors[name].copy()
    damaged[len(damaged) // 2] ^= 1
    for device in (CPU, DEVICE):
        with entered(), pytest.raises(PlacementError, match="expert 2 of layer 1 arrived damaged"):
            from_copy(replace(copy, tensors={**copy.tensors, name: damaged}), device)


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
        from_copy(copy, DEVICE)
