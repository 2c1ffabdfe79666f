"""Runs scenarios one after the other on one server under load, and says what became of every request.

python -m tests.chaos.driver --seed 0 [--only "kill worker"] [--model DIR] [--dtype bfloat16] [--resident 0.5] [--drift]
"""

from __future__ import annotations

import argparse
import random
import signal
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from elastic_moe.model.checkpoints.checkpoint import open_checkpoint
from tests.chaos.bench import API_REPLICAS, Bench, wait_for_spare
from tests.chaos.drift import drift
from tests.chaos.leaks import scale_cycles
from tests.chaos.load import Expected, Load
from tests.chaos.scenarios import CALM, FAULTS, Scenario
from tests.e2e.conftest import MODEL, READY_S, Server, kill_family, load_reference, start
from tests.model.families import tiny_checkpoint

WORKERS = 2
THREADS = 4
COPIES_S = 2.0
"""Experts of a tiny model are copied within milliseconds: the bandwidth is limited so that all of them take so long."""
LONGEST = 160
"""Output tokens of the longest answer of a tiny model."""
LONGEST_OF_OTHERS = 48
SETTLED_CYCLES = 4
LEAKS = "scale cycles"
INTO_READS_S = (0.0, 0.1)
"""After a re-placement began whose experts are read from disk: no bandwidth limits those reads."""
NEED_COPIES = ("stop migrator in re-placement",)
"""Scenarios that need copies of experts. A migrator without work is not missed until there is some."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """What one scenario did to the clients."""

    name: str
    outage_s: float
    """No stream got a token."""
    gap_s: float
    """Longest wait of one stream between two tokens."""
    whole_s: float
    """From the fault until as many workers serve as should and nothing is under way."""
    answers: int
    faults: tuple[str, ...]
    figures: Mapping[str, str] = field(default_factory=dict)


def start_server(checkpoint: Path, log: Path, *flags: str) -> Server:
    """With `flags` besides those that all scenarios have."""
    common = ["--workers", str(WORKERS), "--dtype", "float32", "--max-model-len", "512", "--served-model-name", MODEL]
    common += ["--kv-cache-memory-bytes", "50000000", "--drain-timeout", "5", "--api-replicas", str(API_REPLICAS)]
    common += flags
    server = start([str(checkpoint), *common], log)
    try:
        server.wait("readiness", server.ready, READY_S)
    except BaseException:
        kill_family(server)
        raise
    return server


def tiny_flags(checkpoint: Path) -> list[str]:
    """Steps and copies of a tiny model that take long enough to be struck."""
    info = open_checkpoint(checkpoint).info
    all_mb = info.num_layers * info.num_logical_experts * info.expert_bytes / 1e6
    return ["--max-num-batched-tokens", "64", "--migration-bandwidth", str(all_mb / COPIES_S)]


def resident_flags(checkpoint: Path, share: float) -> list[str]:
    """Memory of all workers for this share of the experts; the others are read from disk."""
    info = open_checkpoint(checkpoint).info.served_in("float32")
    per_layer = max(1, int(info.num_logical_experts * share / WORKERS))
    return ["--expert-memory-bytes", str(per_layer * info.num_layers * info.expert_bytes)]


def run(
    server: Server,
    expected: Expected,
    scenarios: Mapping[str, Scenario],
    *,
    seed: int,
    tell: bool = False,
    resident: float = 1.0,
) -> list[Row]:
    """Each scenario under a load of its own, from a whole cluster to a whole cluster."""
    rows = []
    for name, scenario in scenarios.items():
        rows.append(_run_one(server, expected, name, scenario, seed, resident))
        if tell:
            print(line(rows[-1]), flush=True)
            for key, value in rows[-1].figures.items():
                print(f"    {key}: {value}", flush=True)
            for fault in rows[-1].faults[:5]:
                print(f"    {fault}", flush=True)
    return rows


def _run_one(server: Server, expected: Expected, name: str, scenario: Scenario, seed: int, resident: float) -> Row:
    troubles: list[str] = []
    figures: Mapping[str, str] = {}
    # where nothing fails, what clients feel is measured: on streams, and without prompts that hold everybody up
    mix = {"streams": 1.0, "prefill": 0.0, "background": 0.0} if name in CALM else {}
    wait_for_spare(server)
    with Load(server, expected, threads=THREADS, seed=seed, **mix) as load:
        bench = Bench(server=server, load=load, rng=random.Random(f"{seed}/{name}"), workers=WORKERS)
        if resident < 1:
            bench.into_move_s = INTO_READS_S
        load.wait_for_tokens(100)
        bench.struck_at = time.monotonic()
        try:
            figures = scenario(bench) or {}
            bench.settle()
        except AssertionError as error:
            troubles.append(f"not whole again: {str(error)[:500]}")
        begin, end = bench.struck_at, time.monotonic()
    return Row(
        name=name,
        outage_s=load.outage_s(begin, end),
        gap_s=load.longest_gap_s(begin, end),
        whole_s=end - begin,
        answers=load.tally.answers,
        faults=(*load.tally.faults, *troubles),
        figures=figures,
    )


HEADER = f"{'scenario':36} {'outage':>8} {'gap':>8} {'whole':>8} {'answers':>8} {'faults':>7}"


def line(row: Row) -> str:
    times = f"{row.outage_s:6.2f} s {row.gap_s:6.2f} s {row.whole_s:6.2f} s"
    return f"{row.name:36} {times} {row.answers:8d} {len(row.faults):7d}"


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parsed(arguments)
    # as Ctrl-C: the server is ended too
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    scenarios = {**CALM, **FAULTS, LEAKS: lambda bench: scale_cycles(bench, options.cycles, SETTLED_CYCLES)}
    copies = options.resident == 1
    scenarios = {name: scenarios[name] for name in options.only or scenarios if copies or name not in NEED_COPIES}
    with tempfile.TemporaryDirectory(prefix="emoe-chaos-") as directory:
        tiny = options.model is None
        checkpoint = tiny_checkpoint(options.family, Path(directory)) if tiny else Path(options.model)
        if options.drift:
            return drift(checkpoint, Path(directory) / "log")
        # in other types tokens depend on the number of workers: that they all come is what is checked then
        reference = load_reference(checkpoint) if options.dtype == "float32" else None
        expected = Expected(reference, LONGEST if tiny else LONGEST_OF_OTHERS, options.expected)
        log = Path(options.log or Path(directory) / "log")
        flags = ["--rebalance-interval", "0", "--dtype", options.dtype, *(tiny_flags(checkpoint) if tiny else [])]
        if options.resident < 1:
            flags += [*resident_flags(checkpoint, options.resident), "--expert-cache-dir", f"{directory}/experts"]
        server = start_server(checkpoint, log, *flags, *options.flag)
        try:
            print(f"seed {options.seed}, {WORKERS} workers, {THREADS} clients\n{HEADER}", flush=True)
            rows = run(server, expected, scenarios, seed=options.seed, tell=True, resident=options.resident)
            code = server.stop()
        except BaseException:
            print(log.read_text()[-4000:], file=sys.stderr)
            raise
        finally:
            kill_family(server)
    return _summary(rows, code)


def _parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0, help="of the victims, the moments and the requests")
    parser.add_argument("--only", action="append", help="name of a scenario; may be given several times")
    parser.add_argument("--model", help="a checkpoint instead of a tiny random one")
    parser.add_argument(
        "--family", default="qwen3_moe", help="of the tiny one, such as qwen3_next (default: qwen3_moe)"
    )
    parser.add_argument("--dtype", default="float32", help="of the model; tokens are compared in float32 alone")
    parser.add_argument("--cycles", type=int, default=20, help=f"of '{LEAKS}', more than {SETTLED_CYCLES}")
    parser.add_argument("--drift", action="store_true", help="only: how soon re-placement follows a drift of traffic")
    parser.add_argument("--resident", type=float, default=1.0, help="share of experts that fit in memory")
    parser.add_argument("--expected", type=Path, help="file of transformers' answers, which is made if it is missing")
    parser.add_argument("--log", help="where the server's output goes, to be kept")
    parser.add_argument(
        "--flag", action="append", default=[], help="a further flag of emoe serve, such as --flag=--x=y"
    )
    return parser.parse_args(arguments)


def _summary(rows: Sequence[Row], code: int) -> int:
    lost = sum(len(row.faults) for row in rows)
    answers = sum(row.answers for row in rows)
    print(f"{answers} answers, {lost} faults; the server ended with {code}")
    return int(bool(lost or code))


if __name__ == "__main__":
    sys.exit(main())
