"""The tables, the exponents, and the plot."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from tests.bench.scale.control import ControlCost
from tests.bench.scale.engine import EngineCost

Column = tuple[str, Callable[[Any], str]]

ENGINE: tuple[Column, ...] = (
    ("workers", lambda row: f"{row.workers}"),
    ("sequences", lambda row: f"{row.sequences}"),
    ("device ms", lambda row: f"{1e3 * row.device_s:.1f}"),
    ("step ms", lambda row: f"{1e3 * row.step_s:.1f}"),
    ("engine CPU ms", lambda row: f"{1e3 * row.cpu_s:.2f}"),
    ("us a sequence", lambda row: f"{1e6 * row.cpu_s / row.sequences:.2f}"),
    ("admission us", lambda row: f"{1e6 * row.admit_s:.0f}"),
    ("KB a sequence", lambda row: f"{row.bytes_each / 1e3:.1f}"),
    ("bytes a token", lambda row: f"{row.bytes_token:.1f}"),
    ("held ms", lambda row: f"{1e3 * row.longest_s:.0f}"),
)
CONTROL: tuple[Column, ...] = (
    ("workers", lambda row: f"{row.workers}"),
    ("start s", lambda row: f"{row.start_s:.2f}"),
    ("scale s", lambda row: f"{row.scale_s:.2f}"),
    ("flip ms", lambda row: f"{1e3 * row.flip_s:.1f}"),
    ("death to serving s", lambda row: f"{row.death_s:.2f}"),
    ("polling, % of a core", lambda row: f"{100 * row.poll_share:.1f}"),
    ("held ms, polling", lambda row: f"{1e3 * row.held_s:.0f}"),
    ("changing", lambda row: f"{1e3 * row.changing_held_s:.0f}"),
    ("saved KB", lambda row: f"{row.saved_bytes / 1e3:.0f}"),
    ("saves", lambda row: f"{row.saves}"),
    ("KB a save", lambda row: f"{row.written_bytes / 1e3:.0f}"),
)

API: tuple[Column, ...] = (
    ("API replicas", lambda row: f"{row.replicas}"),
    ("streams of each", lambda row: f"{row.streams}"),
    ("tokens/s read", lambda row: f"{row.tokens_per_s:.0f}"),
    ("CPU us a token", lambda row: f"{1e6 * row.token_s:.1f}"),
    ("tokens/s a core", lambda row: f"{1 / row.token_s:.0f}"),
    ("held ms", lambda row: f"{1e3 * row.longest_s:.0f}"),
)


def table(columns: Sequence[Column], rows: Sequence[Any]) -> str:
    lines = ["| " + " | ".join(name for name, _ in columns) + " |", "|" + "---|" * len(columns)]
    return "\n".join([*lines, *("| " + " | ".join(tell(row) for _, tell in columns) + " |" for row in rows)])


def exponent(sizes: Sequence[float], costs: Sequence[float]) -> float | None:
    """b of cost = a size^b, fitted to the logarithms; None for fewer than two sizes."""
    if len(set(sizes)) < 2:
        return None
    return float(np.polyfit(np.log(sizes), np.log(np.maximum(costs, 1e-9)), 1)[0])


def exponents(engine: Sequence[EngineCost], control: Sequence[ControlCost]) -> str:
    """One line for each cost and the size that it is fitted against."""
    lines = []
    most = max((row.workers for row in engine), default=0)
    several = [row for row in engine if row.workers == most]
    costs = {
        "engine CPU of a step, by sequences": exponent([r.sequences for r in several], [r.cpu_s for r in several]),
        "admission of a request, by workers": exponent([r.workers for r in engine], [r.admit_s for r in engine]),
        "polling, by workers": exponent([r.workers for r in control], [r.poll_share for r in control]),
        "flip, by workers": exponent([r.workers for r in control if r.flip_s], [r.flip_s for r in control if r.flip_s]),
        "saved state, by workers": exponent([r.workers for r in control], [r.saved_bytes for r in control]),
    }
    for name, value in costs.items():
        if value is not None:
            lines.append(f"- {name}: exponent {value:.2f}")
    return "\n".join(lines)


def plot(path: Path, engine: Sequence[EngineCost], control: Sequence[ControlCost]) -> None:
    """Needs matplotlib, which `pip install elastic-moe[plots]` brings."""
    import matplotlib as mpl

    mpl.use("svg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4))
    for workers in sorted({row.workers for row in engine}):
        rows = [row for row in engine if row.workers == workers]
        left.plot([r.sequences for r in rows], [1e3 * r.cpu_s for r in rows], marker="o", label=f"{workers} workers")
    if engine:
        left.axhline(1e3 * min(row.device_s for row in engine), color="grey", linestyle=":", label="the device's step")
        left.set(xscale="log", yscale="log", xlabel="sequences", ylabel="engine CPU, ms a step")
        left.legend()
    sizes = [row.workers for row in control]
    right.plot(sizes, [100 * r.poll_share for r in control], marker="o", label="polling, % of a core")
    right.plot(sizes, [1e3 * r.flip_s for r in control], marker="o", label="flip, ms")
    right.plot(sizes, [1e3 * r.death_s for r in control], marker="o", label="a death until survivors serve, ms")
    if control:
        right.set(xscale="log", yscale="log", xlabel="workers")
        right.legend()
    figure.tight_layout()
    figure.savefig(path)


def as_values(rows: Sequence[Any]) -> list[dict[str, float]]:
    return [asdict(row) for row in rows]
