"""Writes the results of a benchmark: its runs as JSON and CSV, tables in Markdown, and a plot."""

from __future__ import annotations

import csv
import json
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from tests.bench.client import OUTPUT_TOKENS, PROMPT_TOKENS, Measured
from tests.bench.machine import Floor, Machine
from tests.bench.processes import share_beside_model


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One server, started once, under every load."""

    server: str
    peer: bool
    """Whether this server is a peer, so that ratios compare with it."""
    started: str
    machine: Machine
    measured: Sequence[Measured]
    prefill_tokens_per_s: float
    lone_ttft_ms: float
    engine_ttft_ms: float | None
    """The engine's part of `lone_ttft_ms`, if the server reports it."""
    memory_bytes: int
    cpu_s: dict[str, float] = field(default_factory=dict)
    """By purpose, under the last load; only of this project's servers."""
    fit: str = ""
    """Which code served the model on the first worker (cluster/fit.py); only of this project's servers."""

    @classmethod
    def from_json(cls, raw: dict[str, object]) -> Run:
        measured = [Measured(**m) for m in raw["measured"]]  # type: ignore[attr-defined]
        return cls(**raw | {"measured": measured, "machine": Machine(**raw["machine"])})  # type: ignore[arg-type]


Figure = Callable[[Run], float | None]


def median(runs: Iterable[Run], figure: Figure) -> float | None:
    values = [value for run in runs if (value := figure(run)) is not None]
    return statistics.median(values) if values else None


def at(concurrency: int, name: str) -> Figure:
    """A figure of `Measured` at one concurrency."""
    return lambda run: next((getattr(m, name) for m in run.measured if m.concurrency == concurrency), None)


def by_server(runs: Sequence[Run]) -> dict[str, list[Run]]:
    found: dict[str, list[Run]] = {}
    for run in runs:
        found.setdefault(run.server, []).append(run)
    return found


def concurrencies(runs: Sequence[Run]) -> list[int]:
    return sorted({m.concurrency for run in runs for m in run.measured})


def better_peer(runs: Sequence[Run], figure: Figure, *, least: bool = False) -> float | None:
    """The best of the peers' medians; None without peers."""
    medians = [median(group, figure) for group in by_server([run for run in runs if run.peer]).values()]
    known = [value for value in medians if value is not None]
    return (min if least else max)(known) if known else None


def _show(value: float | None, digits: int = 0) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _over(value: float | None, other: float | None) -> str:
    return "" if value is None or not other else f"{value / other:.2f}"


def _spread(runs: Sequence[Run], figure: Figure) -> str:
    """Median, and the range where there is more than one run."""
    values = [value for run in runs if (value := figure(run)) is not None]
    text = _show(median(runs, figure))
    return f"{text} ({min(values):.0f}-{max(values):.0f})" if len(values) > 1 else text


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def serving_table(runs: Sequence[Run]) -> str:
    """Figures by server and concurrency; ratios are of medians over the better of the peers."""
    head = ("server", "concurrency", "output tok/s", "TTFT ms", "ITL ms", "p99 ITL ms", "tok/s over better peer")
    rows = []
    for server, group in by_server(runs).items():
        for c in concurrencies(group):
            rate = at(c, "output_tokens_per_s")
            rows.append(
                [
                    *(server, str(c), _spread(group, rate)),
                    *(_show(median(group, at(c, "ttft_ms"))), _show(median(group, at(c, "itl_ms")), 1)),
                    _show(median(group, at(c, "itl_p99_ms"))),
                    "" if group[0].peer else _over(median(group, rate), better_peer(runs, rate)),
                ]
            )
    return markdown(head, rows)


def whole_table(runs: Sequence[Run]) -> str:
    """What does not depend on concurrency."""
    head = ("server", "prefill tok/s", "over better peer", "TTFT alone ms", "of it beside the engine ms", "memory GB")
    rows = []
    for server, group in by_server(runs).items():
        prefill = median(group, _prefill)
        rows.append(
            [
                *(server, _spread(group, _prefill)),
                "" if group[0].peer else _over(prefill, better_peer(runs, _prefill)),
                _show(median(group, lambda run: run.lone_ttft_ms), 1),
                _show(median(group, _beside_engine), 1),
                _show(median(group, lambda run: run.memory_bytes / 1e9), 2),
            ]
        )
    return markdown(head, rows)


def _prefill(run: Run) -> float:
    return run.prefill_tokens_per_s


def _beside_engine(run: Run) -> float | None:
    return None if run.engine_ttft_ms is None else run.lone_ttft_ms - run.engine_ttft_ms


def floor_table(runs: Sequence[Run], floor: Floor) -> str:
    """Shares of what the machine allows: a decode step's floor over the median time between tokens, and of prefill.

    With prompts that run between decode steps, the time between tokens is not all decoding's.
    """
    columns = concurrencies(runs)
    # a request's context is on average its prompt and half its answer
    context = PROMPT_TOKENS + OUTPUT_TOKENS // 2

    def decode(c: int) -> Figure:
        def share(run: Run) -> float | None:
            itl_ms = at(c, "itl_ms")(run)
            return None if itl_ms is None else 100 * floor.decode_step_ms(c, context, run.machine) / itl_ms

        return share

    def prefill(run: Run) -> float:
        return 100 * run.prefill_tokens_per_s / floor.prefill_tokens_per_s(run.machine)

    head = ("server", *(f"decode at {c} %" for c in columns), "prefill %")
    return markdown(
        head,
        (
            [server, *(_show(median(group, decode(c))) for c in columns), _show(median(group, prefill))]
            for server, group in by_server(runs).items()
        ),
    )


def cpu_table(runs: Sequence[Run]) -> str:
    """CPU seconds by purpose under the last load, of this project's servers."""
    known = {server: group[-1].cpu_s for server, group in by_server(runs).items() if group[-1].cpu_s}
    purposes = list(dict.fromkeys(purpose for cpu_s in known.values() for purpose in cpu_s))
    head = ("server", *(f"{purpose} s" for purpose in purposes), "beside the model %")
    return markdown(
        head,
        (
            [server, *(_show(cpu_s.get(p), 1) for p in purposes), _show(100 * share_beside_model(cpu_s), 1)]
            for server, cpu_s in known.items()
        ),
    )


def report(runs: Sequence[Run], about: dict[str, str], floor: Floor | None) -> str:
    """All tables, with what they mean."""
    machines = [run.machine for run in runs]
    read = statistics.median(m.read_gb_per_s for m in machines)
    gemm = statistics.median(m.gemm_gflop_per_s for m in machines)
    parts = [
        "; ".join(f"{name} {value}" for name, value in about.items()) + "\n",
        f"The machine reads {read:.0f} GB/s and multiplies bfloat16 at {gemm:.0f} GFLOP/s.\n",
        serving_table(runs),
        whole_table(runs),
        *(f"{server} is served by: {group[-1].fit}\n" for server, group in by_server(runs).items() if group[-1].fit),
    ]
    if floor is not None:
        parts += ["Share of the machine's floor:\n", floor_table(runs, floor)]
    if any(run.cpu_s for run in runs):
        parts += [f"CPU time at concurrency {concurrencies(runs)[-1]}:\n", cpu_table(runs)]
    return "\n".join(parts)


def save(runs: Sequence[Run], about: dict[str, str], floor: Floor | None, out: Path) -> None:
    """results.json, results.csv, results.md and results.png in `out`."""
    (out / "results.json").write_text(json.dumps({"about": about, "runs": [asdict(run) for run in runs]}, indent=1))
    (out / "results.md").write_text(report(runs, about, floor))
    with (out / "results.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        names = [f.name for f in fields(Measured)]
        writer.writerow(["server", "started", *names])
        for run in runs:
            for m in run.measured:
                writer.writerow([run.server, run.started, *(getattr(m, name) for name in names)])
    plot(runs, out / "results.png")


def load(out: Path) -> list[Run]:
    """Runs of an earlier benchmark in `out`; none where there was none."""
    path = out / "results.json"
    return [Run.from_json(raw) for raw in json.loads(path.read_text())["runs"]] if path.exists() else []


def plot(runs: Sequence[Run], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = (
        ("output_tokens_per_s", "output tokens per second"),
        ("ttft_ms", "median ms to the first token"),
        ("itl_ms", "median ms between tokens"),
    )
    groups = by_server(runs)
    columns = concurrencies(runs)
    figure, all_axes = plt.subplots(1, len(panels), figsize=(13, 4), layout="constrained")
    width = 0.8 / len(groups)
    for axes, (name, title) in zip(all_axes, panels, strict=True):
        for i, (server, group) in enumerate(groups.items()):
            heights = [median(group, at(c, name)) or 0.0 for c in columns]
            x = [j + (i - (len(groups) - 1) / 2) * width for j in range(len(columns))]
            bars = axes.bar(x, heights, 0.95 * width, label=server)
            axes.bar_label(bars, fmt="%.0f", fontsize=7)
        axes.set(title=title, xlabel="concurrent requests")
        axes.set_xticks(range(len(columns)), [str(c) for c in columns])
        axes.grid(axis="y", alpha=0.3)
        axes.set_axisbelow(True)
    figure.legend(*all_axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(groups))
    figure.savefig(path, dpi=120)
    plt.close(figure)
