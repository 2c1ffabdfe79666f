"""Where an expert of a worker comes from: the checkpoint, or a copy that another worker has sent.

On a GPU, experts that travel together lie in the rows of one piece of memory, whichever layers they are of. So all of
them are gathered, added up for their digests, and sent by a few launches: one by one, they would hold the interpreter,
which the steps need, for most of the time that their bytes take.

Legend: n experts, L a row's bytes.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from elastic_moe.cluster.errors import PlacementError
from elastic_moe.cluster.expert_forms import ExpertForm
from elastic_moe.cluster.facts.transfers import BUNDLE_BYTES
from elastic_moe.cluster.messages.epochs import ExpertCopy, Parcel
from elastic_moe.model.checkpoints.checkpoint import Checkpoint
from elastic_moe.model.checkpoints.loading import iter_experts
from elastic_moe.model.experts.interface import Tensors
from elastic_moe.model.experts.rounding import rounded
from elastic_moe.model.record_layout import PAGE, RecordLayout, lay_out
from elastic_moe.model.shared_gpu.driver import DeviceError
from elastic_moe.model.shared_gpu.memory import Device
from elastic_moe.model.shared_gpu.parcels import Arrivals, Outbox
from elastic_moe.model.staging import beside_steps, to_host
from elastic_moe.model.tiers.records import column_sums, column_sums_there
from elastic_moe.model.torch_private import copy_all

# copies of experts lie in Ray's shared memory, which is read-only and is only read here
warnings.filterwarnings("ignore", message="The given NumPy array is not writable")

Pair = tuple[int, int]
"""(layer, logical expert)."""
Raw = npt.NDArray[Any]
T = TypeVar("T")
K = TypeVar("K")

_NOTHING = np.empty(0, np.uint8)


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointExperts:
    """The experts of a checkpoint, in the type and form in which a worker computes them."""

    checkpoint: Checkpoint
    dtype: torch.dtype
    form: ExpertForm
    rounds: bool = False
    """Whether experts come rounded; otherwise that is left to what holds them, as a CPU's native library does."""

    def read(
        self,
        pairs: Sequence[tuple[int, int]],
        device: torch.device,
        progress: Callable[[int, int], None] | None = None,
    ) -> Iterator[tuple[int, int, Tensors]]:
        """Experts, given as (layer, expert), on `device`. `progress` is called with bytes that are read, and all."""
        checkpoint, form = self.checkpoint, self.form
        if not self.rounds or form in (ExpertForm.PLAIN, checkpoint.info.kept):
            yield from iter_experts(checkpoint, pairs, dtype=self.dtype, device=device, form=form, progress=progress)
            return
        host = torch.device("cpu")
        for layer, expert, tensors in iter_experts(checkpoint, pairs, dtype=self.dtype, device=host, progress=progress):
            module: Any = checkpoint.skeleton.get_submodule(checkpoint.shape.expert_modules[layer])
            made = rounded(tensors, form, transposed=bool(module.is_transposed))
            yield layer, expert, {name: tensor.to(device) for name, tensor in made.items()}

    def read_to_host(self, layer: int, expert: int) -> Tensors:
        """One expert, in the host's memory."""
        [(_, _, tensors)] = self.read([(layer, expert)], torch.device("cpu"))
        return tensors


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedGpu:
    """How experts go to workers of the same GPU, and come from them."""

    outbox: Outbox
    arrivals: Arrivals

    @classmethod
    def of(cls, device: Device) -> SharedGpu:
        return cls(outbox=Outbox(device), arrivals=Arrivals(device))


# --- On CPUs ----------------------------------------------------------------------------------------------------------


def to_copy(layer: int, expert: int, tensors: Tensors) -> ExpertCopy:
    """An expert in the host's memory as it is sent to another worker. The copy shares the tensors' memory."""
    raw = {name: tensor.contiguous().view(-1).view(torch.uint8).numpy() for name, tensor in tensors.items()}
    return _copy(layer, expert, _layout_of(tensors), raw, {name: _sums_here(array) for name, array in raw.items()})


def from_copy(copy: ExpertCopy) -> Tensors:
    """A copy's tensors, which share its memory. Raises PlacementError if its digest does not match."""
    _check(copy, {name: _sums_here(array) for name, array in copy.tensors.items()})
    return {
        name: torch.from_numpy(raw).view(getattr(torch, copy.dtypes[name])).view(copy.shapes[name])
        for name, raw in copy.tensors.items()
    }


def _sums_here(raw: Raw) -> _Sums:
    whole = len(raw) // PAGE * PAGE
    return _Sums(len(raw), column_sums(raw[:whole]).tobytes(), raw[whole:].tobytes())


# --- On GPUs ----------------------------------------------------------------------------------------------------------


def to_copies(
    reading: AbstractContextManager[Mapping[Pair, Tensors]], device: torch.device, shared: SharedGpu | None = None
) -> list[ExpertCopy]:
    """Experts in a GPU's memory as they are sent to another worker, which is on the same GPU if that is `shared`. Steps
    go on meanwhile.

    reading: within it, what is launched on the present stream may read the tensors that it gives.
    """
    with beside_steps(device):
        with reading as experts:
            alike = _alike(experts.items(), lambda found: _layout_of(found[1]))
            gathered = [_Rows.gathered(found, layout, shared) for layout, found in alike]
        return [copy for rows in gathered for copy in rows.copies()]


def from_copies(copies: Sequence[ExpertCopy], device: torch.device, shared: SharedGpu | None = None) -> list[Tensors]:
    """The tensors of each copy on a GPU, where steps go on meanwhile.

    Raises PlacementError if a copy's digest does not match that of what has arrived there, or if the bytes are on a GPU
    that is not this one.
    """
    found: dict[Pair, Tensors] = {}
    with beside_steps(device) as hand_over:
        for (layout, _), alike in _alike(copies, lambda copy: (_sent_layout(copy), _parcel_of(copy))):
            with _arriving(alike, layout, device, shared) as memory:
                memory_nL = hand_over(memory).view(len(alike), layout.nbytes)
                sums = _sums_there(memory_nL, layout)
            for n, copy in enumerate(alike):
                _check(copy, sums[n])
                found[copy.layer, copy.expert] = layout.views(memory_nL[n])
    return [found[copy.layer, copy.expert] for copy in copies]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rows:
    """Experts that are alike in one piece of a GPU's memory, which is in the outbox if there is a parcel."""

    pairs: Sequence[Pair]
    layout: RecordLayout
    memory_nL: Tensor
    parcel: Parcel | None = None

    @classmethod
    def gathered(cls, experts: Sequence[tuple[Pair, Tensors]], layout: RecordLayout, shared: SharedGpu | None) -> _Rows:
        """Launches the copies of all tensors together."""
        nbytes = len(experts) * layout.nbytes
        lent = None if shared is None else shared.outbox.lend(nbytes)
        if lent is None:
            device = next(iter(experts[0][1].values())).device
            parcel, memory = None, torch.empty(nbytes, dtype=torch.uint8, device=device)
        else:
            parcel, memory = lent
        memory_nL = memory.view(len(experts), layout.nbytes)
        by_dtype: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]] = {}
        for row_L, (_, tensors) in zip(memory_nL.unbind(), experts, strict=True):
            for name, view in layout.views(row_L).items():
                targets, sources = by_dtype.setdefault(view.dtype, ([], []))
                targets.append(view)
                sources.append(tensors[name])
        for targets, sources in by_dtype.values():
            copy_all(targets, sources)
        return cls(pairs=[pair for pair, _ in experts], layout=layout, memory_nL=memory_nL, parcel=parcel)

    def copies(self) -> list[ExpertCopy]:
        """Waits for the device."""
        near_nL: Raw | None = None
        if self.parcel is None:
            pinned = _pinned(self.memory_nL.nbytes, self.memory_nL.device).view(self.memory_nL.shape)
            near_nL = pinned.copy_(self.memory_nL, non_blocking=True).numpy()
        # this waits for both
        sums, found = _sums_there(self.memory_nL, self.layout), []
        for n, (layer, expert) in enumerate(self.pairs):
            raw = {
                part.name: _NOTHING if near_nL is None else near_nL[n, part.offset : part.offset + part.nbytes]
                for part in self.layout.parts
            }
            copy = _copy(layer, expert, self.layout, raw, sums[n])
            if self.parcel is not None:
                at = self.parcel.offset + n * self.layout.nbytes
                copy = replace(copy, parcel=replace(self.parcel, offset=at, nbytes=self.layout.nbytes))
            found.append(copy)
        return found


@contextmanager
def _arriving(
    alike: Sequence[ExpertCopy], layout: RecordLayout, device: torch.device, shared: SharedGpu | None
) -> Iterator[Tensor]:
    """The rows [n * L] of copies that are alike and came together: in pinned memory, or on the GPU that both workers
    share."""
    first = alike[0]
    if first.parcel is None:
        pinned = _pinned(len(alike) * layout.nbytes, device)
        for row_L, copy in zip(pinned.view(len(alike), layout.nbytes).unbind(), alike, strict=True):
            for part in layout.parts:
                if len(copy.tensors[part.name]) != part.nbytes:
                    raise _damaged(copy)
                row_L[part.offset : part.offset + part.nbytes].copy_(torch.from_numpy(copy.tensors[part.name]))
        yield pinned
        return
    where = f"expert {first.expert} of layer {first.layer} lies on a GPU that cannot be read here"
    if shared is None:
        raise PlacementError(f"{where}: this worker shares none")
    try:
        with shared.arrivals.taken(replace(first.parcel, nbytes=len(alike) * layout.nbytes)) as found:
            yield found
    except DeviceError as error:
        raise PlacementError(f"{where}: {error}") from error


def _pinned(nbytes: int, device: torch.device) -> Tensor:
    """Memory of the host [nbytes] for copies from and to the device: pinned, if that is a GPU. torch keeps what is let
    go and gives it to the next who asks for as much, so everybody asks for the same: to pin memory stops all that is
    being launched for some milliseconds."""
    pins = device.type == "cuda"
    return torch.empty(max(nbytes, BUNDLE_BYTES) if pins else nbytes, dtype=torch.uint8, pin_memory=pins)[:nbytes]


def pin_ahead(bundles: int) -> None:
    """Pin memory for so many bundles of copies while no step runs."""
    kept = [_pinned(BUNDLE_BYTES, torch.device("cuda")) for _ in range(bundles)]
    kept.clear()


def _alike(items: Iterable[T], key: Callable[[T], K]) -> list[tuple[K, list[T]]]:
    found: dict[K, list[T]] = {}
    for item in items:
        found.setdefault(key(item), []).append(item)
    return list(found.items())


def _layout_of(tensors: Tensors) -> RecordLayout:
    kinds = [(name, str(t.dtype).removeprefix("torch."), tuple(t.shape)) for name, t in tensors.items()]
    return _layout(tuple(sorted(kinds)))


def _sent_layout(copy: ExpertCopy) -> RecordLayout:
    return _layout(tuple(sorted((name, copy.dtypes[name], copy.shapes[name]) for name in copy.tensors)))


@cache
def _layout(kinds: tuple[tuple[str, str, tuple[int, ...]], ...]) -> RecordLayout:
    """kinds: name, dtype and shape of each tensor."""
    return lay_out("copy", {n: torch.empty(shape, dtype=getattr(torch, d), device="meta") for n, d, shape in kinds})


def _parcel_of(copy: ExpertCopy) -> tuple[bytes, int] | None:
    return None if copy.parcel is None else (copy.parcel.handle, copy.parcel.number)


# --- Digests ----------------------------------------------------------------------------------------------------------


class _Sums(NamedTuple):
    """What a tensor's bytes add up to. SHA-256 of all of them would be most of a copy's time."""

    nbytes: int
    sums: bytes
    """`column_sums` of its whole pages."""
    left: bytes
    """What is left behind them."""


def _sums_there(memory_nL: Tensor, layout: RecordLayout) -> list[dict[str, _Sums]]:
    """Of each tensor of each row. Waits for the device."""
    ends: list[Tensor] = []
    for part in layout.parts:
        raw_nB, whole = memory_nL[:, part.offset : part.offset + part.nbytes], part.nbytes // PAGE * PAGE
        ends += [column_sums_there(raw_nB[:, :whole]), raw_nB[:, whole:]]
    found = [tensor.numpy() for tensor in to_host(ends)]
    return [
        {
            part.name: _Sums(part.nbytes, sums_nC[n].tobytes(), left_nB[n].tobytes())
            for part, sums_nC, left_nB in zip(layout.parts, found[::2], found[1::2], strict=True)
        }
        for n in range(len(memory_nL))
    ]


def _copy(layer: int, expert: int, layout: RecordLayout, raw: dict[str, Raw], sums: Mapping[str, _Sums]) -> ExpertCopy:
    return ExpertCopy(
        layer=layer,
        expert=expert,
        tensors=raw,
        digest=_digest(sums),
        shapes={part.name: part.shape for part in layout.parts},
        dtypes={part.name: part.dtype for part in layout.parts},
    )


def _check(copy: ExpertCopy, sums: Mapping[str, _Sums]) -> None:
    if _digest(sums) != copy.digest:
        raise _damaged(copy)


def _damaged(copy: ExpertCopy) -> PlacementError:
    return PlacementError(f"expert {copy.expert} of layer {copy.layer} arrived damaged")


def _digest(sums: Mapping[str, _Sums]) -> str:
    """The digest of an expert as one unit: of its tensors' names, sizes and bytes."""
    state = hashlib.sha256()
    for name, of_tensor in sorted(sums.items()):
        state.update(f"{name}:{of_tensor.nbytes};".encode() + of_tensor.sums + of_tensor.left)
    return state.hexdigest()
