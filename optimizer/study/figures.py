"""Draws figures of comparisons and simulations as PNG files. Matplotlib is imported on first use only."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from elastic_moe.cluster.errors import ConfigError
from elastic_moe.cluster.lines import counted
from elastic_moe.optimizer.core.cost import shares, worker_loads
from elastic_moe.optimizer.core.problem import PlacementProblem, Semantics
from elastic_moe.optimizer.core.result import PlanResult
from elastic_moe.optimizer.drift import FrontierPoint
from elastic_moe.optimizer.study.compare import Row
from elastic_moe.optimizer.study.simulate import Look

MOST_PANELS = 6
"""Most planners in the heat map; more would be too small to read."""

_PREFERRED = ("contiguous", "greedy", "eplb", "moetuner", "local_search", "ilp", "auto")


def pyplot() -> Any:
    """matplotlib.pyplot, for files only. Raises ConfigError where matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError:
        raise ConfigError("figures need matplotlib; install it with pip install 'elastic-moe[plots]'") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 10, "font.size": 9})
    return plt


def load_heat_map(path: Path, test_problem: PlacementProblem, answers: Sequence[tuple[Row, PlanResult]]) -> None:
    """Load of every worker (across) in every layer (down) over the layer's mean, one panel per planner, one colour
    scale."""
    plt = pyplot()
    chosen = _panels(answers)
    maps = []
    for _, result in chosen:
        load = worker_loads(test_problem, shares(test_problem, result.placement.physical_to_logical_map))
        maps.append(load / test_problem.speed / load.mean(axis=1, keepdims=True))
    reach = min(0.5, max(0.1, max(float(np.abs(grid - 1).max()) for grid in maps)))
    width = max(1.6, min(3.2, 0.16 * maps[0].shape[1] + 0.8))
    figure, axes = plt.subplots(
        1, len(chosen), figsize=(width * len(chosen) + 1.2, 0.11 * maps[0].shape[0] + 1.6), squeeze=False, sharey=True
    )
    for axis, grid, (row, _) in zip(axes[0], maps, chosen, strict=True):
        image = axis.imshow(grid, cmap="RdBu_r", vmin=1 - reach, vmax=1 + reach, aspect="auto", interpolation="nearest")
        axis.set_title(f"{row.planner}\n{row.load_imbalance:.3f}")
        axis.set_xlabel("worker")
    axes[0][0].set_ylabel("MoE layer")
    figure.suptitle(
        "load over the layer's mean on the test tokens (in the titles: mean over layers of max/mean)", fontsize=10
    )
    figure.tight_layout(rect=(0, 0, 0.93, 0.97))
    figure.colorbar(image, cax=figure.add_axes((0.94, 0.18, 0.012, 0.6)), extend="both")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _panels(answers: Sequence[tuple[Row, PlanResult]]) -> list[tuple[Row, PlanResult]]:
    if len(answers) <= MOST_PANELS:
        return list(answers)
    rank = {name: k for k, name in enumerate(_PREFERRED)}
    wanted = sorted(answers, key=lambda answer: rank.get(answer[0].planner, len(rank)))[: MOST_PANELS - 1]
    last = [answer for answer in answers if answer[0].planner == "auto" and answer not in wanted]
    chosen = [*wanted, *last]
    return [answer for answer in answers if answer in chosen]


def pareto(path: Path, rows: Sequence[Row], semantics: Semantics) -> None:
    """Load against traffic on the test tokens; both better to the lower left. A line joins what nothing beats in
    both."""
    plt = pyplot()
    home = semantics is Semantics.HOME
    traffic = [row.fan_out if home else 1 - row.same_worker_transitions for row in rows]
    load = [row.load_imbalance for row in rows]
    best = [
        k
        for k in range(len(rows))
        if not any(
            load[j] <= load[k] and traffic[j] <= traffic[k] and (load[j], traffic[j]) != (load[k], traffic[k])
            for j in range(len(rows))
        )
    ]
    best.sort(key=lambda k: load[k])
    figure, axis = plt.subplots(figsize=(6.4, 4.4))
    axis.plot([load[k] for k in best], [traffic[k] for k in best], color="0.7", linewidth=1, zorder=1)
    axis.scatter(load, traffic, c=["C3" if k in best else "C0" for k in range(len(rows))], s=28, zorder=2)
    _label(axis, load, traffic, [row.planner for row in rows])
    axis.set_xlabel("load imbalance (mean over layers of max/mean)")
    axis.set_ylabel("distinct workers per token and layer" if home else "share of transitions that change worker")
    axis.set_title(f"load against traffic on the test tokens ({semantics}); red: beaten by none in both")
    axis.margins(0.12)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _label(axis: Any, xs: Sequence[float], ys: Sequence[float], names: Sequence[str]) -> None:
    """Names beside their points; points that lie on one another share one label, and near ones are pushed apart."""
    span_x, span_y = max(max(xs) - min(xs), 1e-9), max(max(ys) - min(ys), 1e-9)
    groups: list[tuple[float, float, list[str]]] = []
    for x, y, name in sorted(zip(xs, ys, names, strict=True)):
        for gx, gy, members in groups:
            if abs(gx - x) < 0.02 * span_x and abs(gy - y) < 0.03 * span_y:
                members.append(name)
                break
        else:
            groups.append((x, y, [name]))
    taken: list[tuple[float, float]] = []
    for x, y, members in groups:
        text_y = y
        while any(abs(tx - x) < 0.3 * span_x and abs(ty - text_y) < 0.055 * span_y for tx, ty in taken):
            text_y += 0.06 * span_y
        taken.append((x, text_y))
        line = None if text_y == y else {"arrowstyle": "-", "color": "0.6", "linewidth": 0.6}
        place = (x + 0.02 * span_x, text_y)
        axis.annotate(", ".join(members), (x, y), xytext=place, fontsize=8, va="center", arrowprops=line)


def solve_times(path: Path, rows: Sequence[Row]) -> None:
    """Seconds of each planner, on a logarithmic scale."""
    plt = pyplot()
    figure, axis = plt.subplots(figsize=(6.4, 0.28 * len(rows) + 1.2))
    seconds = [max(row.seconds, 1e-3) for row in rows]
    bars = axis.barh([row.planner for row in rows], seconds, color="C0")
    axis.bar_label(bars, [f"{row.seconds:.2f} s" for row in rows], padding=3, fontsize=8)
    axis.set_xscale("log")
    axis.set_xlim(left=min(seconds) / 1.5, right=max(seconds) * 4)
    axis.invert_yaxis()
    axis.set_xlabel("seconds")
    axis.set_title("time to plan")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def gain_curve(
    path: Path, points: Sequence[FrontierPoint], expert_bytes: int, full: tuple[int, float] | None = None
) -> None:
    """Gain per step against gigabytes moved, from the placement in force. `full`: moves and step_s of a plan from
    scratch."""
    plt = pyplot()
    stay_s = points[0].step_s
    figure, axis = plt.subplots(figsize=(6.4, 4.0))
    moved = [point.moves * expert_bytes / 1e9 for point in points]
    gain = [100 * (stay_s - point.step_s) / stay_s for point in points]
    axis.plot(moved, gain, marker="o", markersize=4, label="re-placement from the one in force")
    if full is not None:
        x, y = full[0] * expert_bytes / 1e9, 100 * (stay_s - full[1]) / stay_s
        axis.scatter([x], [y], color="C3", zorder=3, label="planned from scratch")
        axis.axhline(0.8 * y, color="0.7", linestyle="--", linewidth=1)
        axis.axvline(0.25 * x, color="0.7", linestyle="--", linewidth=1)
        axis.annotate("80 % of its gain", (x, 0.8 * y), ha="right", va="bottom", fontsize=8, color="0.4")
        axis.annotate("25 % of its bytes ", (0.25 * x, 0), ha="left", va="bottom", fontsize=8, color="0.4")
    axis.set_xlabel("weights moved (GB)")
    axis.set_ylabel("predicted saving per step (%)")
    axis.set_title("what each byte moved is worth")
    axis.legend(frameon=False, loc="lower right")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def imbalance_over_time(path: Path, looks: Sequence[Look]) -> None:
    """Load imbalance of each interval with and without re-placement; a tick at every change."""
    plt = pyplot()
    minutes = [look.time_s / 60 for look in looks]
    figure, axis = plt.subplots(figsize=(7.2, 3.8))
    axis.plot(minutes, [look.imbalance_static for look in looks], color="0.5", label="without re-placement")
    axis.plot(minutes, [look.imbalance for look in looks], color="C0", label="with re-placement")
    changes = [(m, look) for m, look in zip(minutes, looks, strict=True) if look.changed]
    for k, (minute, _) in enumerate(changes):
        axis.axvline(minute, color="C3", linewidth=0.8, alpha=0.6, label="change" if k == 0 else None)
    axis.set_xlabel("virtual time (minutes)")
    axis.set_ylabel("load imbalance (max/mean)")
    axis.set_ylim(bottom=1.0)
    moved = sum(look.bytes for look in looks) / 1e9
    axis.set_title(f"{counted(len(changes), 'change')}, {moved:.1f} GB of weights moved")
    axis.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
