"""Traffic of one kind, then of another: how soon the placement fits again, next to the best there could be."""

from __future__ import annotations

import random
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from elastic_moe.cluster.facts.routing import load_imbalance
from elastic_moe.cluster.placement import Placement
from elastic_moe.optimizer import PlacementProblem, plan
from tests.e2e.conftest import MODEL, READY_S, Server, kill_family, start

WINDOW_S = 20.0
THREADS = 3
PROMPT = 96


def drift(checkpoint: Path, log: Path) -> int:
    """Prints the load imbalance window by window; 0 where it is within 10 % of the optimum two windows later."""
    flags = ["--workers", "2", "--dtype", "float32", "--max-model-len", "512", "--served-model-name", MODEL]
    flags += ["--rebalance-interval", str(WINDOW_S), "--kv-cache-memory-bytes", "50000000"]
    server = start([str(checkpoint), *flags], log)
    try:
        server.wait("readiness", server.ready, READY_S)
        _serve(server, "one kind of traffic", seed=1, windows=4)
        found, best = _serve(server, "another kind", seed=2, windows=3)
        print(f"two windows after the drift: {found:.3f}, the best placement {best:.3f}, {found / best - 1:+.1%}")
        assert server.stop() == 0
    finally:
        kill_family(server)
    return int(found > 1.1 * best)


def _serve(server: Server, what: str, *, seed: int, windows: int) -> tuple[float, float]:
    """Prompts from few tokens of the vocabulary. (imbalance, best possible) of the last window."""
    ending = threading.Event()
    rng = random.Random(seed)
    tokens = [rng.randrange(3, 500) for _ in range(6)]
    threads = [threading.Thread(target=_ask, args=(server, tokens, n, ending), daemon=True) for n in range(THREADS)]
    for thread in threads:
        thread.start()
    figures = (0.0, 0.0)
    for window in range(1, windows + 1):
        time.sleep(WINDOW_S)
        figures = _figures(server)
        print(
            f"{what}, window {window}: load imbalance {figures[0]:.3f}, the best placement {figures[1]:.3f}", flush=True
        )
    for operation in server.get("/admin/operations")[:3]:
        print(f"    {operation['operation_id']}: {operation['reason']}", flush=True)
    ending.set()
    for thread in threads:
        thread.join(30)
    return figures


def _ask(server: Server, tokens: list[int], number: int, ending: threading.Event) -> None:
    rng, client = random.Random(number), server.client()
    while not ending.is_set():
        prompt = [rng.choice(tokens) for _ in range(PROMPT)]
        client.completions.create(model=MODEL, prompt=prompt, max_tokens=4, temperature=0)


def _figures(server: Server) -> tuple[float, float]:
    """Mean over layers of the load imbalance: of the placement in force, and of one planned anew without limits."""
    view: dict[str, Any] = server.get("/admin/placement")
    load = np.array(server.get("/admin/routing")["load"], dtype=np.int64)
    placement = Placement.from_dict({key: view[key] for key in view if key not in ("epoch", "pinned")})
    problem = PlacementProblem(
        loads=np.maximum(load, 0).astype(np.float64) + 1e-9, workers=placement.workers, caution=0
    )
    plans = [plan(replace(problem), planner=name, deadline_s=5.0).placement for name in ("greedy", "load_ilp")]
    best = min(float(load_imbalance(load, found).mean()) for found in plans)
    return float(load_imbalance(load, placement).mean()), best
