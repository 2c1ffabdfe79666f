"""Two processes on one GPU exchange tokens: `python -m tests.bench.gpu_exchange [--out DIR]`.

First checks: the sums are those of one worker, whatever the placement; a process that is killed is noticed, and the
other's GPU goes on. Then times: one MoE layer's exchange, tokens to both workers and partial sums back, with experts
that return what they get. Both workers have as many tokens. Rows: device memory where the GPU waits for the peer's
words, the same where the CPU waits for them, and TCP through the host. Writes gpu-exchange.md.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from elastic_moe.cluster.placement import contiguous
from elastic_moe.model.exchange.dispatch import TransportDispatcher, row_bytes
from elastic_moe.model.exchange.transports import Transport
from elastic_moe.model.experts.store import ExpertStore
from tests.bench.machine import where_and_when
from tests.bench.report import markdown
from tests.model.gpu_pair import Pair, Place, compare, join_ipc, join_tcp, kill_one
from tests.model.groups import workers

HIDDEN, TOP_K, EXPERTS = 2048, 8, 64
TOKENS = (1, 32, 256, 4096)
"""Of each worker."""
ROUNDS = 200
MOST_S = 1.0
"""Seconds of one row's measurement at most."""
ANSWER_S = 120.0

Row = tuple[str, list[float]]
"""Its name, and microseconds for each of TOKENS."""


class Echo:
    """Experts that return what they get."""

    native = False

    def sums(self, layer: int, x_RH: Tensor, index_RK: Tensor, weight_RK: Tensor) -> Tensor:
        return x_RH


def measure(place: Place) -> list[Row]:
    dtype = torch.bfloat16
    tcp = join_tcp(place, 60)
    ipc = join_ipc(place, max(TOKENS) * row_bytes(HIDDEN, TOP_K, dtype), 60)
    rows: list[Row] = []
    for name, transport, host_waits in (
        ("device memory, the GPU waits", ipc, False),
        ("device memory, the CPU waits", ipc, True),
        ("TCP through the host", tcp, False),
    ):
        ipc.host_waits = host_waits
        rows.append((name, [_exchange_us(place, transport, tokens, dtype) for tokens in TOKENS]))
    ipc.close()
    assert ipc.wait_freed(20), "the memory of the exchange is not free"
    return rows


def _exchange_us(place: Place, transport: Transport, tokens: int, dtype: torch.dtype) -> float:
    placement = contiguous(1, EXPERTS, workers(EXPERTS // 2, EXPERTS // 2))
    store: ExpertStore = Echo()  # type: ignore[assignment]
    dispatcher = TransportDispatcher(
        placement, place.rank, store, transport, device=place.torch_device, most_dense=2 * max(TOKENS)
    )
    g = torch.Generator().manual_seed(place.rank)
    x = torch.randn(tokens, HIDDEN, generator=g).to(place.torch_device, dtype)
    index = torch.randint(EXPERTS, (tokens, TOP_K), generator=g).to(place.torch_device)
    weight = torch.rand(tokens, TOP_K, generator=g).to(place.torch_device)

    def rounds(count: int) -> float:
        """Seconds for one."""
        begin = time.perf_counter()
        for _ in range(count):
            dispatcher.begin((tokens, tokens), None)
            out = dispatcher.forward(0, x, index, weight)
        place.synchronize()
        dispatcher.finish()
        took_s = time.perf_counter() - begin
        # the sum of what both workers have returned
        assert torch.equal(out, 2 * x), "the exchange has brought wrong sums"
        return took_s / count

    rounds(1)
    slow_s = rounds(5)
    # both processes must come to the same number
    said = transport.all_to_all([[torch.tensor([slow_s], dtype=torch.float64, device=place.torch_device)]] * 2, [8, 8])
    slowest_s = max(slow_s, float(said[1 - place.rank].clone().view(torch.float64).item()))
    return 1e6 * rounds(max(3, min(ROUNDS, int(MOST_S / slowest_s))))


def check(name: str, function: Callable[[], str]) -> bool:
    """Print what the function says. A failure is printed, and does not end the script."""
    try:
        said, passed = function(), True
    except (AssertionError, RuntimeError, TimeoutError) as error:
        said, passed = f"FAILED: {error}", False
    print(f"{name}: {said}", flush=True)
    return passed


def sums(device: str) -> str:
    with Pair(device, compare) as pair:
        pair.swap_doors()
        steps = [pair.answer(rank, ANSWER_S) for rank in range(2)]
    return f"as with one worker, in {steps[0]} steps, bit by bit as with TCP"


def lost(device: str, *, timeout_s: float, told: bool) -> str:
    survived, took_s = kill_one(device, timeout_s=timeout_s, told=told)
    assert survived.freed, "the memory of the exchange is not free"
    assert survived.works, "the GPU computes no more"
    freed = f"{survived.released_bytes / 1e6:.0f} MB more of the GPU are free"
    return f"noticed after {took_s:.2f} s ({survived.reason}); the GPU goes on, and {freed}"


def times(device: str, found: list[list[Row]]) -> str:
    with Pair(device, measure) as pair:
        pair.swap_doors()
        found += [pair.answer(rank, ANSWER_S) for rank in range(2)]
    return "measured"


def table(ranks: Sequence[Sequence[Row]]) -> str:
    """The slower rank's times."""
    head = ("one exchange, us", *(f"{tokens} tokens" for tokens in TOKENS))
    rows = []
    for same in zip(*ranks, strict=True):
        slower = [max(pair) for pair in zip(*(figures for _, figures in same), strict=True)]
        rows.append([same[0][0], *(f"{figure:.0f}" for figure in slower)])
    return markdown(head, rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="cpu tries the script, its figures mean nothing")
    parser.add_argument("--out", type=Path, default=Path("bench-out"))
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        print("this benchmark needs a CUDA GPU and a torch built for it; there is none here", file=sys.stderr)
        return 2
    args.out.mkdir(parents=True, exist_ok=True)
    found: list[list[Row]] = []
    passed = [check("sums", lambda: sums(args.device)), check("times", lambda: times(args.device, found))]
    if found:
        about = where_and_when() | {"device": torch.cuda.get_device_name() if args.device == "cuda" else "cpu"}
        text = "; ".join(f"{name} {value}" for name, value in about.items()) + "\n\n" + table(found)
        (args.out / "gpu-exchange.md").write_text(text)
        print(text, flush=True)
    passed += [
        check("killed, nobody tells", lambda: lost(args.device, timeout_s=5.0, told=False)),
        check("killed, and told", lambda: lost(args.device, timeout_s=60.0, told=True)),
    ]
    return 0 if all(passed) else 1


if __name__ == "__main__":
    sys.exit(main())
