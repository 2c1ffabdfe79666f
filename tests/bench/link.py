"""Measures decoding over two hosts against one host with the same cores: `python -m tests.bench.link --model mid`.

Hosts are those of the laboratory (tests/hosts/lab.py), so it needs root. A head without cores serves HTTP and runs the
engine; two workers of a core each run on one further host, or on two of them whose links are limited to --mbit. There,
the placement is what each of --planners makes of the routing of the load before. Requests are those of
tests.bench.serving. Prints a table; ratios are to one host, and the machine's load stands beside each row.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from elastic_moe.model.checkpoints.checkpoint import open_checkpoint
from tests.bench.client import OUTPUT_TOKENS, PER_SLOT, Client
from tests.bench.machine import where_and_when
from tests.bench.serving import mid_checkpoint
from tests.e2e.conftest import MODEL, Server
from tests.hosts.cluster import HostCluster
from tests.hosts.lab import Lab

READY_S = 600.0
CACHE_BYTES = 600_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One placement on one set of hosts. Bytes and milliseconds are per output token, prompts included."""

    name: str
    tokens_per_s: float
    itl_ms: float
    link_bytes: float
    """Over both directions of one worker's link; 0 where all workers share a host."""
    load: float
    """The machine's load average over the last minute."""


@contextmanager
def served(cluster: HostCluster, model: Path, args: argparse.Namespace, *, hosts: int) -> Iterator[Server]:
    """Two workers on one host, or on two with limited links."""
    cluster.start_head()
    if hosts == 1:
        cluster.join(1, cpus=2)
    else:
        for number in (1, 2):
            cluster.join(number)
            cluster.lab.limit(number, args.mbit)
    flags = ["--workers", "2", "--dtype", args.dtype, "--rebalance-interval", "0"]
    flags += ["--kv-cache-memory-bytes", str(CACHE_BYTES), *args.serve_args.split()]
    server = cluster.serve(model, *flags, log=f"serve-{hosts}")
    try:
        server.wait("readiness", server.ready, READY_S)
        yield server
    finally:
        for number in (1, 2):
            cluster.lab.limit(number, None)
        cluster.down()


def carried(cluster: HostCluster) -> int:
    """Bytes that host 2 has sent and received so far."""
    statistics_ = Path("/sys/class/net") / cluster.lab.hosts[2].port / "statistics"
    return sum(int((statistics_ / name).read_text()) for name in ("rx_bytes", "tx_bytes"))


def measure(cluster: HostCluster, client: Client, name: str, args: argparse.Namespace) -> Row:
    """The median of `--repeat` measurements."""
    rows = []
    for _ in range(args.repeat):
        before = carried(cluster)
        measured = client.measure(args.streams)
        rows.append((measured.output_tokens_per_s, measured.itl_ms, carried(cluster) - before))
    tokens = args.streams * PER_SLOT * OUTPUT_TOKENS
    row = Row(
        name=name,
        tokens_per_s=statistics.median(row[0] for row in rows),
        itl_ms=statistics.median(row[1] for row in rows),
        link_bytes=statistics.median(row[2] for row in rows) / tokens,
        load=os.getloadavg()[0],
    )
    print(row, flush=True)
    return row


def rows_of(cluster: HostCluster, model: Path, args: argparse.Namespace, *, hosts: int, seed: int) -> list[Row]:
    with served(cluster, model, args, hosts=hosts) as server:
        client = Client(server.url, MODEL, vocab=open_checkpoint(model).info.vocab_size, seed=seed)
        client.warm_up()
        if hosts == 1:
            return [measure(cluster, client, "one host", args)]
        rates = {worker["id"]: worker["link_gbps"] for worker in server.get("/admin/workers")}
        print(f"Gb/s between workers: {rates}", flush=True)
        rows = []
        for planner in args.planners.split(","):
            # the counts that the planner sees
            client.measure(args.streams, per_slot=1)
            print(f"{planner}: {cluster.rebalance(server, planner, 300)}", flush=True)
            rows.append(measure(cluster, client, f"two hosts, {planner}", args))
        return rows


def table(rows: Sequence[Row]) -> str:
    """Markdown: medians of rows with one name, beside the ratio to one host."""
    names = list(dict.fromkeys(row.name for row in rows))
    medians = {n: statistics.median(row.tokens_per_s for row in rows if row.name == n) for n in names}
    head = ("", "output tok/s", "of one host", "median ITL ms", "kB on a link per token", "load")
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for name in names:
        found = [row for row in rows if row.name == name]
        itl, nbytes = (statistics.median(getattr(row, f) for row in found) for f in ("itl_ms", "link_bytes"))
        loads = " ".join(f"{row.load:.1f}" for row in found)
        ratio = medians[name] / medians["one host"]
        lines.append(f"| {name} | {medians[name]:.1f} | {ratio:.2f} | {itl:.1f} | {nbytes / 1e3:.1f} | {loads} |")
    return "\n".join(lines)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="checkpoint; 'mid' is made if not given")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--mbit", type=float, default=1000.0, help="Mbit/s of each host's link, each way")
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--planners", default="contiguous,local_search", help="placements to measure on two hosts")
    parser.add_argument("--serve-args", default="", help="further arguments for emoe serve, in one string")
    parser.add_argument("--repeat", type=int, default=1, help="measurements of each placement; medians are shown")
    parser.add_argument("--rounds", type=int, default=1, help="rounds over one host and two, there and back again")
    parser.add_argument("--out", type=Path, default=Path("bench-out"))
    return parser.parse_args()


def main() -> None:
    args = arguments()
    args.out = args.out.resolve()
    args.out.mkdir(parents=True, exist_ok=True)
    model = (args.model or mid_checkpoint(args.out)).resolve()
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="link-") as directory:
        lab = Lab(Path(directory) / "lab", shared=[args.out])
        lab.up(3)
        try:
            for number in range(args.rounds):
                for hosts in (1, 2)[:: -1 if number % 2 else 1]:
                    cluster = HostCluster(lab, args.out)
                    rows += rows_of(cluster, model, args, hosts=hosts, seed=number)
        finally:
            lab.down()
    told = {"about": where_and_when(), "arguments": vars(args), "rows": [asdict(row) for row in rows]}
    (args.out / "link.json").write_text(json.dumps(told, indent=1, default=str))
    print("\n" + table(rows))


if __name__ == "__main__":
    main()
