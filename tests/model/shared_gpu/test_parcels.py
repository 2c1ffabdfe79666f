"""Experts on their way between two workers of a GPU, which is a fake one (tests/model/fake_device.py)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import elastic_moe.model.exchange.join
from elastic_moe.cluster.errors import PlacementError
from elastic_moe.cluster.facts.transfers import AT_ONCE_ON_GPUS
from elastic_moe.cluster.messages.epochs import ExpertCopy, Parcel
from elastic_moe.cluster.placement import WorkerId
from elastic_moe.model.experts.interface import Tensors
from elastic_moe.model.shared_gpu import parcels as parcels_module
from elastic_moe.model.shared_gpu.parcels import LEASE_S, Arrivals, Outbox
from elastic_moe.model.worker.expert_sources import SharedGpu, from_copies, to_copies, to_copy
from tests.model.fake_device import FakeDevice
from tests.model.families import tiny_checkpoint
from tests.model.lockstep import Lockstep, request
from tests.model.pretended_tensors import OnDevice, counted_waits, entered
from tests.model.test_parity import greedy

CPU = torch.device("cpu")
W0, W1 = WorkerId("w0"), WorkerId("w1")


SIZE = 5033


def drawn(seed: int, size: int = SIZE) -> Tensor:
    return torch.randint(0, 256, (size,), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


@pytest.fixture
def devices(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[FakeDevice, FakeDevice]]:
    monkeypatch.setattr(parcels_module, "BUNDLE_BYTES", 1 << 20)
    ours, theirs = FakeDevice(), FakeDevice()
    yield ours, theirs
    theirs.opened.clear()
    for address in list(ours.owned):
        ours.free(address)


def take(arrivals: Arrivals, parcel: Parcel) -> Tensor:
    with arrivals.taken(parcel) as found:
        return found


def packed(outbox: Outbox, seed: int, now: float = 0.0) -> Parcel:
    lent = outbox.lend(SIZE, now)
    assert lent is not None
    lent[1].copy_(drawn(seed))
    return lent[0]


def test_parcels_arrive_whole_and_places_are_used_again(devices: tuple[FakeDevice, FakeDevice]) -> None:
    outbox, arrivals = Outbox(devices[0]), Arrivals(devices[1])
    for turn in range(3):
        parcels = [packed(outbox, AT_ONCE_ON_GPUS * turn + n) for n in range(AT_ONCE_ON_GPUS)]
        assert outbox.lend(SIZE, 0.0) is None, "all places are lent"
        for n in reversed(range(AT_ONCE_ON_GPUS)):
            assert torch.equal(take(arrivals, parcels[n]), drawn(AT_ONCE_ON_GPUS * turn + n))
    assert len(devices[1].opened) == 1, "it is mapped once"


def test_a_place_is_taken_back_from_a_receiver_that_is_gone(devices: tuple[FakeDevice, FakeDevice]) -> None:
    outbox, arrivals = Outbox(devices[0]), Arrivals(devices[1])
    late = [packed(outbox, n) for n in range(AT_ONCE_ON_GPUS)]
    assert outbox.lend(SIZE, LEASE_S) is None
    again = packed(outbox, 9, LEASE_S + 1)
    assert again.offset in {parcel.offset for parcel in late}
    # who comes late does not free the place of another
    [same] = [parcel for parcel in late if parcel.offset == again.offset]
    take(arrivals, same)
    others = [packed(outbox, 20 + n, LEASE_S + 1) for n in range(AT_ONCE_ON_GPUS - 1)]
    assert again.offset not in {parcel.offset for parcel in others}
    assert outbox.lend(SIZE, LEASE_S + 1) is None


def test_what_is_larger_than_a_place_goes_another_way(devices: tuple[FakeDevice, FakeDevice]) -> None:
    outbox = Outbox(devices[0])
    packed(outbox, 0)
    assert outbox.lend((1 << 20) + 1, 0.0) is None
    packed(outbox, 2)


def test_memory_is_unmapped_when_nothing_is_taken(devices: tuple[FakeDevice, FakeDevice]) -> None:
    outbox, arrivals = Outbox(devices[0]), Arrivals(devices[1])
    parcel = packed(outbox, 0)
    with arrivals.taken(parcel):
        arrivals.close()
        assert devices[1].opened
    assert not devices[1].opened
    take(arrivals, packed(outbox, 1))
    assert devices[1].opened


class Streamed(FakeDevice):
    """Its memory is read and written later than the CPU says, and the CPU waits for that when it reads a number."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[str] = Counter()
        self.waited_before_closing = 0

    def view(self, address: int, num_bytes: int) -> Tensor:
        return OnDevice(super().view(address, num_bytes))

    def close(self, address: int) -> None:
        self.waited_before_closing = self.waits.total()
        super().close(address)


@pytest.mark.parametrize("fails", [False, True])
def test_memory_is_unmapped_when_the_gpu_has_read_it(fails: bool) -> None:
    """A group may begin meanwhile, which closes the memory of the one before."""
    ours, theirs = FakeDevice(), Streamed()
    arrivals = Arrivals(theirs)
    parcel = packed(Outbox(ours), 0)
    with (
        entered(),
        counted_waits() as theirs.waits,
        pytest.raises(RuntimeError) if fails else nullcontext(),
        arrivals.taken(parcel),
    ):
        arrivals.close()
        assert not theirs.waits, "it is the block's end that waits"
        if fails:
            raise RuntimeError("no memory is left")
    assert not theirs.opened
    assert theirs.waited_before_closing
    for address in list(ours.owned):
        ours.free(address)


def sent(experts: dict[tuple[int, int], Tensors], shared: SharedGpu) -> list[ExpertCopy]:
    return to_copies(nullcontext(experts), CPU, shared)


@pytest.mark.parametrize("refused", ["allocate", "export"])
def test_a_gpu_that_lends_no_memory_sends_through_the_host(refused: str) -> None:
    device = FakeDevice(refuses=refused)
    shared = SharedGpu.of(device)
    tensors = {"a": torch.randn(40, 50), "b": torch.randn(3)}
    [copy] = sent({(0, 1): tensors}, shared)
    assert copy.parcel is None
    assert device.holds_nothing
    [arrived] = from_copies([copy], CPU, shared)
    for name, tensor in arrived.items():
        assert torch.equal(tensor, tensors[name])


def test_copies_in_a_parcel_have_the_digests_of_any_copies(devices: tuple[FakeDevice, FakeDevice]) -> None:
    ours, theirs = map(SharedGpu.of, devices)

    def drawn_expert() -> Tensors:
        return {"down": torch.randn(70, 40).bfloat16(), "bias": torch.randn(5), "up": torch.randn(9, 130)}

    experts = {(layer, 1): drawn_expert() for layer in range(3)} | {(7, 0): {"down": torch.randn(8, 4)}}
    copies = sent(experts, ours)
    assert len({(copy.parcel.handle, copy.parcel.number) for copy in copies if copy.parcel is not None}) == 2
    for copy in copies:
        assert copy.parcel is not None
        assert not sum(map(len, copy.tensors.values()))
        assert copy.digest == to_copy(copy.layer, copy.expert, experts[copy.layer, copy.expert]).digest
    for copy, arrived in zip(copies, from_copies(copies, CPU, theirs), strict=True):
        for name, tensor in arrived.items():
            assert torch.equal(tensor, experts[copy.layer, copy.expert][name])
    [copy] = sent({(0, 1): drawn_expert()}, ours)
    [other] = sent({(0, 2): drawn_expert()}, ours)
    with pytest.raises(PlacementError, match="expert 1 of layer 0 arrived damaged"):
        from_copies([replace(copy, parcel=other.parcel)], CPU, theirs)
    with pytest.raises(PlacementError, match="cannot be read here: this worker shares none"):
        from_copies([other], CPU)
    with pytest.raises(PlacementError, match="cannot be read here: open was refused"):
        from_copies([other], CPU, SharedGpu.of(FakeDevice(refuses="open")))


def test_workers_of_a_gpu_replace_experts_by_parcels(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(elastic_moe.model.exchange.join, "CudaDevice", FakeDevice)
    path, prompt = tiny_checkpoint("gpt_oss", tmp_path_factory), [5, 6, 7, 8, 9]
    cluster = Lockstep(path, [4, 4], transport="ipc")
    cluster.scheduler.add(request("one", prompt, max_tokens=12))
    tokens: list[int] = []
    moved = 0
    for step in range(14):
        if step in (3, 7):
            pairs = [(0, expert) for expert in cluster.placement.experts_of(W0, 0)]
            assert all(copy.parcel for copy in cluster.workers[W0].export_experts(pairs, W1))
            for_newcomer = cluster.workers[W0].export_experts(pairs, WorkerId("w2"))
            assert from_copies(for_newcomer, CPU), "it has nothing of the group's memory yet"
            moved += cluster.replace(cluster.shuffled(step), [4, 4])
        for output in cluster.step():
            tokens += output.token_ids
    assert moved > 2 * AT_ONCE_ON_GPUS
    assert tokens == greedy(path, prompt, 12, claimed=tokens)
    for worker in cluster.workers.values():
        device = worker._experts.shared.outbox._device  # type: ignore[union-attr]
        for address in list(device.owned):  # type: ignore[attr-defined]
            device.free(address)
    exchanges = [worker._epoch.exchange for worker in cluster.workers.values()]  # type: ignore[union-attr]
    for exchange in exchanges:
        exchange.close()
    assert all(exchange.wait_freed(20) for exchange in exchanges)  # type: ignore[union-attr]
