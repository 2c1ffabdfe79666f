"""Structured output: whether every answer is valid, what masks cost a stream, and what hostile schemas do.

    python -m tests.bench.structured [--model DIR] [--url URL] [--schemas 300] [--rounds 3] [--concurrency 8]

Without --url a server is started; --model is a model directory, or by default the built-in model. Prints one line for
each figure: answers by outcome, time between tokens with and without masks, time of a mask by itself (outside of the
server, on the same tokens), and how long the refusal of a hostile schema takes.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import statistics
import sys
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import jsonschema

from elastic_moe.cluster.messages.grammars import Grammar, GrammarKind
from elastic_moe.model.checkpoints.checkpoint import open_checkpoint
from elastic_moe.model.grammars.compiling import compile_grammar
from elastic_moe.model.grammars.sources import GrammarError
from elastic_moe.model.grammars.vocabulary import read_vocabulary
from tests.bench.client import Client
from tests.bench.schemas import Schema, generated, hostile
from tests.bench.servers import MODEL_NAME, Server, serving
from tests.paths import ROOT

BUILTIN = ROOT / "deploy" / "models" / "emoe-mini"
MOST_TOKENS = 400
LONG = {"type": "array", "items": {"type": "string", "maxLength": 40}, "minItems": 1000}
"""Its answers are longer than any that is asked for."""


@dataclass(slots=True)
class Outcome:
    """What came of one schema."""

    kind: str
    detail: str = ""
    seconds: float = 0.0
    token_ids: Sequence[int] = ()


def ask_all(url: str, schemas: Sequence[Schema], *, concurrency: int, most_tokens: int) -> list[Outcome]:
    async def ask() -> list[Outcome]:
        slots = asyncio.Semaphore(concurrency)
        async with httpx.AsyncClient(base_url=url, timeout=120) as client:

            async def one(number: int, schema: Schema) -> Outcome:
                async with slots:
                    return await _ask(client, number, schema, most_tokens)

            return list(await asyncio.gather(*(one(n, schema) for n, schema in enumerate(schemas))))

    return asyncio.run(ask())


async def _ask(client: httpx.AsyncClient, number: int, schema: Schema, most_tokens: int) -> Outcome:
    body: dict[str, Any] = {"prompt": f"Number {number}:", "max_tokens": most_tokens, "seed": number}
    body |= {"temperature": 1.0, "return_token_ids": True}
    if number % 2:
        body["response_format"] = {"type": "json_schema", "json_schema": {"name": "s", "schema": schema}}
    else:
        body["structured_outputs"] = {"json": schema, "disable_any_whitespace": True}
    begin = time.perf_counter()
    response = await client.post("/v1/completions", json=body)
    seconds = time.perf_counter() - begin
    if response.status_code != 200:
        return Outcome(f"status {response.status_code}", response.json()["error"]["message"], seconds)
    choice = response.json()["choices"][0]
    if choice["finish_reason"] != "stop":
        return Outcome("cut off at max_tokens", choice["text"][-60:], seconds, choice["token_ids"])
    try:
        formats = jsonschema.Draft202012Validator.FORMAT_CHECKER
        jsonschema.Draft202012Validator(schema, format_checker=formats).validate(json.loads(choice["text"]))
    except (ValueError, jsonschema.ValidationError) as error:
        return Outcome("INVALID", f"{str(error).splitlines()[0]}: {choice['text'][:200]}", seconds)
    return Outcome("valid", choice["text"], seconds, choice["token_ids"])


def validity(url: str, count: int, concurrency: int) -> list[tuple[Schema, Outcome]]:
    schemas = generated(count)
    outcomes = ask_all(url, schemas, concurrency=concurrency, most_tokens=MOST_TOKENS)
    print(f"{count} generated schemas: {dict(Counter(outcome.kind for outcome in outcomes))}")
    for schema, outcome in zip(schemas, outcomes, strict=True):
        if outcome.kind not in ("valid", "cut off at max_tokens"):
            print(f"  {outcome.kind}: {outcome.detail}: {json.dumps(schema)[:300]}")
    return list(zip(schemas, outcomes, strict=True))


def hostility(url: str) -> None:
    """Each hostile schema alone, and then whether the server still answers."""
    for schema in hostile():
        (outcome,) = ask_all(url, [schema], concurrency=1, most_tokens=32)
        shown = f"{outcome.detail[:100]!r} {json.dumps(schema)[:60]}"
        print(f"  hostile: {outcome.kind} in {outcome.seconds:.2f} s: {shown}")
    (outcome,) = ask_all(url, [{"type": "boolean"}], concurrency=1, most_tokens=32)
    assert outcome.kind == "valid", outcome


def streams(url: str, name: str, model: Path, rounds: int, concurrency: int) -> None:
    """Time between tokens without and with masks, in turns."""
    vocab = open_checkpoint(model).info.vocab_size
    forms: dict[str, dict[str, Any]] = {"without": {}, "with": {"structured_outputs": {"json": LONG}}}
    found: dict[str, list[float]] = {form: [] for form in forms}
    for number in range(rounds):
        for turn, (form, extra) in enumerate(forms.items()):
            # prompts that were never asked before: a prefix cache would serve the second form faster
            client = Client(url, name, vocab=vocab, seed=number * len(forms) + turn, extra=extra)
            client.warm_up()
            measured = client.measure(concurrency)
            found[form].append(measured.itl_ms)
            print(f"  {form} masks: {measured}")
    without, with_masks = (statistics.median(found[form]) for form in forms)
    print(
        f"time between tokens at concurrency {concurrency}: {without:.3f} ms without masks, {with_masks:.3f} ms with,"
        f" {100 * (with_masks / without - 1):+.1f} %"
    )


def mask_times(model: Path, answers: Sequence[tuple[Schema, Outcome]]) -> None:
    """Seconds of each mask of the valid answers, made here one after another."""
    info = open_checkpoint(model).info
    vocabulary = read_vocabulary(str(model), width=info.vocab_size, eos_token_ids=info.eos_token_ids)
    first: list[float] = []
    later: list[float] = []
    for schema, outcome in answers:
        if not outcome.token_ids:
            continue
        try:
            matcher = compile_grammar(Grammar(kind=GrammarKind.JSON_SCHEMA, text=json.dumps(schema)), vocabulary)
        except GrammarError:
            continue
        for number, token in enumerate([None, *outcome.token_ids[:-1]]):
            begin = time.perf_counter()
            if token is not None and matcher.try_consume_tokens([token]) != 1:
                break
            matcher.compute_bitmask()
            (later if number else first).append(time.perf_counter() - begin)
    for what, times in (("first masks", first), ("later masks", later)):
        ordered = sorted(times)
        mean, median = statistics.mean(times), statistics.median(times)
        most = ordered[int(len(ordered) * 0.99)]
        print(f"{len(times)} {what}: mean {1e3 * mean:.3f} ms, median {1e3 * median:.3f}, 99 % {1e3 * most:.3f}")


def main() -> int:
    # so that a server never outlives what asks it
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=BUILTIN)
    parser.add_argument("--url", help="a server that runs already; its model must be --model")
    parser.add_argument("--name", default=MODEL_NAME, help="the model's name at --url")
    parser.add_argument("--schemas", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--concurrency", type=int, default=8)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--log", type=Path, default=Path("bench-out/structured.log"))
    args = parser.parse_args()
    args.log.parent.mkdir(parents=True, exist_ok=True)
    emoe = str(Path(sys.executable).with_name("emoe"))
    command = [emoe, "serve", str(args.model), "--workers", str(args.workers), "--port", "{port}"]
    server = Server(name="elastic-moe", command=[*command, "--served-model-name", MODEL_NAME], ours=True)
    with ExitStack() as stack:
        url = args.url or stack.enter_context(serving(server, args.log)).url
        if args.rounds:
            streams(url, args.name, args.model, args.rounds, args.concurrency)
        answers = validity(url, args.schemas, args.concurrency)
        hostility(url)
    mask_times(args.model, answers)
    return int(any(outcome.kind in ("INVALID", "status 500") for _, outcome in answers))


if __name__ == "__main__":
    sys.exit(main())
