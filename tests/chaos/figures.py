"""Changes without a fault, measured: what clients feel of them, against the moments before."""

from __future__ import annotations

import time

from tests.chaos.bench import Bench, pause

USUAL_S = 5.0
"""What is usual is seen for so long before a change."""


def move_a_quarter(bench: Bench) -> dict[str, str]:
    """A re-placement that moves a quarter of all experts."""
    pause(USUAL_S)
    begin = time.monotonic()
    end = bench.finish(bench.move_a_quarter())
    assert end["phase"] == "completed", end
    return _compared(bench, begin, time.monotonic())


def scale_up_and_down(bench: Bench) -> dict[str, str]:
    pause(USUAL_S)
    before, begin = bench.workers, time.monotonic()
    for workers in (before + 2, before):
        end = bench.finish(bench.scale(workers))
        assert end["phase"] == "completed", end
    assert end["safe_to_terminate"], end
    assert len(end["retiring"]) == 2, end
    return _compared(bench, begin, time.monotonic())


def _compared(bench: Bench, begin: float, end: float) -> dict[str, str]:
    load = bench.load
    usual_s, rate = load.usual_gap_s(begin - USUAL_S, begin), load.tokens_per_s(begin - USUAL_S, begin)
    (longest_at, longest_s), during = load.longest_gap(begin, end), load.tokens_per_s(begin, end)
    calm_s = load.longest_gap_s(begin - USUAL_S, begin)
    return {
        "took": f"{end - begin:.1f} s",
        "usual gap": f"{1e3 * usual_s:.0f} ms (longest {1e3 * calm_s:.0f})",
        "longest gap": f"{1e3 * longest_s:.0f} ms, {longest_s / max(usual_s, 1e-9):.1f} x usual,"
        f" {longest_at - begin:.1f} s after the beginning",
        "throughput": f"{during:.0f} of {rate:.0f} tokens/s, {during / max(rate, 1e-9):.0%}",
    }
