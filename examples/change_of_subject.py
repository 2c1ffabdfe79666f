"""Watch a re-placement follow the traffic: Bible verses first, Python afterwards.

    emoe serve --workers 4 --rebalance-interval 0        # in another terminal
    python -m examples.change_of_subject [--figure docs/replacement.svg]

    emoe serve --workers 4 --rebalance-interval 300      # the server notices the change itself
    python -m examples.change_of_subject --by-itself --rounds 7

Sends prompts to a server of the built-in model, which goes on in their style, and prints how uneven the load of its
workers is (busiest over mean, the layers' mean) before and after each POST /admin/rebalance. Each figure is measured on
tokens served under the placement that was in force then. With `--by-itself`, only the first subject's re-placements are
asked for; then the change of subject is left to the server, and what it did is printed. `--figure` draws every worker's
load, layer by layer, at each stage; README shows such a figure.
"""

from __future__ import annotations

import argparse
import json
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Any

import numpy as np

from elastic_moe.cluster.errors import ConfigError
from elastic_moe.cluster.facts.routing import load_imbalance, load_per_worker
from elastic_moe.cluster.placement import EMPTY, Placement
from elastic_moe.cluster.setting import number_flag
from elastic_moe.deploy.calls.requests import URL, server_url
from elastic_moe.optimizer.study.figures import pyplot

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


FloatArray = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """What one batch of requests of a subject showed."""

    subject: str
    placement: Placement
    loads: FloatArray
    """[L, W]: tokens of each worker over the layer's mean."""
    imbalance: float
    """The busiest worker's load over the mean, averaged over layers."""


class Server:
    """The calls of the server's API that this example needs."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._model = self._call("/v1/models")["data"][0]["id"]

    def _call(self, path: str, body: dict[str, Any] | None = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self._url + path, data, {"content-type": "application/json"})
        with urllib.request.urlopen(request, timeout=300) as response:
            return json.load(response)

    def serve(self, subject: str, requests: int, tokens: int) -> Stage:
        """Serve a subject, and measure on what it was routed to."""
        placement = Placement.from_dict(self._call("/admin/placement"))
        before = self._load()

        def ask(number: int) -> None:
            prompt = PROMPTS[subject][number % len(PROMPTS[subject])]
            options = {"max_tokens": tokens, "temperature": 0.8, "seed": number, "ignore_eos": True}
            self._call("/v1/completions", {"model": self._model, "prompt": prompt, **options})

        with ThreadPoolExecutor(16) as pool:
            list(pool.map(ask, range(requests)))
        time.sleep(1.5)  # counts may be a second old
        load = self._load()
        if (load >= before).all():
            load -= before
        # else the server has noticed a change of subject, and begun to count anew
        loads = load_per_worker(load, placement)
        return Stage(
            subject=subject,
            placement=placement,
            loads=loads / loads.mean(axis=1, keepdims=True),
            imbalance=float(load_imbalance(load, placement).mean()),
        )

    def _load(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        """[L, E] of the last five minutes: everything, as long as the whole takes less."""
        return np.array(self._call("/admin/routing")["load"])

    def done(self) -> dict[str, str]:
        """The re-placements that have completed, with their reasons."""
        operations = self._call("/admin/operations")
        completed = [one for one in operations if one["kind"] == "rebalance" and one["phase"] == "completed"]
        return {one["operation_id"]: one["reason"] for one in completed}

    def rebalance(self) -> str:
        """Ask for a rebalance and report how it ended; /admin/operations has the details. A look of the server's own
        that is under way goes first."""
        while True:
            try:
                operation = self._call("/admin/rebalance", {"planner": "auto"})
                break
            except urllib.error.HTTPError as error:
                if error.code != HTTPStatus.CONFLICT:
                    raise
                time.sleep(0.2)
        while operation["phase"] not in ("completed", "failed"):
            time.sleep(0.2)
            operation = self._call(f"/admin/operations/{operation['operation_id']}")
        return str(operation["phase"])


def server_flag(text: str) -> str:
    """The `type` of a flag that takes a server's address."""
    try:
        return server_url(text)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error).removeprefix("--url: ")) from None


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", type=server_flag, default=URL, help=f"address of the server ({URL})")
    parser.add_argument(
        "--requests", type=number_flag(int, 1, 2048), default=32, metavar="N", help="requests of each figure (32)"
    )
    parser.add_argument(
        "--tokens", type=number_flag(int, 1, 1000), default=64, metavar="N", help="tokens of each answer (64)"
    )
    parser.add_argument(
        "--rounds", type=number_flag(int, 0, 1000), default=2, metavar="N", help="re-placements per subject (2)"
    )
    parser.add_argument("--by-itself", action="store_true", help="leave the change of subject to the server")
    parser.add_argument("--figure", type=Path, help="draw the stages into this file (.svg or .png; needs matplotlib)")
    args = parser.parse_args()
    if args.figure is not None:
        # before the run, which takes minutes
        try:
            pyplot()
        except ConfigError as error:
            parser.error(str(error))
    try:
        server = Server(args.url)
    except urllib.error.URLError as error:
        parser.error(f"no server answers at {args.url} ({error.reason}); `emoe serve --workers 4` starts one")
    stages: list[Stage] = []
    known: dict[str, str] = {}
    for subject in PROMPTS:
        asks = not args.by_itself or subject == next(iter(PROMPTS))
        for number in range(args.rounds + 1):
            if number and asks:
                print(f"        re-placement {server.rebalance()}", flush=True)
            elif not asks:
                now = server.done()
                for operation in now.keys() - known.keys():
                    print(f"        {operation}: {now[operation]}", flush=True)
                known = now
            begin = time.monotonic()
            stages.append(server.serve(subject, args.requests, args.tokens))
            took_s = f"  {time.monotonic() - begin:4.0f} s" if args.by_itself else ""
            print(f"{subject:7} {stages[-1].imbalance:.2f}{took_s}", flush=True)
        if asks and args.by_itself:
            known = server.done()
    if args.figure is not None:
        draw(stages, args.figure)


def draw(stages: list[Stage], path: Path) -> None:
    """A panel for each stage: workers across, layers down, load over the layer's mean as the colour."""
    plt = pyplot()

    plt.rcParams.update({"font.size": 9, "svg.fonttype": "none", "svg.hashsalt": "elastic-moe"})
    figure, axes = plt.subplots(1, len(stages), figsize=(1.55 * len(stages) + 0.9, 2.9), sharey=True, squeeze=False)
    for number, (axis, stage) in enumerate(zip(axes[0], stages, strict=True)):
        image = axis.imshow(stage.loads, cmap="RdBu_r", vmin=0.4, vmax=1.6, aspect="auto", interpolation="nearest")
        axis.set_title(f"{stage.subject}\nbusiest {stage.imbalance:.2f} x mean", fontsize=9)
        axis.set_xticks(range(stage.loads.shape[1]), [f"w{worker}" for worker in range(stage.loads.shape[1])])
        axis.tick_params(length=0)
        before = stages[number - 1] if number else None
        moved = moved_experts(before.placement, stage.placement) if before else 0
        axis.set_xlabel(f"{moved} experts\nmoved in" if moved else "")
    axes[0][0].set_ylabel("MoE layer")
    figure.tight_layout(rect=(0, 0, 0.93, 1))
    bar = figure.colorbar(image, cax=figure.add_axes((0.945, 0.3, 0.01, 0.45)), ticks=[0.4, 1.0, 1.6])
    bar.set_label("load over mean")
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def moved_experts(before: Placement, after: Placement) -> int:
    """How many experts of all layers came to a worker that did not hold them."""
    return sum(
        len(set(after.experts_of(worker.id, layer)) - set(before.experts_of(worker.id, layer)) - {EMPTY})
        for worker in after.workers
        for layer in range(after.num_layers)
    )


if __name__ == "__main__":
    main()
