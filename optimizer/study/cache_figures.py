"""Figures 12 and 13 of Huang et al. 2023 for any trace: miss rate against cache size, and latency against memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from elastic_moe.optimizer.study.caches import CacheRow
from elastic_moe.optimizer.study.figures import pyplot

COLOURS = {"lfru": "C3", "lfu": "C0", "lru": "C2", "lifo": "C1", "static": "0.5", "min": "black"}


def miss_rates(path: Path, rows: Sequence[CacheRow]) -> None:
    """Miss rate against cache size, a panel per placement; solid: mean, dashed: the worst layer of a worker."""

    def panel(axis: Any, curve: Sequence[CacheRow], colour: str) -> None:
        share = [100 * row.share for row in curve]
        axis.plot(
            share, [row.miss_rate for row in curve], color=colour, marker="o", markersize=3, label=curve[0].policy
        )
        axis.plot(share, [row.worst_miss_rate for row in curve], color=colour, linestyle="--", linewidth=0.8)

    title = f"share of accesses that miss, {rows[0].batch} requests at once (dashed: the worst layer of a worker)"
    _panels(path, rows, panel, ("cache size (% of a worker's experts)", "miss rate"), title)


def latency(path: Path, rows: Sequence[CacheRow]) -> None:
    """Time of a step against the memory that a worker's experts take, a panel per placement."""

    def panel(axis: Any, curve: Sequence[CacheRow], colour: str) -> None:
        memory = [row.memory_bytes / 1e9 for row in curve]
        step_ms = [row.step_s * 1e3 for row in curve]
        axis.plot(memory, step_ms, color=colour, marker="o", markersize=3, label=curve[0].policy)

    title = f"time of the expert layers of a step, {rows[0].batch} requests at once"
    _panels(path, rows, panel, ("experts in a worker's memory (GB)", "ms per step"), title)


def _panels(
    path: Path,
    rows: Sequence[CacheRow],
    panel: Callable[[Any, Sequence[CacheRow], str], None],
    labels: tuple[str, str],
    title: str,
) -> None:
    plt = pyplot()
    placements = list(dict.fromkeys(row.placement for row in rows))
    figure, axes = plt.subplots(1, len(placements), figsize=(3.6 * len(placements), 3.6), sharey=True, squeeze=False)
    for axis, placement in zip(axes[0], placements, strict=True):
        for policy, colour in COLOURS.items():
            curve = [row for row in rows if (row.placement, row.policy) == (placement, policy)]
            if curve:
                panel(axis, curve, colour)
        axis.set_title(placement)
        axis.set_xlabel(labels[0])
        axis.set_ylim(bottom=0)
    axes[0][0].set_ylabel(labels[1])
    axes[0][-1].legend(frameon=False, fontsize=8)
    figure.suptitle(title, fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
