"""Watch a re-placement follow the traffic: Bible verses first, Python afterwards.

    emoe serve --workers 4 --rebalance-interval 0        # in another terminal
    python -m examples.change_of_subject

Sends prompts to a server of the built-in model, which goes on in their style, and prints how uneven the load of its
workers is (busiest over mean, the layers' mean) before and after each POST /admin/rebalance. Each figure is measured on
tokens served under the placement that was in force then.
"""

from __future__ import annotations

import argparse
import json
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from cluster.placement import Placement
from cluster.routing import load_imbalance

PROMPTS = {
    "Bible": (
        "And it came to pass",
        "Psalms 7\n\n1 O LORD my God",
        "And the king said unto",
        "Exodus 3\n\n1 Now Moses",
    ),
    "Python": (
        "import os\nimport sys\n\n",
        "    def __init__(self,",
        "class Error(Exception):\n",
        "    if not isinstance(",
    ),
}


class Server:
    """The calls that are needed of it."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._model = self._call("/v1/models")["data"][0]["id"]

    def _call(self, path: str, body: dict[str, Any] | None = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self._url + path, data, {"content-type": "application/json"})
        with urllib.request.urlopen(request, timeout=300) as response:
            return json.load(response)

    def imbalance(self, subject: str, requests: int, tokens: int) -> float:
        """Serve a subject, and measure on what it was routed to."""
        placement = Placement.from_dict(self._call("/admin/placement"))
        before = self._load()

        def ask(number: int) -> None:
            prompt = PROMPTS[subject][number % len(PROMPTS[subject])]
            options = {"max_tokens": tokens, "temperature": 0.8, "seed": number, "ignore_eos": True}
            self._call("/v1/completions", {"model": self._model, "prompt": prompt, **options})

        with ThreadPoolExecutor(16) as pool:
            list(pool.map(ask, range(requests)))
        time.sleep(3)  # workers report their counts once a second
        return float(load_imbalance(self._load() - before, placement).mean())

    def _load(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        """[L, E] of the last five minutes: everything, as long as the whole takes less."""
        return np.array(self._call("/admin/routing")["load"])

    def rebalance(self) -> str:
        """Have it done, and tell how it ended; /admin/operations says more."""
        operation = self._call("/admin/rebalance", {"planner": "auto"})
        while operation["phase"] not in ("completed", "failed"):
            time.sleep(0.2)
            operation = self._call(f"/admin/operations/{operation['operation_id']}")
        return str(operation["phase"])


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=2, help="re-placements per subject (2)")
    args = parser.parse_args()
    server = Server(args.url)
    for subject in PROMPTS:
        print(f"{subject:7} {server.imbalance(subject, args.requests, args.tokens):.2f}", flush=True)
        for _ in range(args.rounds):
            print(f"        re-placement {server.rebalance()}", flush=True)
            print(f"{subject:7} {server.imbalance(subject, args.requests, args.tokens):.2f}", flush=True)


if __name__ == "__main__":
    main()
