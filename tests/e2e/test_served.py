"""A served model as its users see it: the `openai` client, the admin API, and kill -9, against transformers' tokens."""

from __future__ import annotations

import os
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from elastic_moe.actors.forkserver.request import NAME
from tests.e2e.conftest import MODEL, Reference, Server
from tests.e2e.streams import GREEDY, PROMPT, Stream

pytestmark = [pytest.mark.ray, pytest.mark.timeout(400)]


def test_completion_and_stream_are_transformers_tokens(server: Server, reference: Reference) -> None:
    expected = reference.text(reference.greedy(PROMPT, 64))
    whole = server.client().completions.create(model=MODEL, prompt=PROMPT, max_tokens=64, **GREEDY)
    assert whole.choices[0].text == expected
    assert whole.usage is not None
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (len(PROMPT), 64)
    stream = Stream(server, 64)
    stream.join(60)
    assert (stream.text, stream.finish_reason) == (expected, "length")
    # tokens come one by one, not all at the end
    assert len(stream.stamps) > 32


def test_only_workers_have_pytorch(server: Server) -> None:
    """It takes some 270 MB of each process that imports it."""
    family = psutil.Process(server.process.pid).children(recursive=True)
    having = [p for p in family if "libtorch_cpu.so" in Path(f"/proc/{p.pid}/maps").read_text()]
    workers = [p for p in having if p.name().startswith("ray::WorkerActor")]
    assert len(workers) == 3
    # and the process that they are forks of
    (server,) = {p.ppid() for p in workers}
    assert [(p.pid, p.name()) for p in having if p not in workers] == [(server, NAME)]


def test_all_workers_of_ray_are_forks(server: Server) -> None:
    """Each shares what Ray, Serve and the API import. The two agents are no workers."""
    family = psutil.Process(server.process.pid).children(recursive=True)
    titles = {p: p.cmdline()[0] for p in family if p.cmdline()}
    workers = {p: title for p, title in titles.items() if title.startswith("ray::") and not title.endswith("Agent")}
    kinds = {title.removeprefix("ray::").partition(":")[0].partition(".")[0] for title in workers.values()}
    serve = {"ServeController", "ProxyActor", "HAProxyManager", "ServeReplica"}
    assert kinds == serve | {"Coordinator", "Engine", "Migrator", "WorkerActor"}
    servers = {psutil.Process(p.ppid()) for p in workers}
    assert [s.name() for s in servers] == [NAME, NAME]


def test_chat(server: Server, reference: Reference) -> None:
    messages: Any = [{"role": "user", "content": "Where is the expert?"}]
    answer = server.client().chat.completions.create(model=MODEL, messages=messages, max_tokens=16, **GREEDY)
    prompt = reference.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert answer.choices[0].message.content == reference.text(reference.greedy(list(prompt), 16))


def test_concurrent_requests_do_not_change_one_another(server: Server, reference: Reference) -> None:
    prompts = [[(i * 37 + j * 11) % 400 + 5 for j in range(1 + i * 3)] for i in range(12)]

    def ask(prompt: list[int]) -> str:
        answer = server.client().completions.create(model=MODEL, prompt=prompt, max_tokens=24, **GREEDY)
        return answer.choices[0].text

    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(ask, prompts))
    for prompt, answer in zip(prompts, answers, strict=True):
        assert answer == reference.text(reference.greedy(prompt, 24))


def test_a_prompt_that_came_before_is_not_computed_again(server: Server, reference: Reference) -> None:
    """Its blocks, and those of a conversation's last turn, give the tokens that transformers computes from scratch."""
    prompt = [(i * 29) % 400 + 5 for i in range(70)]
    expected = reference.greedy(prompt, 24)
    cached = []
    for turn in (prompt, prompt, prompt + expected + [9, 8, 7]):
        answer = server.client().completions.create(model=MODEL, prompt=turn, max_tokens=24, **GREEDY)
        assert answer.choices[0].text == reference.text(reference.greedy(turn, 24))
        assert answer.usage is not None
        assert answer.usage.prompt_tokens_details is not None
        cached.append(answer.usage.prompt_tokens_details.cached_tokens)
    # in blocks of 16 tokens
    assert cached == [0, 64, 80]


def test_a_replacement_under_a_stream_changes_no_token(server: Server, reference: Reference) -> None:
    """Skewed traffic, a dry run, then the re-placement itself while a stream runs."""
    before = server.get("/admin/placement")
    Stream(server, 200).join(60)
    server.wait("routing statistics", lambda: server.get("/admin/routing")["tokens"] > 100)
    dry = server.post("/admin/rebalance", {"planner": "greedy", "dry_run": True})
    assert dry.status_code == 200
    preview = dry.json()
    assert preview["moves"] > 0
    assert preview["bytes"] > 0
    assert preview["load_imbalance_after"] <= preview["load_imbalance_before"]
    assert server.get("/admin/placement") == before

    streams = [Stream(server, 1000)]
    streams[0].wait_for_pieces(20)
    begun = server.post("/admin/rebalance", {"planner": "greedy"})
    assert begun.status_code == 202
    operation = begun.json()["operation_id"]

    def over() -> bool:
        # a fast machine ends a stream before the planner's process has begun
        if not streams[-1].is_alive():
            streams.append(Stream(server, 1000))
        return bool(server.get(f"/admin/operations/{operation}")["phase"] in ("completed", "failed"))

    server.wait("the re-placement", over)
    end = server.get(f"/admin/operations/{operation}")
    assert end["phase"] == "completed", end
    under_way = streams[-1].is_alive()
    assert under_way, "the stream had ended before the placement changed"
    expected = reference.text(reference.greedy(PROMPT, 1000))
    for stream in streams:
        stream.join(120)
        assert stream.text == expected
    after = server.get("/admin/placement")
    assert after["epoch"] > before["epoch"]
    assert after["physical_to_logical_map"] != before["physical_to_logical_map"]


def test_a_client_that_hangs_up_frees_its_place(server: Server) -> None:
    body = {"model": MODEL, "prompt": PROMPT, "max_tokens": 900, "stream": True, "ignore_eos": True}
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=30) as response:
        # held on to: httpx closes a response whose iterator is dropped
        lines = response.iter_lines()
        next(lines)
        server.wait(
            "a running request", lambda: sum(w["running_requests"] for w in server.get("/admin/workers")) == 1, 10
        )
    server.wait("an idle cluster", lambda: all(w["running_requests"] == 0 for w in server.get("/admin/workers")), 10)


def test_bad_requests_harm_no_other_request(server: Server, reference: Reference) -> None:
    stream = Stream(server, 200)
    stream.wait_for_pieces(5)
    completions = f"{server.url}/v1/completions"
    for content, status in (
        (b"{" * 100, 400),
        (b'{"model": "tiny", "prompt": "\xff\xfe"}', 400),
        (b'{"model": "tiny", "prompt": "' + b"x" * (10 << 20) + b'"}', 413),
    ):
        response = httpx.post(completions, content=content, headers={"content-type": "application/json"}, timeout=30)
        assert response.status_code == status
        assert response.json()["error"]["message"]
    for body, status, param in (
        ({"model": "nobody", "prompt": "x"}, 404, "model"),
        ({"model": MODEL, "prompt": "x", "max_tokens": -1}, 400, "max_tokens"),
        ({"model": MODEL, "prompt": [1] * 2000}, 400, "prompt"),
        ({"model": MODEL, "prompt": "x", "temperature": "hot"}, 400, "temperature"),
    ):
        response = server.post("/v1/completions", body)
        assert response.status_code == status, response.text
        assert response.json()["error"]["param"] == param
    stream.join(60)
    assert stream.text == reference.text(reference.greedy(PROMPT, 200))


def test_it_listens_on_loopback_only(server: Server) -> None:
    """Neither it nor Ray nor Serve was told to listen anywhere else."""
    family = psutil.Process(server.process.pid).children(recursive=True)
    listening = [
        (connection.laddr.ip, process.name())
        for process in family
        for connection in process.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN
    ]
    # of every worker and of the engine, among others
    assert len(listening) > 4
    assert [where for where in listening if where[0].removeprefix("::ffff:") != "127.0.0.1"] == []


def test_metrics_count(server: Server) -> None:
    text = httpx.get(f"{server.url}/metrics", timeout=30).text
    for name in (
        "vllm:num_requests_running",
        "vllm:time_to_first_token_seconds",
        "vllm:generation_tokens_total",
        "emoe:",
    ):
        assert name in text


def test_kill_9_of_a_worker_under_a_stream(server: Server, reference: Reference) -> None:
    """The worker that runs the request dies: the stream pauses, and goes on with the same tokens."""
    stream = Stream(server, 800)
    stream.wait_for_pieces(30)
    homes: list[dict[str, Any]] = []

    def runs() -> bool:
        homes[:] = [worker for worker in server.get("/admin/workers") if worker["running_requests"]]
        return bool(homes)

    server.wait("the worker that runs the request", runs, 10)
    (home,) = homes
    os.kill(home["pid"], signal.SIGKILL)
    stream.join(120)
    assert stream.text == reference.text(reference.greedy(PROMPT, 800))
    assert home["id"] not in [w["id"] for w in server.get("/admin/placement")["workers"]]

    def three_again() -> bool:
        return len(server.get("/admin/placement")["workers"]) == 3

    server.wait("a replacement worker", three_again, 90)


def test_the_fork_servers_death_changes_nothing(server: Server, reference: Reference) -> None:
    stream = Stream(server, 400)
    stream.wait_for_pieces(5)
    pids = {w["id"]: w["pid"] for w in server.get("/admin/workers") if w["state"] == "serving"}
    (before,) = {psutil.Process(pid).ppid() for pid in pids.values()}
    os.kill(before, signal.SIGKILL)
    stream.join(60)
    assert stream.text == reference.text(reference.greedy(PROMPT, 400))
    assert {w["id"]: w["pid"] for w in server.get("/admin/workers") if w["state"] == "serving"} == pids
    # the next worker's launcher starts another one
    victim = max(pids)
    os.kill(pids[victim], signal.SIGKILL)

    def replaced() -> list[int]:
        there = {w["id"]: w["pid"] for w in server.get("/admin/workers") if w["state"] == "serving"}
        return [pid for worker, pid in there.items() if worker not in pids] if len(there) == 3 else []

    server.wait("a replacement worker", replaced, 90)
    (new,) = replaced()
    assert psutil.Process(psutil.Process(new).ppid()).name() == NAME


def test_an_orderly_end(server: Server, reference: Reference) -> None:
    """Last of all: a running request gets its whole answer, and no process is left."""
    stream = Stream(server, 200)
    stream.wait_for_pieces(5)
    assert server.stop() == 0
    stream.join(10)
    assert stream.text == reference.text(reference.greedy(PROMPT, 200))
    # progress, one line with the URL, and the end: nothing of Ray's
    lines = server.log.read_text().splitlines()
    assert sum("http://" in line for line in lines) == 1
    assert not [line for line in lines if "Traceback" in line or "ray" in line.lower().replace("starting ray", "")]
