"""The benchmark's client reads events in whatever pieces they arrive, and never counts a failure as an answer."""

from __future__ import annotations

import json
import math
import socketserver
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.bench.client import Client
from tests.bench.truth import Truth, divergence

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


def event(**fields: object) -> bytes:
    return b"data: " + json.dumps(fields).encode() + b"\n\n"


def chunked(*events: bytes) -> bytes:
    return b"".join(b"%x\r\n%s\r\n" % (len(one), one) for one in events) + b"0\r\n\r\n"


def stream(tokens: int) -> list[bytes]:
    choices = [event(choices=[{"text": "a"}], usage=None)] * tokens
    return [*choices, event(choices=[], usage={"completion_tokens": tokens}), b"data: [DONE]\n\n"]


@contextmanager
def serving(response: bytes, cut: int) -> Iterator[str]:
    """Answers every request with `response`, in pieces of `cut` bytes."""

    class Handler(socketserver.StreamRequestHandler):
        disable_nagle_algorithm = True

        def handle(self) -> None:
            lines = [*iter(self.rfile.readline, b"\r\n")]
            length = next(int(line.split()[1]) for line in lines if line.startswith(b"Content-Length"))
            assert json.loads(self.rfile.read(length))["stream"]
            for start in range(0, len(response), cut):
                self.wfile.write(response[start : start + cut])

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()


def client(url: str) -> Client:
    return Client(url, "m", vocab=100, seed=0)


@pytest.mark.parametrize("cut", [5, 77, 100_000])
def test_events_however_they_are_cut(cut: int) -> None:
    with serving(HEAD + chunked(*stream(64)), cut) as url:
        measured = client(url).measure(2)
    assert measured.output_tokens_per_s > 0
    assert 0 <= measured.itl_ms <= measured.itl_p99_ms
    assert measured.ttft_ms > 0


def test_a_server_that_answers_something_else_is_not_measured() -> None:
    prompts = [[1, 2]] * 4
    with serving(HEAD + chunked(*stream(1)), cut=100_000) as url:
        Truth(prompts=prompts, texts=["a", "a", "b", "a"]).check(client(url), "it")
        with pytest.raises(RuntimeError, match=r"it answers 1 of 4 prompts as the model does: 'a' instead of 'b'"):
            Truth(prompts=prompts, texts=["a", "b", "b", "b"]).check(client(url), "it")


def likeliest(logprobs: dict[str, float], chat: bool) -> bytes:
    if chat:
        tops = [{"token": token, "logprob": p} for token, p in logprobs.items()]
        told: object = {"content": [{"token": "a", "top_logprobs": tops}]}
    else:
        told = {"tokens": ["a"], "top_logprobs": [logprobs]}
    return event(choices=[{"text": "a", "logprobs": told}], usage=None)


@pytest.mark.parametrize("chat", [False, True])
def test_other_first_tokens_are_taken_where_they_were_about_as_likely(chat: bool) -> None:
    """As with weights in 4 bits. Noise is refused all the same."""
    near, noise = {"a": math.log(0.4), "b": math.log(0.35)}, {"a": math.log(0.9), "x": math.log(0.05)}
    truth = {"a": 0.3, "b": 0.4, "c": 0.3}
    for said, refused in ((near, False), (noise, True)):
        events = chunked(likeliest(said, chat), *stream(1)[1:])
        checked = Truth(
            prompts=[[1, 2]] * 3, texts=["b"] * 3, probabilities=[truth | {"a": 1e-4 if refused else 0.3}] * 3
        )
        with serving(HEAD + events, cut=100_000) as url:
            if not refused:
                checked.check(client(url), "it")
                continue
            with pytest.raises(RuntimeError, match=r"0 of 3 prompts as the model does, with a divergence of \d"):
                checked.check(client(url), "it")


def test_divergence() -> None:
    truth = {"a": 0.5, "b": 0.25, "c": 0.25}
    assert divergence({"a": math.log(0.5), "b": math.log(0.25)}, truth) == pytest.approx(0)
    expected = 0.25 * math.log(0.5) + 0.5 * math.log(2) + 0.25 * math.log(1)
    assert divergence({"a": math.log(0.25), "b": math.log(0.5)}, truth) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("response", "message"),
    [
        (b"HTTP/1.1 503 No\r\nContent-Length: 4\r\n\r\nbusy", "status 503: busy"),
        (HEAD + chunked(*stream(63)), "63 tokens came"),
        (HEAD + chunked(*stream(64))[:200], "hung up"),
    ],
)
def test_no_failure_is_an_answer(response: bytes, message: str) -> None:
    with serving(response, 10) as url, pytest.raises((RuntimeError, ConnectionError), match=message):
        client(url).measure(1)
