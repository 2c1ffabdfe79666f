"""`emoe top`: what is read of a server, what is drawn of it, and what is said where there is none."""

from __future__ import annotations

import asyncio
import io
import json
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from elastic_moe.cluster.errors import ConfigError, UserError
from elastic_moe.cluster.messages.epochs import Epoch
from elastic_moe.cluster.messages.views import Operation, OperationKind, Phase, Readiness, ScaleView, WorkerState
from elastic_moe.cluster.placement import EMPTY, Placement, Worker, WorkerId, contiguous
from elastic_moe.deploy.cli.main import main
from elastic_moe.deploy.cli.top import NoAnswer, ask, draw
from elastic_moe.deploy.cli.top_look import (  # fmt: skip
    METRICS,
    OPERATIONS,
    PATHS,
    READY,
    Look,
    NotAServer,
    SeenPath,
    SeenWorker,
    asked_path,
    mean_s,
    rate,
    read_look,
    relative_load,
)
from elastic_moe.deploy.cli.top_view import BARS, View, count, heat, printable, render, seconds, size, trend
from tests.deploy.conftest import client_of
from tests.deploy.fakes import FakeBackend

Answers = dict[str, bytes | None]


@pytest.fixture(scope="module")
def answers(model_dir: Path) -> Answers:
    """What the API says over a fake cluster."""

    async def work() -> Answers:
        async with client_of(FakeBackend(), model_dir) as client:
            return {path: (await client.get(path)).content for path in PATHS}

    return asyncio.run(work())


def worker(number: int, **fields: Any) -> SeenWorker:
    given: dict[str, Any] = {
        "id": WorkerId(f"w{number}"),
        "state": WorkerState.SERVING,
        "node": "n0",
        "device": "cpu",
        "running_requests": 3,
        "kv_usage": 0.25,
        "fit": (SeenPath(part="experts", path="native"), SeenPath(part="norms", path="torch")),
    }
    return SeenWorker(**(given | fields))


def look(at_s: float = 0.0, *, layers: int = 4, workers: Sequence[SeenWorker] = (), **fields: Any) -> Look:
    """Each layer has two experts per worker; the first worker's have three times the load of the others'."""
    workers = tuple(workers or (worker(0), worker(1)))
    members = [Worker(id=seen.id, node="n0", slots=2) for seen in workers]
    load = np.ones((layers, 2 * len(workers)))
    load[:, :2] = 3.0
    given: dict[str, Any] = {
        "ready": Readiness(ready=True, reason="serving"),
        "workers": workers,
        "scale": ScaleView(
            serving=2, target=2, min_workers=1, max_workers=8, next_worker=WorkerId("w2"), autoscaler=None
        ),
        "placement": contiguous(layers, 2 * len(workers), members),
        "epoch": 7,
        "load": load,
        "model_name": "tiny",
    }
    return Look(at_s=at_s, **(given | fields))


def drawn(view: View, *, width: int = 120, height: int = 40, colour: bool = False) -> str:
    console = Console(
        file=io.StringIO(), width=width, force_terminal=colour, color_system="truecolor" if colour else None
    )
    console.print(render(view, width=width, height=height))
    text: str = console.file.getvalue()  # type: ignore[attr-defined]
    return text


# --- What is read -----------------------------------------------------------------------------------------------


def test_a_server_is_read(answers: Answers) -> None:
    seen = read_look(answers, at_s=3.0)
    assert seen.ready.ready
    assert seen.model_name == "tiny-moe"
    assert seen.epoch == 1
    assert [w.id for w in seen.workers] == ["w0"]
    assert seen.workers[0].fit is not None
    assert {(row.part, row.path) for row in seen.workers[0].fit} == {("experts", "native"), ("norms", "transformers")}
    assert seen.scale is not None
    assert seen.scale.autoscaler == "demand 60% of capacity"
    assert [o.kind for o in seen.operations] == [OperationKind.REBALANCE]
    assert seen.metrics["vllm:num_requests_running"] == 2
    assert seen.metrics["emoe:workers"] == 1
    assert relative_load(seen) == pytest.approx(np.ones((2, 2)))
    text = drawn(View(url="http://api", now=seen), width=160)
    assert "tiny-moe at http://api  serves  epoch 1" in text
    assert "demand 60% of capacity" in text


def test_groups_are_counted_and_shares_averaged(answers: Answers) -> None:
    rows = [
        f'{name}{{engine="{engine}",model_name="m"}} {value}'
        for name in ("emoe:balancedness", "vllm:num_requests_running")
        for engine, value in enumerate((0.5, 1.0))
    ]
    answers = {**answers, METRICS: "\n".join(rows).encode()}
    seen = read_look(answers, 0.0)
    assert (seen.groups, seen.engine) == (2, None)
    assert seen.metrics == {"emoe:balancedness": 0.75, "vllm:num_requests_running": 1.5}
    assert "figures of 2 groups, workers and operations of group 0" in drawn(View(url="u", now=seen), width=160)
    one = read_look(answers, 0.0, engine=1)
    assert one.metrics == {"emoe:balancedness": 1.0, "vllm:num_requests_running": 1.0}
    assert "group 1 of 2" in drawn(View(url="u", now=one), width=160)


def test_one_group_is_asked_for(canned: Canned, answers: Answers, capsys: pytest.CaptureFixture[str]) -> None:
    canned.answers = {asked_path(path, 1): body for path, body in answers.items()}
    assert sum(path.endswith("?engine=1") for path in canned.answers) == 5
    top = ["top", "--url", canned.url, "--once", "--interval", "0.1", "--engine"]
    assert main([*top, "1"]) == 0
    assert "group 1 of 1" in capsys.readouterr().out
    canned.status = 400
    canned.answers = {"/admin/workers?engine=7": b'{"error": {"message": "engine: expected 0 to 1, got 7"}}'}
    with pytest.raises(ConfigError, match=r"--engine: .*: engine: expected 0 to 1, got 7"):
        ask(canned.url + "/admin/workers?engine=7", None)
    assert main([*top, "-1"]) == 2
    assert "--engine: expected 0 to 1000000, got '-1'" in capsys.readouterr().err


def test_a_server_that_starts_is_read() -> None:
    reason = {"ready": False, "reason": "starting, 0 of 2 workers ready", "error": None}
    seen = read_look(dict.fromkeys(PATHS) | {READY: json.dumps(reason).encode(), METRICS: b"emoe:ready 0.0\n"}, 0.0)
    assert seen.placement is None
    assert relative_load(seen) is None
    assert "starting, 0 of 2 workers ready" in drawn(View(url="http://api", now=seen))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("body", [b"<html>", b"[1]", b'{"x": 1}', b"\xff"])
def test_another_kind_of_server_is_named(answers: Answers, path: str, body: bytes) -> None:
    with pytest.raises(NotAServer, match=path) as caught:
        read_look(answers | {path: body}, 0.0)
    assert "\n" not in str(caught.value)


def test_an_experts_load_is_split_between_its_replicas() -> None:
    """Expert 0 has 6 tokens and two replicas; w1's last slot is empty."""
    members = tuple(Worker(id=WorkerId(f"w{n}"), node="n0", slots=2) for n in range(2))
    table = np.array([[0, 1, 0, EMPTY]])
    placement = Placement(num_logical_experts=2, workers=members, physical_to_logical_map=table)
    seen = look(placement=placement, load=np.array([[6.0, 2.0]]))
    assert relative_load(seen) == pytest.approx(np.array([[5 / 4], [3 / 4]]))


def test_counters_become_rates() -> None:
    def at(at_s: float, total: float) -> Look:
        return look(at_s, metrics={"x_total": total, "t_sum": total / 100, "t_count": total})

    assert rate(at(1.0, 10), at(3.0, 50), "x_total") == 20
    assert mean_s(at(1.0, 10), at(3.0, 50), "t") == pytest.approx(0.01)
    assert rate(None, at(3.0, 50), "x_total") is None
    assert rate(at(1.0, 10), at(3.0, 50), "other") is None
    assert rate(at(1.0, 50), at(3.0, 10), "x_total") is None, "the server began anew"
    assert mean_s(at(1.0, 10), at(3.0, 10), "t") is None, "nothing came"


# --- What is drawn ----------------------------------------------------------------------------------------------


def test_the_picture() -> None:
    before = {"vllm:generation_tokens_total": 100.0, "vllm:time_to_first_token_seconds_sum": 1.0}
    after = {"vllm:generation_tokens_total": 340.0, "vllm:time_to_first_token_seconds_sum": 1.5}
    more = {"vllm:kv_cache_usage_perc": 0.5, "emoe:bytes_moved_total": 3.4e6, "vllm:num_requests_waiting": 12.0}
    now = look(
        2.0,
        workers=[worker(n) for n in range(3)],
        metrics=after | more | {"vllm:time_to_first_token_seconds_count": 20.0},
        operations=(
            Operation(
                operation_id="scale-3",
                kind=OperationKind.SCALE,
                phase=Phase.PREPARING,
                epoch=Epoch(8),
                reason="asked for",
                retiring=(WorkerId("w2"),),
                progress=0.8,
            ),
        ),
    )
    earlier = look(metrics=before | {"vllm:time_to_first_token_seconds_count": 10.0})
    text = drawn(View(url="http://api", now=now, before=earlier, trend=[0.0, 60.0, 120.0]))
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert lines[0] == "tiny at http://api serves epoch 7"
    assert "tokens/s 120 prompt tokens/s - running - waiting 12 KV 50% first token 50 ms" in lines[1]
    assert f"tokens/s {BARS[0]}{BARS[4]}{BARS[7]} up to 120" in text.replace("  ", " ")
    assert "serving 2 of 2 workers, 1 to 8 possible recoveries - resumed - experts moved - in bytes 3.4 MB" in lines
    # of loads 6, 2 and 2 the mean is 10/3
    assert "w0 serving n0 cpu 3 25% 2 1.80x native ████" in lines
    assert "w1 serving n0 cpu 3 25% 2 0.60x native ▃▃▃▃" in lines
    assert "scale-3 scale preparing 80% asked for (w2 leaving)" in lines


def test_colours_say_who_is_busy_and_who_is_dead() -> None:
    dead = (worker(0), worker(1, state=WorkerState.DEAD, fit=None))
    text = drawn(View(url="http://api", now=look(workers=dead)), colour=True)
    assert "\x1b[38;2;240;60;60m" in text, "red for 1.5 times the mean"
    assert "\x1b[38;2;60;60;240m" in text, "blue for half of it"
    assert "\x1b[32mserving" in text
    assert "\x1b[31mdead" in text


@pytest.mark.parametrize(("width", "height"), [(80, 24), (120, 40), (250, 80)])
def test_a_large_cluster_fits_the_terminal(width: int, height: int) -> None:
    """64 workers of 58 layers."""
    operation = Operation(
        operation_id="o" * 200, kind=OperationKind.REBALANCE, phase=Phase.FAILED, epoch=Epoch(1), reason="x " * 300
    )
    workers = [worker(n, node="a-node-of-a-long-name", state=WorkerState.STARTING) for n in range(64)]
    now = look(layers=58, workers=workers, operations=(operation,) * 50)
    lines = drawn(View(url="http://api", now=now, trend=[1.0] * 500), width=width, height=height).splitlines()
    assert len(lines) <= height
    assert all(len(line) <= width for line in lines)
    assert any(line.startswith("and ") and "more" in line for line in lines)
    first = next(line for line in lines if line.startswith("w0"))
    assert "starting" in first
    assert "25%" in first
    assert "2.91x" in first
    assert first.count(BARS[7]) == min(58, {80: 30, 120: 29, 250: 58}[width])
    found = next(n for n, line in enumerate(lines) if "rebalance" in line and "failed" in line)
    reason = lines[found + (width < 110)]
    assert reason.count("x ") > 20, "a long reason is cut, but not to a few words"


def test_a_terminal_of_80_columns_cuts_neither_figures_nor_the_usual_reason() -> None:
    operation = Operation(
        operation_id="rebalance-12",
        kind=OperationKind.REBALANCE,
        phase=Phase.COMPLETED,
        epoch=Epoch(5),
        reason="a step of 1024 tokens would take 12 % less, 34 experts move; epoch 5",
    )
    metrics = {"emoe:bytes_moved_total": 5e9, "emoe:experts_moved_total": 1234.0}
    now = look(operations=(operation, operation), metrics=metrics)
    lines = drawn(View(url="http://127.0.0.1:8000", now=now), width=80).splitlines()
    assert sum(line.strip() == operation.reason for line in lines) == 2
    assert any("in bytes 5.0 GB" in line for line in lines)
    assert not any("…" in line for line in lines)


def test_the_dead_come_last() -> None:
    dead = worker(0, state=WorkerState.DEAD)
    text = drawn(View(url="http://api", now=look(workers=[dead, worker(1), worker(2)])), height=19)
    assert "w1" in text
    assert "w2" in text
    assert "dead" not in text
    assert "and 1 more" in text


def test_layers_that_do_not_fit_are_drawn_by_the_busiest_of_a_group() -> None:
    load = np.ones(58)
    load[57] = 2.0
    assert heat(load, 8).plain == BARS[4] * 7 + BARS[7]
    assert heat(load, 58).plain == BARS[4] * 57 + BARS[7]


def test_a_servers_text_steers_no_terminal() -> None:
    assert printable("a\x1b[2Jb\nc") == "a?[2Jb?c"
    evil = Operation(
        operation_id="\x1b]0;x\x07", kind=OperationKind.SCALE, phase=Phase.FAILED, epoch=Epoch(1), reason="[red]\x1b[2J"
    )
    text = drawn(View(url="http://api", now=look(operations=(evil,))))
    assert "\x1b" not in text
    assert "[red]" in text, "what looks like markup is text"


def test_a_lost_server_is_named_above_its_last_state() -> None:
    text = drawn(View(url="http://api", now=look(), away="Connection refused"))
    assert "no answer: Connection refused" in text
    assert "w1" in text


def test_numbers_are_short() -> None:
    assert [count(n) for n in (None, 0.0, 0.25, 3.0, 3.5, 12345.6)] == ["-", "0", "0.2", "3", "3.5", "12,346"]
    assert [seconds(s) for s in (None, 0.0123, 2.345)] == ["-", "12 ms", "2.3 s"]
    assert [size(b) for b in (None, 12, 3.4e6, 2e13)] == ["-", "12 B", "3.4 MB", "20.0 TB"]
    assert trend([0.0, 0.0]) == BARS[0] * 2


def test_drawing_goes_on_where_the_server_is_away_for_a_while() -> None:
    outcomes = iter([NoAnswer("Connection refused"), View(url="http://back", now=look()), KeyboardInterrupt()])

    def next_look() -> View:
        outcome = next(outcomes)
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    console = Console(file=io.StringIO(), width=120, height=40, force_terminal=True)
    with pytest.raises(KeyboardInterrupt):
        draw(console, next_look, View(url="http://first", now=look()), 0.0)
    text: str = console.file.getvalue()  # type: ignore[attr-defined]
    places = [text.index(part) for part in ("http://first", "no answer: Connection refused", "http://back")]
    assert places == sorted(places)


# --- Over HTTP --------------------------------------------------------------------------------------------------


@dataclass
class Canned:
    """A server with prepared answers; None is a 503."""

    answers: Answers = field(default_factory=dict)
    status: int = 200
    keys: list[str | None] = field(default_factory=list)
    url: str = ""


@pytest.fixture
def canned() -> Iterator[Canned]:
    given = Canned()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            given.keys.append(self.headers["Authorization"])
            body = given.answers.get(self.path)
            self.send_response(given.status if body is not None or given.status != 200 else 503)
            self.end_headers()
            self.wfile.write(body or b"{}")

        def log_message(self, *_: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        given.url = f"http://127.0.0.1:{server.server_port}"
        yield given
        server.shutdown()
        thread.join()


def test_once(canned: Canned, answers: Answers, capsys: pytest.CaptureFixture[str]) -> None:
    canned.answers = answers
    assert main(["top", "--url", canned.url + "/", "--api-key", "sesame", "--once", "--interval", "0.1"]) == 0
    said = capsys.readouterr().out
    assert f"tiny-moe at {canned.url}" in said
    assert "op-1" in said
    assert canned.keys == ["Bearer sesame"] * 2 * len(PATHS)


def test_a_server_that_is_not_ready_shows_nothing(canned: Canned) -> None:
    assert ask(canned.url + OPERATIONS, None) is None
    assert ask(canned.url + READY, None) == b"{}", "503 says why"
    assert canned.keys == [None, None]


@pytest.mark.parametrize(
    ("status", "message"), [(401, "--api-key"), (403, "--api-key"), (404, "is it a server"), (500, "HTTP 500")]
)
def test_refusals_are_printed(canned: Canned, status: int, message: str) -> None:
    canned.status = status
    with pytest.raises(UserError, match=message):
        ask(canned.url + READY, None)


def test_no_server_there() -> None:
    with pytest.raises(NoAnswer, match="refused"):
        ask("http://127.0.0.1:9/ready", None)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--url", "file:///etc/passwd"], "--url"),
        (["--url", "localhost:8000"], "--url"),
        (["--url", "http://"], "--url"),
        (["--interval", "0"], "--interval"),
        (["--interval", "nan"], "--interval"),
        (["--interval", "inf"], "--interval"),
        ([], "--once"),
    ],
)
def test_wrong_arguments_are_named(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["top", *words]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1


def test_a_key_that_fits_no_header_is_refused(canned: Canned) -> None:
    with pytest.raises(ConfigError, match="--api-key"):
        ask(canned.url + READY, "a\nb")
