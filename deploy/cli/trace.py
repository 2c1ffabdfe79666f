"""The verb `emoe trace`: records routing traces of texts, and lists the traces of the built-in model."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from elastic_moe.cluster.errors import ConfigError, why
from elastic_moe.cluster.lines import counted, json_fault
from elastic_moe.cluster.setting import MILLION, check_file, number_flag, path_flag
from elastic_moe.deploy.launch.builtin import MODEL_DIR, trace_names, trace_path
from elastic_moe.model.checkpoints.raw import read_configuration

if TYPE_CHECKING:
    from elastic_moe.deploy.text.tokenizer import Tokenizer


def add_parser(subparsers: argparse._SubParsersAction[Any]) -> None:
    """Add the verb; the parser's `run` takes the parsed arguments and returns the exit code."""
    what = "record which experts a text's tokens choose"
    trace = subparsers.add_parser("trace", help=what, description=what.capitalize() + ".", allow_abbrev=False)
    verbs = trace.add_subparsers(dest="trace_verb", metavar="record|list", required=True, parser_class=type(trace))
    record = verbs.add_parser(
        "record",
        help="run a model over text, on this machine's CPU",
        description="Run a model over text, on this machine's CPU and without a server, and write its routing trace.",
        allow_abbrev=False,
    )
    record.add_argument(
        "text",
        nargs="+",
        type=path_flag,
        metavar="FILE",
        help='a *.jsonl file has one request per line, an object with a "prompt"; another file is cut into requests',
    )
    record.add_argument(
        "--model",
        type=path_flag,
        default=MODEL_DIR,
        metavar="MODEL_DIR",
        help="directory of the model (the built-in model)",
    )
    record.add_argument("--out", type=path_flag, required=True, metavar="TRACE.npz", help="file for the trace")
    record.add_argument(
        "--request-tokens",
        type=number_flag(int, 1, MILLION),
        default=256,
        metavar="N",
        help="tokens of a request that is cut from a text (256)",
    )
    record.add_argument(
        "--max-tokens", type=number_flag(int, 1, 10**12), metavar="N", help="largest number of tokens to record (all)"
    )
    record.set_defaults(run=run_record)
    listing = verbs.add_parser("list", help="list the built-in model's traces", allow_abbrev=False)
    listing.set_defaults(run=run_list)


def run_list(args: argparse.Namespace) -> int:
    """Print the names that every verb takes in place of a trace file, and their files."""
    for name in trace_names():
        print(f"builtin:{name}\t{trace_path(f'builtin:{name}')}")
    return 0


def run_record(args: argparse.Namespace) -> int:
    """Record a trace, and write it."""
    # before the imports, which take ten seconds
    check_file(args.out)
    texts = [(path, _text(path)) for path in args.text]
    read_configuration(args.model)
    from tqdm import tqdm

    from elastic_moe.deploy.text.tokenizer import Tokenizer
    from elastic_moe.model.worker.tracing import record_trace
    from elastic_moe.optimizer.study.traces import save_trace

    tokenizer = Tokenizer.load(str(args.model))
    requests = [ids for path, text in texts for ids in _requests(path, text, tokenizer, args.request_tokens)]
    if not requests:
        raise ConfigError(f"{', '.join(map(str, args.text))}: expected some text, got none")
    if args.max_tokens is not None:
        requests = list(_first(requests, args.max_tokens))
    with tqdm(total=sum(map(len, requests)), unit="tok", disable=None) as bar:
        trace = record_trace(args.model, requests, progress=bar.update)
    try:
        with args.out.open("wb") as file:
            save_trace(file, trace)
    except OSError as error:
        raise ConfigError(f"{args.out}: {error.strerror}") from None
    print(f"{args.out}: {counted(trace.num_tokens, 'token')} of {counted(len(trace.request_lengths), 'request')}")
    return 0


def _first(requests: list[list[int]], tokens: int) -> Iterator[list[int]]:
    """The first requests, up to `tokens` tokens; the last one is cut."""
    for ids in requests:
        if tokens <= 0:
            return
        yield ids[:tokens]
        tokens -= len(ids)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: {why(error)}") from None


def _requests(path: Path, text: str, tokenizer: Tokenizer, size: int) -> Iterator[list[int]]:
    if path.suffix == ".jsonl":
        for number, line in enumerate(text.splitlines(), 1):
            if line.strip():
                yield tokenizer.encode(_prompt(f"{path}:{number}", line))
        return
    ids = tokenizer.encode(text)
    for first in range(0, len(ids), size):
        yield ids[first : first + size]


def _prompt(where: str, line: str) -> str:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f'{where}: expected JSON, an object with a text "prompt": {json_fault(error)}') from None
    prompt = value.get("prompt") if isinstance(value, dict) else None
    if not isinstance(prompt, str) or not prompt:
        raise ConfigError(f'{where}: expected an object with a text "prompt"')
    return prompt
