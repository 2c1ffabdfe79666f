"""`make test-lm-eval`: the harness's `local-completions` against this server, and its `hf` model, on the same files.

The harness is installed into an environment of its own, which also sees the packages of this one (torch and
transformers). Tasks and texts are written to files, and nothing is read from a hub. It fails where a log likelihood
differs by more than 1e-3, for rolling ones per token, where another token is the most likely one, or where a generated
text differs.

    python -m tests.evals.driver [--model MODEL_DIR] [--keep DIR]
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import sysconfig
import tempfile
import venv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from elastic_moe.deploy.launch.builtin import MODEL_DIR
from elastic_moe.deploy.text.tokenizer import Tokenizer
from tests.e2e.conftest import READY_S, kill_family, start
from tests.evals.tasks import TASKS, write_tasks

HOME = Path(__file__).parents[2] / "build" / "lm-eval"
PACKAGES = ("lm_eval==0.4.13", "requests", "aiohttp", "tenacity", "tqdm", "tiktoken", "accelerate", "peft")
MAX_LENGTH = 256
"""Of the harness, shorter than the longest text, so that rolling windows are tried."""
TOLERANCE = 1e-3
SERVED = "served"
Sample = dict[str, Any]
"""A document with its requests and what came of them, as the harness logs it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """One way in which the harness reaches the server."""

    name: str
    arguments: str
    batch_size: int = 1


WAYS = (
    Way(name="token ids", arguments="tokenizer_backend=huggingface,num_concurrent=4"),
    Way(name="batches", arguments="tokenizer_backend=huggingface", batch_size=3),
    Way(name="the server's tokenizer, text", arguments="tokenizer_backend=remote,tokenized_requests=False"),
)


def environment() -> Path:
    """The interpreter of the harness's environment, which is made when it is first needed."""
    python = HOME / "bin" / "python"
    if not python.exists():
        venv.create(HOME, with_pip=True)
        site = next((HOME / "lib").glob("python3*")) / "site-packages"
        # after its own packages, those of this environment
        (site / "outer.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    subprocess.run([python, "-m", "pip", "install", "-q", *PACKAGES], check=True)
    return python


def evaluate(
    python: Path, model: str, arguments: str, tasks: Path, out: Path, batch_size: int = 1
) -> dict[str, list[Sample]]:
    """Run every task. Returns its samples, in the order of the documents."""
    command = [
        *(str(python), "-m", "lm_eval", "--model", model, "--model_args", arguments, "--tasks", ",".join(TASKS)),
        *("--include_path", str(tasks), "--output_path", str(out), "--log_samples"),
        *("--batch_size", str(batch_size)),
    ]
    offline = dict.fromkeys(("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"), "1") | {"HF_HOME": str(out)}
    subprocess.run(command, check=True, env=os.environ | offline, cwd=out, stdout=subprocess.DEVNULL)
    found: dict[str, list[Sample]] = {}
    for task in TASKS:
        (file,) = out.rglob(f"samples_{task}_*.jsonl")
        samples = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        found[task] = sorted(samples, key=lambda sample: sample["doc_id"])
    return found


def differences(ours: Sequence[Sample], theirs: Sequence[Sample], divisors: Sequence[int]) -> tuple[float, list[str]]:
    """The largest difference of a log likelihood, by its document's divisor, and what else differs, in words."""
    worst, faults = 0.0, []
    for own, other, divisor in zip(ours, theirs, divisors, strict=True):
        for mine, his in zip(flat(own["resps"]), flat(other["resps"]), strict=True):
            if isinstance(his, float):
                worst = max(worst, abs(float(mine) - his) / divisor)
            elif mine != his:
                faults.append(f"document {own['doc_id']}: {mine!r} here, {his!r} in transformers")
    if worst > TOLERANCE:
        faults.append(f"log likelihoods differ by up to {worst:.2g}")
    return worst, faults


def flat(value: Any) -> list[Any]:
    """The leaves of nested lists, numbers as floats: samples have them as text."""
    if isinstance(value, list):
        return [leaf for part in value for leaf in flat(part)]
    if isinstance(value, str):
        if value in ("True", "False"):
            return [value == "True"]
        try:
            return [float(value)]
        except ValueError:
            return [value]
    return [value if isinstance(value, bool) else float(value)]


def main(arguments: Sequence[str] | None = None) -> int:
    # so that a server never outlives what asks it
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(MODEL_DIR), help="directory of the checkpoint")
    parser.add_argument("--keep", type=Path, help="directory for everything that is written")
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as temporary:
        return run(given.model, given.keep or Path(temporary))


def run(model: str, out: Path) -> int:
    """Returns 1 where something differs."""
    python, tasks = environment(), out / "tasks"
    texts, tokenizer = write_tasks(tasks), Tokenizer.load(model)
    divisors = {task: [1] * len(texts[task]) for task in TASKS}
    divisors["emoe_rolling"] = [len(tokenizer.encode(text)) for text in texts["emoe_rolling"]]
    # for a server, the harness keeps a token for the answer, and in rolling windows another one for the context
    wanted = f"pretrained={model},dtype=float32,max_length={MAX_LENGTH - 2}"
    reference = evaluate(python, "hf", wanted, tasks, _made(out / "hf"))
    flags = ["--workers", "2", "--dtype", "float32", "--served-model-name", SERVED, "--no-standby"]
    server = start([model, *flags, "--rebalance-interval", "0"], out / "server.log")
    failed = False
    try:
        server.wait("readiness", server.ready, READY_S)
        for number, way in enumerate(WAYS):
            tokens = f"tokenizer={model}," if "huggingface" in way.arguments else ""
            where = f"model={SERVED},base_url={server.url}/v1/completions,max_length={MAX_LENGTH}"
            arguments = f"{where},{tokens}{way.arguments}"
            made = _made(out / f"way{number}")
            found = evaluate(python, "local-completions", arguments, tasks, made, way.batch_size)
            for task in TASKS:
                worst, faults = differences(found[task], reference[task], divisors[task])
                failed |= bool(faults)
                told = f"{way.name}, {task}: {len(found[task])} documents, largest difference {worst:.1e}"
                print(told, *faults, sep="\n  ", flush=True)
    finally:
        kill_family(server)
    return int(failed)


def _made(directory: Path) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    return directory


if __name__ == "__main__":
    sys.exit(main())
