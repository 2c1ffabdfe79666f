"""Which code serves a model on a worker, and why no faster code does: values, made by `fit` in model/fitting/fit.py.

A report has one row for each part, kind of module, path and reason. An operator reads it in the coordinator's log, in
`/admin/workers` and in `/metrics`; every benchmark prints it beside its figures.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum


class Part(StrEnum):
    """A part of a model that different code can serve."""

    LAYERS = "layers"
    """All decoder layers. Layers that are joined still run one by one if workers exchange tokens through PyTorch.
    Native ones run one by one anyway, with native halves."""
    ATTENTION_HALF = "attention_half"
    """A decoder layer up to its feed-forward half."""
    ATTENTION = "attention"
    """Attention of queries over the KV cache."""
    STATES = "states"
    """Layers that keep a state per sequence: linear attention, Mamba, short convolutions."""
    ROUTER = "router"
    EXPERTS = "experts"
    NORMS = "norms"
    ROTARY = "rotary"
    LINEARS = "linears"
    EXCHANGE = "exchange"
    """The exchange of tokens and sums between workers. It is native if all workers are on one node and can use it;
    between nodes and on GPUs it is always PyTorch's."""


class CodePath(StrEnum):
    """Which code serves a part."""

    JOINED = "joined"
    """One native call does what several modules did."""
    NATIVE = "native"
    """A function of the native library."""
    PACKED = "packed"
    """The module's own code, over a matrix in the native library's layout."""
    ONEDNN = "onednn"
    """oneDNN's product, over a matrix in its layout."""
    TRITON = "triton"
    """A kernel of model/gpu/."""
    FLASH = "flash"
    """torch's variable-length FlashAttention."""
    STACKED = "stacked"
    """One grouped product over all experts of a layer."""
    TORCH = "torch"
    """PyTorch's operators, called by this project."""
    TRANSFORMERS = "transformers"
    """The module's own code."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PartFit:
    """Modules of one kind that the same code serves for the same reason."""

    part: Part
    modules: str
    """Name of the modules' class, or a description."""
    count: int
    path: CodePath
    reason: str | None = None
    """Why no faster path serves them; None if this is the fastest one."""

    def __str__(self) -> str:
        why = "" if self.reason is None else f" ({self.reason})"
        return f"{self.part}: {self.count} x {self.modules} by {self.path}{why}"


@dataclass(frozen=True, slots=True, kw_only=True)
class FitReport:
    """Which path a model takes on one worker."""

    rows: tuple[PartFit, ...]
    """In the order of `Part`."""

    def of(self, part: Part) -> tuple[PartFit, ...]:
        return tuple(row for row in self.rows if row.part is part)

    def paths(self) -> tuple[tuple[Part, CodePath], ...]:
        """Every part with each path that serves some of its modules."""
        return tuple(dict.fromkeys((row.part, row.path) for row in self.rows))

    def summary(self) -> str:
        """One line: every part with its paths, and with how many modules each serves where there are several."""
        return ", ".join(f"{part} {shares}" for part in Part if (shares := self.shares(part)))

    def shares(self, part: Part) -> str:
        """The part's paths in a few words, such as "native 13/16 + torch 3/16"; empty where there is no such part."""
        counts: Counter[CodePath] = Counter()
        for row in self.of(part):
            counts[row.path] += row.count
        if len(counts) < 2:
            return "".join(counts)
        total = sum(counts.values())
        return " + ".join(f"{path} {count}/{total}" for path, count in counts.most_common())

    def text(self) -> str:
        """The summary, and below it a line for each row that no faster path could serve."""
        return "\n  ".join((self.summary(), *self.reasons()))

    def reasons(self) -> tuple[str, ...]:
        """A sentence for each row that no faster path could serve."""
        return tuple(str(row) for row in self.rows if row.reason is not None)


class FitNotes:
    """Collects notes about single modules, for a report."""

    def __init__(self, rows: Iterable[PartFit] = ()) -> None:
        """rows: notes that have been collected already."""
        self._counts: Counter[tuple[Part, str, CodePath, str | None]] = Counter()
        for row in rows:
            self.add(row.part, row.modules, row.path, row.reason, count=row.count)

    def add(self, part: Part, modules: str, path: CodePath, reason: str | None = None, *, count: int = 1) -> None:
        """Note that `path` serves `count` modules of this kind. reason: why no faster path does."""
        self._counts[part, modules, path, reason] += count

    def count(self, part: Part) -> int:
        """Modules of a part that have been noted."""
        return sum(count for (noted, *_), count in self._counts.items() if noted is part)

    def rows(self) -> tuple[PartFit, ...]:
        """The rows in the order of `Part`; rows of one part in the order in which they were noted."""
        return tuple(
            PartFit(part=part, modules=modules, count=count, path=path, reason=reason)
            for wanted in Part
            for (part, modules, path, reason), count in self._counts.items()
            if part is wanted
        )
