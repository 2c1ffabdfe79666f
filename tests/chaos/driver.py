"""Runs scenarios one after the other on one server under load, and says what became of every request.

python -m tests.chaos.driver --seed 0 [--only "kill host"]
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.chaos.bench import Bench
from tests.chaos.load import Expected, Load
from tests.chaos.scenarios import CALM, FAULTS, Scenario
from tests.e2e.conftest import MODEL, READY_S, Server, kill_family, load_reference, start
from tests.model.families import tiny_checkpoint

WORKERS = 2
THREADS = 4
STEP_TIMEOUT_S = 5


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
    refused: int
    answers: int
    faults: tuple[str, ...]


def start_server(checkpoint: Path, log: Path) -> Server:
    flags = ["--workers", str(WORKERS), "--dtype", "float32", "--max-model-len", "512", "--served-model-name", MODEL]
    # tiny experts: without a limit they would be copied before anything can be struck
    flags += ["--migration-bandwidth", "0.5"]
    flags += ["--rebalance-interval", "0", "--step-timeout", str(STEP_TIMEOUT_S), "--kv-cache-memory-bytes", "50000000"]
    server = start([str(checkpoint), *flags], log)
    try:
        server.wait("readiness", server.ready, READY_S)
    except BaseException:
        kill_family(server)
        raise
    return server


def run(
    server: Server, expected: Expected, scenarios: Mapping[str, Scenario], *, seed: int, tell: bool = False
) -> list[Row]:
    """Each scenario under a load of its own, from a whole cluster to a whole cluster."""
    rows = []
    for name, scenario in scenarios.items():
        rows.append(_run_one(server, expected, name, scenario, seed))
        if tell:
            print(line(rows[-1]), flush=True)
            for fault in rows[-1].faults[:5]:
                print(f"    {fault}", flush=True)
    return rows


def _run_one(server: Server, expected: Expected, name: str, scenario: Scenario, seed: int) -> Row:
    troubles: list[str] = []
    with Load(server, expected, threads=THREADS, seed=seed) as load:
        bench = Bench(server=server, load=load, rng=random.Random(f"{seed}/{name}"), workers=WORKERS)
        load.wait_for_tokens(100)
        begin = end = time.monotonic()
        try:
            scenario(bench)
            bench.settle()
        except AssertionError as error:
            troubles.append(f"not whole again: {str(error)[:500]}")
        end = time.monotonic()
    return Row(
        name=name,
        outage_s=load.outage_s(begin, end),
        gap_s=load.longest_gap_s(begin, end),
        whole_s=end - begin,
        refused=load.tally.refused,
        answers=load.tally.answers,
        faults=(*load.tally.faults, *troubles),
    )


HEADER = f"{'scenario':36} {'outage':>8} {'gap':>8} {'whole':>8} {'refused':>8} {'answers':>8} {'faults':>7}"


def line(row: Row) -> str:
    times = f"{row.outage_s:6.2f} s {row.gap_s:6.2f} s {row.whole_s:6.2f} s"
    return f"{row.name:36} {times} {row.refused:8d} {row.answers:8d} {len(row.faults):7d}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0, help="of the victims, the moments and the requests")
    parser.add_argument("--only", action="append", help="name of a scenario; may be given several times")
    options = parser.parse_args(arguments)
    scenarios = {**CALM, **FAULTS}
    scenarios = {name: scenarios[name] for name in options.only or scenarios}
    with tempfile.TemporaryDirectory(prefix="emoe-chaos-") as directory:
        checkpoint = tiny_checkpoint("qwen3_moe", Path(directory))
        expected = Expected(load_reference(checkpoint))
        log = Path(directory) / "log"
        server = start_server(checkpoint, log)
        try:
            print(f"seed {options.seed}, {WORKERS} workers, {THREADS} clients\n{HEADER}", flush=True)
            rows = run(server, expected, scenarios, seed=options.seed, tell=True)
            code = server.stop()
        except BaseException:
            print(log.read_text()[-4000:], file=sys.stderr)
            raise
        finally:
            kill_family(server)
    lost = sum(len(row.faults) for row in rows)
    refused_in_calm = sum(row.refused for row in rows if row.name in CALM)
    answers = sum(row.answers for row in rows)
    print(f"{answers} answers, {lost} faults, {refused_in_calm} refused without a fault; the server ended with {code}")
    return int(bool(lost or refused_in_calm or code))


if __name__ == "__main__":
    sys.exit(main())
