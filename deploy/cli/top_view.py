"""What `emoe top` draws: a pure function from looks at a server to text of a given size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from elastic_moe.cluster.facts.operations import ENDED
from elastic_moe.cluster.lines import counted, size_text
from elastic_moe.cluster.messages.views import Operation, Phase, WorkerState
from elastic_moe.deploy.cli.top_look import FloatArray, Look, SeenWorker, mean_s, rate, relative_load

BARS = "▁▂▃▄▅▆▇█"
COLOURS = {
    WorkerState.SERVING: "green",
    WorkerState.DRAINING: "yellow",
    WorkerState.STARTING: "yellow",
    WorkerState.STANDBY: "bright_black",
    WorkerState.DEAD: "red",
    WorkerState.STOPPED: "bright_black",
}
OPERATIONS_SHOWN = 6
TREND_SHOWN = 30
"""Number of looks whose tokens per second are drawn."""
WIDE = 110
"""Fewest columns of a terminal for which the whole table of workers is drawn."""
BESIDE_WORKERS = 17
"""Lines of everything apart from the workers, with OPERATIONS_SHOWN operations."""


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """Everything that a picture is drawn from."""

    url: str
    now: Look
    before: Look | None = None
    """The look before `now`."""
    trend: Sequence[float] = field(default_factory=tuple)
    """Tokens per second at each look, the latest last."""
    away: str | None = None
    """Why the server does not answer; `now` is then its last answer. None if it answers."""


def render(view: View, *, width: int, height: int) -> RenderableType:
    """The whole picture, for a terminal of `width` columns and `height` lines."""
    return Group(
        _head(view),
        _figures(view, width),
        _cluster(view, width),
        Text(),
        _workers(view.now, width=width, most=max(2, height - BESIDE_WORKERS)),
        Text(),
        _operations(view.now.operations, width),
    )


def _head(view: View) -> Text:
    now = view.now
    state, colour = ("serves", "green") if now.ready.ready else (now.ready.error or now.ready.reason, "red")
    if now.ready.ready and now.ready.resident < 1:
        state, colour = f"serves with {int(100 * now.ready.resident)}% of the experts in memory", "yellow"
    if view.away is not None:
        state, colour = f"no answer: {view.away}", "red"
    head = Text.assemble(
        (printable(now.model_name) or "emoe", "bold"), " at ", printable(view.url), "  ", (printable(state), colour)
    )
    if now.epoch is not None:
        head.append(f"  epoch {now.epoch}")
    if now.pinned:
        head.append("  placement pinned", "yellow")
    if now.engine is not None:
        head.append(f"  group {now.engine} of {now.groups}", "yellow")
    elif now.groups > 1:
        head.append(f"  figures of {now.groups} groups, workers and operations of group 0 (--engine N)", "yellow")
    return head


def _figures(view: View, width: int) -> Text:
    now, before, metrics = view.now, view.before, view.now.metrics
    figures = [
        ("tokens/s", count(rate(before, now, "vllm:generation_tokens_total"))),
        ("prompt tokens/s", count(rate(before, now, "vllm:prompt_tokens_total"))),
        ("running", count(metrics.get("vllm:num_requests_running"))),
        ("waiting", count(metrics.get("vllm:num_requests_waiting"))),
        ("KV", percent(metrics.get("vllm:kv_cache_usage_perc"))),
        ("first token", seconds(mean_s(before, now, "vllm:time_to_first_token_seconds"))),
        ("between tokens", seconds(mean_s(before, now, "vllm:inter_token_latency_seconds"))),
        ("steps/s", count(rate(before, now, "emoe:steps_total"))),
        ("balance", percent(metrics.get("emoe:balancedness"))),
    ]
    line = _pairs(figures, width)
    if view.trend:
        line.append(f"\ntokens/s  {trend(view.trend[-TREND_SHOWN:])}  up to {count(max(view.trend[-TREND_SHOWN:]))}")
    return line


def _cluster(view: View, width: int) -> Text:
    scale, metrics = view.now.scale, view.now.metrics
    # while a group starts, workers that are ready serve nobody yet
    serving = "-"
    if scale is not None:
        allowed = f"{scale.min_workers} to {scale.max_workers} possible"
        serving = f"{scale.serving} of {counted(scale.target, 'worker')}, {allowed}"
    line = _pairs(
        [
            ("serving", serving),
            ("recoveries", count(metrics.get("emoe:recoveries_total"))),
            ("resumed", count(metrics.get("emoe:requests_resumed_total"))),
            ("experts moved", count(metrics.get("emoe:experts_moved_total"))),
            ("in bytes", size(metrics.get("emoe:bytes_moved_total"))),
        ],
        width,
    )
    if scale is not None and scale.autoscaler is not None:
        line.append(f"\nautoscaler  {printable(scale.autoscaler)}")
    return line


def _pairs(pairs: Sequence[tuple[str, str]], width: int) -> Text:
    """Names and values in as many lines as it takes. A name and its value stay together."""
    line, used = Text(), 0
    for name, value in pairs:
        size = len(name) + 1 + len(value)
        if used and used + size > width:
            line.rstrip()
            line.append("\n")
            used = 0
        line.append(f"{name} ", "bright_black")
        line.append(f"{value}  ", "bold")
        used += size + 2
    line.rstrip()
    return line


@dataclass(frozen=True, slots=True, kw_only=True)
class _Column:
    name: str
    width: int
    """Most columns of the terminal that its text takes."""
    right: bool = False
    wide: bool = False
    """Whether a narrow terminal does without this column."""


_COLUMNS = (
    _Column(name="worker", width=6),
    _Column(name="state", width=8),
    _Column(name="node", width=15, wide=True),
    _Column(name="device", width=6, wide=True),
    _Column(name="running", width=7, right=True),
    _Column(name="KV", width=4, right=True),
    _Column(name="experts", width=7, right=True),
    _Column(name="load", width=6, right=True),
    _Column(name="experts run by", width=14, wide=True),
)


def _workers(look: Look, *, width: int, most: int) -> RenderableType:
    table = Table(box=None, padding=(0, 1), header_style="bright_black", pad_edge=False)
    columns = [column for column in _COLUMNS if not column.wide or width >= WIDE]
    for column in columns:
        table.add_column(column.name, justify="right" if column.right else "left", no_wrap=True)
    table.add_column("load by layer", no_wrap=True)
    layers_shown = max(8, width - sum(column.width + 2 for column in columns))
    relative, ranks = relative_load(look), {}
    if look.placement is not None:
        ranks = {worker.id: rank for rank, worker in enumerate(look.placement.workers)}
    # workers that have ended stay listed for a while, and must not push others out of the picture
    for worker in sorted(look.workers, key=lambda worker: worker.state.ended)[:most]:
        rank = ranks.get(worker.id)
        mine = None if relative is None or rank is None else relative[rank]
        slots = "-" if rank is None or look.placement is None else str(look.placement.workers[rank].slots)
        cells = _worker(worker, slots, mine)
        table.add_row(*(cells[column.name] for column in columns), Text() if mine is None else heat(mine, layers_shown))
    if len(look.workers) > most:
        return Group(table, Text(f"and {len(look.workers) - most} more", "bright_black"))
    return table


def _worker(worker: SeenWorker, slots: str, load: FloatArray | None) -> dict[str, Text]:
    """The text of each column."""
    paths = sorted({row.path for row in worker.fit or () if row.part == "experts"})
    cells = {
        "worker": Text(printable(worker.id)),
        "state": Text(worker.state, COLOURS[worker.state]),
        "node": Text(printable(worker.node)),
        "device": Text(printable(worker.device)),
        "running": Text(str(worker.running_requests)),
        "KV": Text(percent(worker.kv_usage)),
        "experts": Text(slots),
        "load": Text("-" if load is None or not load.any() else f"{load[load > 0].mean():.2f}x"),
        "experts run by": Text(printable(", ".join(paths))),
    }
    for column in _COLUMNS:
        cells[column.name].truncate(column.width, overflow="ellipsis")
    return cells


def _operations(operations: Sequence[Operation], width: int) -> RenderableType:
    """The newest operations. A narrow terminal shows fewer, and the reason of each in a line of its own."""
    if not operations:
        return Text("no operation yet", "bright_black")
    narrow = width < WIDE
    shown = operations[: OPERATIONS_SHOWN // 2 if narrow else OPERATIONS_SHOWN]
    # without a width, a long reason would take the room of the other columns
    name = min(24, max(len("operation"), *(len(operation.operation_id) for operation in shown)))
    whole = _operation_table(name, wide=not narrow)
    parts: list[RenderableType] = [whole]
    for number, operation in enumerate(shown):
        colour = "red" if operation.phase is Phase.FAILED else "" if operation.phase in ENDED else "yellow"
        cells = [
            Text(printable(operation.operation_id)),
            Text(operation.kind),
            Text(operation.phase, colour),
            Text(percent(operation.progress)),
        ]
        if not narrow:
            whole.add_row(*cells, _why(operation))
            continue
        # a table of its own, because the line between has no columns
        table = whole if not number else _operation_table(name, wide=False, head=False)
        table.add_row(*cells)
        reason = Text("  ").append_text(_why(operation))
        reason.truncate(width, overflow="ellipsis")
        parts += [reason] if table is whole else [table, reason]
    return Group(*parts)


def _operation_table(name: int, *, wide: bool, head: bool = True) -> Table:
    table = Table(box=None, padding=(0, 1), header_style="bright_black", pad_edge=False, expand=wide, show_header=head)
    table.add_column("operation", no_wrap=True, min_width=name, max_width=name)
    table.add_column("kind", no_wrap=True, min_width=9)
    table.add_column("phase", no_wrap=True, min_width=10)
    table.add_column("done", justify="right", no_wrap=True, min_width=4)
    if wide:
        table.add_column("why", no_wrap=True, ratio=1)
    return table


def _why(operation: Operation) -> Text:
    leaving = ""
    if operation.retiring:
        state = "may go" if operation.safe_to_terminate else "leaving"
        leaving = f" ({', '.join(operation.retiring)} {state})"
    return Text(printable((operation.error or operation.reason) + leaving))


# --- Small parts ------------------------------------------------------------------------------------------------


def heat(load: FloatArray, most: int) -> Text:
    """A bar for each layer, or, where there are more than `most`, for the busiest layer of each group: half high and
    grey at the mean load, blue below, red above."""
    groups = np.array_split(load, min(len(load), most))
    text = Text()
    for group in groups:
        value = min(float(group.max()), 2.0)
        text.append(BARS[min(int(value / 2 * len(BARS)), len(BARS) - 1)], colour_of(value))
    return text


def colour_of(load: float) -> str:
    """The colour of a load relative to the mean, 0 to 2."""
    off = min(abs(load - 1.0) * 2, 1.0)
    strong, weak = int(150 + 90 * off), int(150 - 90 * off)
    return f"rgb({strong},{weak},{weak})" if load > 1 else f"rgb({weak},{weak},{strong})"


def trend(values: Sequence[float]) -> str:
    """A bar for each value; the highest value fills the line."""
    top = max(values) or 1.0
    return "".join(BARS[min(int(value / top * len(BARS)), len(BARS) - 1)] for value in values)


def count(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}" if 0 < value < 10 and value != int(value) else f"{value:,.0f}"


def percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.0f}%"


def seconds(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{1000 * value:.0f} ms" if value < 1 else f"{value:.1f} s"


def size(value: float | None) -> str:
    return "-" if value is None else size_text(value)


def printable(text: str) -> str:
    """A server's text without characters that control a terminal, such as escape sequences."""
    return "".join(character if character.isprintable() else "?" for character in text)
