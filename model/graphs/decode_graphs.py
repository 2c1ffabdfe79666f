"""Launches decode steps as CUDA graphs, attention included (token_graphs.py: other steps, attention apart).

A decode step of a model of 16 layers is some hundred kernels, and the CPU needs longer to launch them one by one than
the GPU to run them. So the steps of each size are recorded once, and then launched by one call, or by one for each
piece between exchanges with other workers. A graph reads its tokens, lengths and block tables from memory that stays in
place. A step of fewer sequences than its graph has rows leaves the other rows empty: they write nothing, and no expert
computes them.

Legend: B rows of a graph, C blocks of a table, V vocabulary, L MoE layers, K experts per token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import lcm
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from elastic_moe.model.block_tables import fill_block_tables
from elastic_moe.model.graph_pieces import SIZES, GraphTerms, Recorder, padded
from elastic_moe.model.graphs.recordings import FixedInputs, Launch, Recordings
from elastic_moe.model.native.attention import CHUNK, Rules
from elastic_moe.model.trunk.kv_cache import KVCache
from elastic_moe.model.trunk.step_batch import SequenceSlice, StepBatch, seen_by_windows

_MOST_ROWS = 256
"""Rows of the largest graph. Larger steps are recorded as those with prompts."""


def graph_sizes(max_num_seqs: int) -> list[int]:
    """The numbers of rows for which there are graphs. A step has at most 7 rows to spare, and beyond 64 rows 15."""
    most = padded(min(max_num_seqs, _MOST_ROWS))
    return [size for size in SIZES if size <= most]


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphStep:
    """What a decode step reads and how it is described, of B rows."""

    input_ids: Tensor
    """[1, B]"""
    position_ids: Tensor
    """[1, B]"""
    keys_B: Tensor
    """[B] keys of each sequence. 0 stands for no sequence."""
    batch: StepBatch


Forward = Callable[[GraphStep], tuple[Tensor, Tensor]]
"""Runs the trunk over a step: (logits [B, V], chosen experts [L, B, K])."""


class _Attention:
    """A Fused for the rows of a graph."""

    def __init__(self, rows: Any) -> None:
        """`rows`: a DecodeRows of model/gpu/decode.py."""
        self._rows = rows

    def attend(
        self, caches: tuple[Tensor, Tensor], query_NTD: Tensor, key_GTD: Tensor, value_GTD: Tensor, rules: Rules
    ) -> Tensor:
        out_TND = query_NTD.new_empty(query_NTD.shape[1], query_NTD.shape[0], value_GTD.shape[2])
        self._rows.attend(caches, query_NTD, key_GTD, value_GTD, rules, out_TND)
        return out_TND


class GraphInputs:
    """Where the graphs of all sizes read a step, and where the host writes it."""

    def __init__(self, most_rows: int, cache: KVCache, max_model_len: int, device: torch.device) -> None:
        self._cache = cache
        self._columns = [-(-max_model_len // cache.block_size)]
        if cache.windows is not None:
            # a window, and the tokens before it in its first block and in its first chunk
            tokens = cache.windows.tokens + cache.block_size + lcm(CHUNK, cache.block_size)
            windowed = min(self._columns[0], -(-tokens // cache.block_size) + 1)
            self._columns = [windowed] if cache.only_windows else [*self._columns, windowed]
        self._host_parts: dict[int, list[npt.NDArray[np.int64]]] = {}
        """Where the host writes a step, by its rows."""
        self._fixed = FixedInputs(most_rows * (2 + sum(1 + columns for columns in self._columns)), device)

    def parts(self, rows: int) -> list[Tensor]:
        """What a graph of so many rows reads: [B] tokens, [B] positions, and for the layers without and those with a
        window, as far as there are such, [B] keys and [B, C] block tables."""
        return self._parts(self._fixed.device, rows)

    def _parts(self, flat: Tensor, rows: int) -> list[Tensor]:
        sizes = [rows, rows]
        for columns in self._columns:
            sizes += [rows, rows * columns]
        parts = list(torch.split(flat[: sum(sizes)], sizes))
        for number, columns in enumerate(self._columns):
            parts[3 + 2 * number] = parts[3 + 2 * number].view(rows, columns)
        return parts

    def step(self, rows: int) -> GraphStep:
        """A step of so many rows, in the memory of the device."""
        from elastic_moe.model.gpu.decode import DecodeRows  # Triton, which it needs, is there only on GPUs

        tokens, positions, *tables = self.parts(rows)
        batches = [
            StepBatch.fused_by(_Attention(DecodeRows(rows_R=None, keys_R=keys, tables_RC=table)), self._cache)
            for keys, table in zip(tables[::2], tables[1::2], strict=True)
        ]
        batch = batches[0]
        if len(batches) > 1:
            batch.windowed = batches[1]
        return GraphStep(
            input_ids=tokens[None],
            position_ids=positions[None],
            keys_B=tables[0],
            batch=batch,
        )

    def put(self, slices: Sequence[SequenceSlice], rows: int) -> None:
        """Copy a step to the device, for which the CPU does not wait."""
        host = self._fixed.begin()
        if rows not in self._host_parts:
            self._host_parts[rows] = [part.numpy() for part in self._parts(host, rows)]
        tokens, positions, *tables = self._host_parts[rows]
        num = len(slices)
        tokens[:num] = [piece.token_ids[0] for piece in slices]
        positions[:num] = [piece.start for piece in slices]
        views = [[(piece.start, piece.end, piece.block_ids) for piece in slices]]
        if self._cache.windows is not None:
            windowed = [seen_by_windows(piece, self._cache) for piece in slices]
            views = [windowed] if self._cache.only_windows else [*views, windowed]
        for view, keys, table in zip(views, tables[::2], tables[1::2], strict=True):
            keys[:num] = [end for _, end, _ in view]
            keys[num:] = 0
            fill_block_tables(table, view, self._cache.block_size)
        self._fixed.send(sum(part.size for part in (tokens, positions, *tables)))


class DecodeGraphs:
    """The graphs of one worker. One thread uses it, and waits for each step's results before the next step."""

    keeps = False
    """Logits of a step's other tokens are not to be had after the step."""

    def __init__(
        self,
        forward: Forward,
        cache: KVCache,
        *,
        recorder: Recorder,
        max_num_seqs: int,
        max_model_len: int,
        device: torch.device,
    ) -> None:
        self._forward = forward
        self._sizes = graph_sizes(max_num_seqs)
        self._inputs = GraphInputs(self._sizes[-1], cache, max_model_len, device)
        self._recordings = Recordings(
            recorder,
            prepare=lambda rows: self._inputs.put([], rows),
            run=lambda rows: self._forward(self._inputs.step(rows)),
        )

    def record_all(self, memory: list[object]) -> None:
        """Record the graphs of all sizes. Raises RecordingFailed."""
        self._recordings.record_all(self._sizes, memory)

    def find(self, slices: Sequence[SequenceSlice], terms: GraphTerms) -> Launch | None:
        """What runs a decode step of these sequences; None if there is no graph for it.

        Raises RecordingFailed; then the step may be run without a graph.
        """
        rows = padded(max(1, len(slices))) if terms.rows is None else terms.rows
        if not len(slices) <= rows <= self._sizes[-1] or any(len(piece.token_ids) != 1 for piece in slices):
            return None
        if not all(piece.wants_logits for piece in slices):
            return None
        replay, (logits_BV, choices_LBK) = self._recordings.get(rows, terms.memory)

        def launch() -> tuple[Tensor, Tensor]:
            self._inputs.put(slices, rows)
            replay()
            return logits_BV[: len(slices)], choices_LBK[:, : len(slices)]

        return launch
