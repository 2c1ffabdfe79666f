"""Routing traces, which record the experts that every token chose. Reads, checks, cuts and counts them.

Legend: T tokens, L MoE layers, K experts per token, E logical experts, R requests.

A trace file is an .npz with `topk_ids` [T, L, K] integers from 0, `request_lengths` [R] tokens per request (requests
follow one another), and optionally `topk_weights` [T, L, K] and `num_logical_experts`.
"""

from __future__ import annotations

import lzma
import struct
import tokenize
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from elastic_moe.cluster.errors import UserError
from elastic_moe.optimizer.core.estimate import RUN, covariance_of_requests
from elastic_moe.optimizer.core.problem import FloatArray

KEYS = ("topk_ids", "request_lengths", "topk_weights", "num_logical_experts")
MOST_EXPERTS = 2**15

MOST_PARTS = 64
"""Most requests, or groups of requests, whose loads are compared to estimate how loads vary."""

MOST_PAIRS = 2**27
"""Most pairs of experts, over all layers: the statistics have several arrays with 8 bytes for each pair."""

_UNREADABLE = (
    *(OSError, ValueError, EOFError, KeyError, MemoryError, OverflowError, SyntaxError, NotImplementedError),
    *(RuntimeError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error, tokenize.TokenError),
)
"""The errors of zipfile and numpy for an archive that is damaged, encrypted or of an unknown kind."""


class TraceError(UserError):
    """A trace cannot be used. The message is one line that names the file and the key."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Trace:
    """The experts that the tokens of a run chose."""

    topk_ids: npt.NDArray[np.int16]
    """[T, L, K]"""
    request_lengths: npt.NDArray[np.int64]
    """[R]"""
    num_experts: int

    @property
    def num_tokens(self) -> int:
        return int(self.topk_ids.shape[0])

    @property
    def num_layers(self) -> int:
        return int(self.topk_ids.shape[1])

    @property
    def top_k(self) -> int:
        return int(self.topk_ids.shape[2])

    def requests(self, first: int, last: int) -> Trace:
        """The part of the trace with the requests first .. last - 1."""
        ends = np.concatenate([[0], np.cumsum(self.request_lengths)])
        return Trace(
            topk_ids=self.topk_ids[ends[first] : ends[last]],
            request_lengths=self.request_lengths[first:last],
            num_experts=self.num_experts,
        )

    def halves(self) -> tuple[Trace, Trace]:
        """The first half of the requests, to profile on, and the second, to test on. Raises TraceError for one
        request."""
        count = len(self.request_lengths)
        if count < 2:
            raise TraceError("trace: a single request cannot be cut into a half to profile on and a half to test on")
        return self.requests(0, count // 2), self.requests(count // 2, count)


def concatenate(traces: list[Trace]) -> Trace:
    """One run after another. Raises TraceError where they are not of one model."""
    shapes = {(trace.num_layers, trace.top_k) for trace in traces}
    if len(shapes) != 1:
        raise TraceError("traces: they are of different models, since their layers or experts per token differ")
    return Trace(
        topk_ids=np.concatenate([trace.topk_ids for trace in traces]),
        request_lengths=np.concatenate([trace.request_lengths for trace in traces]),
        num_experts=max(trace.num_experts for trace in traces),
    )


def load_trace(path: Path, num_experts: int | None = None) -> Trace:
    """Read a trace file. `num_experts` defaults to the file's own, else to the highest id + 1.

    Raises TraceError, in one line, for a file or key that is missing, of a wrong shape or type, or out of range.
    """
    arrays = _read(path, ("topk_ids", "request_lengths", "topk_weights", "num_logical_experts"))
    ids = _checked_ids(path, arrays)
    lengths = _checked_lengths(path, arrays, len(ids))
    weights = arrays.get("topk_weights")
    if weights is not None and (weights.shape != ids.shape or weights.dtype.kind != "f"):
        raise TraceError(f"{path}: topk_weights must be floats of the shape of topk_ids, {list(ids.shape)}")
    if weights is not None and not np.isfinite(weights).all():
        raise TraceError(f"{path}: topk_weights holds a value that is not finite")
    highest = int(ids.max())
    experts = _stored_experts(path, arrays) if num_experts is None else num_experts
    experts = highest + 1 if experts is None else experts
    if not 1 <= experts <= MOST_EXPERTS:
        raise TraceError(f"{path}: expected 1 to {MOST_EXPERTS} experts per layer, got {experts}")
    if ids.shape[1] * experts**2 > MOST_PAIRS:
        raise TraceError(
            f"{path}: {ids.shape[1]} layers of {experts} experts have more than {MOST_PAIRS} pairs of experts to count"
        )
    if highest >= experts:
        raise TraceError(f"{path}: topk_ids holds expert {highest}, the model has {experts}")
    if ids.shape[2] > experts:
        raise TraceError(f"{path}: expected at most {experts} experts per token, got {ids.shape[2]}")
    return Trace(topk_ids=ids.astype(np.int16), request_lengths=lengths, num_experts=experts)


def save_trace(path: Path | IO[bytes], trace: Trace) -> None:
    """Write a trace in the form that load_trace reads."""
    kind = np.uint8 if trace.num_experts <= 256 else np.int16
    np.savez_compressed(
        path,
        topk_ids=trace.topk_ids.astype(kind),
        request_lengths=trace.request_lengths.astype(np.int32),
        num_logical_experts=np.int32(trace.num_experts),
    )


def _read(path: Path, names: tuple[str, ...]) -> dict[str, npt.NDArray[Any]]:
    """The arrays of these names that the archive has."""
    try:
        # opened here, because numpy does not close a file that it cannot read
        with path.open("rb") as file:
            if not zipfile.is_zipfile(file):
                raise TraceError(f"{path}: not an .npz archive")
            file.seek(0)
            archive = np.load(file, allow_pickle=False)
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise TraceError(f"{path}: expected an .npz archive, found a single array")
            with archive:
                return {name: archive[name] for name in names if name in archive.files}
    except _UNREADABLE as error:
        if isinstance(error, TraceError):
            raise
        why = error.strerror if isinstance(error, OSError) and error.strerror else "not a readable .npz archive"
        raise TraceError(f"{path}: {why}") from None


def _stored_experts(path: Path, arrays: dict[str, npt.NDArray[Any]]) -> int | None:
    stored = arrays.get("num_logical_experts")
    if stored is None:
        return None
    if stored.size != 1 or stored.dtype.kind not in "iu":
        raise TraceError(f"{path}: num_logical_experts must be one integer, got {stored.dtype} {list(stored.shape)}")
    return int(stored.item())


def _checked_ids(path: Path, arrays: dict[str, npt.NDArray[Any]]) -> npt.NDArray[Any]:
    ids = arrays.get("topk_ids")
    if ids is None:
        raise TraceError(f"{path}: the key topk_ids is missing")
    if ids.ndim != 3 or ids.dtype.kind not in "iu":
        raise TraceError(f"{path}: topk_ids must be integers [tokens, layers, k], got {ids.dtype} {list(ids.shape)}")
    if 0 in ids.shape:
        raise TraceError(f"{path}: topk_ids is empty, its shape is {list(ids.shape)}")
    if ids.min() < 0 or ids.max() >= MOST_EXPERTS:
        raise TraceError(
            f"{path}: topk_ids holds {int(ids.min() if ids.min() < 0 else ids.max())}, which is no expert id"
        )
    ordered = np.sort(ids, axis=2)
    if (ordered[:, :, 1:] == ordered[:, :, :-1]).any():
        token, layer = (int(n[0]) for n in np.nonzero((ordered[:, :, 1:] == ordered[:, :, :-1]).any(axis=2)))
        raise TraceError(f"{path}: topk_ids names an expert twice for token {token} in layer {layer}")
    return ids


def _checked_lengths(path: Path, arrays: dict[str, npt.NDArray[Any]], tokens: int) -> npt.NDArray[np.int64]:
    lengths = arrays.get("request_lengths")
    if lengths is None:
        raise TraceError(f"{path}: the key request_lengths is missing")
    if lengths.ndim != 1 or lengths.dtype.kind not in "iu" or not len(lengths) or (lengths < 1).any():
        raise TraceError(f"{path}: request_lengths must be positive integers [requests]")
    # each is checked too, because a sum of huge lengths may be right by overflow
    if (lengths > tokens).any() or int(lengths.sum()) != tokens:
        raise TraceError(f"{path}: request_lengths sum to {sum(lengths.tolist())}, topk_ids has {tokens} tokens")
    return lengths.astype(np.int64)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Statistics:
    """The statistics of a trace that planners get, as fields of a PlacementProblem."""

    loads: FloatArray
    """[L, E]"""
    transitions: FloatArray
    """[L-1, E, E]"""
    coactivation: FloatArray
    """[L, E, E]"""
    load_covariance: FloatArray
    """[L, E, E]"""
    top_k: int


def count(trace: Trace) -> Statistics:
    """The statistics of a trace. Raises TraceError for a trace without tokens."""
    if trace.num_tokens == 0:
        raise TraceError("trace: the window holds no token")
    layers, experts = trace.num_layers, trace.num_experts
    transitions = np.zeros((layers - 1, experts, experts))
    coactivation = np.zeros((layers, experts, experts))
    before = np.zeros((0, 0), dtype=np.float32)
    for layer in range(layers):
        chosen = np.zeros((trace.num_tokens, experts), dtype=np.float32)
        np.put_along_axis(chosen, trace.topk_ids[:, layer].astype(np.int64), 1.0, axis=1)
        coactivation[layer] = chosen.T @ chosen
        if layer:
            transitions[layer - 1] = before.T @ chosen
        before = chosen
    parts = part_loads(trace)
    return Statistics(
        loads=parts.sum(axis=0),
        transitions=transitions,
        coactivation=coactivation,
        load_covariance=covariance_of_requests(parts, chunk_loads(trace)),
        top_k=trace.top_k,
    )


def part_loads(trace: Trace) -> FloatArray:
    """[P, L, E] loads of at most MOST_PARTS groups of consecutive requests."""
    requests = len(trace.request_lengths)
    number = min(requests, MOST_PARTS)
    return _loads_of(trace, np.repeat(np.arange(requests) * number // requests, trace.request_lengths), number)


def chunk_loads(trace: Trace) -> FloatArray:
    """[P, L, E] loads of runs of at most RUN tokens; no run crosses two requests."""
    runs = -(-trace.request_lengths // RUN)
    first = np.cumsum(runs) - runs
    begin = np.cumsum(trace.request_lengths) - trace.request_lengths
    position = np.arange(trace.num_tokens) - np.repeat(begin, trace.request_lengths)
    part_of = np.repeat(first, trace.request_lengths) + position // RUN
    return _loads_of(trace, part_of, int(runs.sum()))


def _loads_of(trace: Trace, part_of: npt.NDArray[np.int64], number: int) -> FloatArray:
    """[number, L, E] loads of each part."""
    loads = np.zeros((number, trace.num_layers, trace.num_experts))
    for layer in range(trace.num_layers):
        where = part_of[:, None] * trace.num_experts + trace.topk_ids[:, layer]
        counted = np.bincount(where.ravel(), minlength=number * trace.num_experts)
        loads[:, layer] = counted.reshape(number, trace.num_experts)
    return loads
