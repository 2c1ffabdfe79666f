"""The benchmark's client reads events in whatever pieces they arrive, and never counts a failure as an answer."""

from __future__ import annotations

import json
import socketserver
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.bench.client import Client
from tests.bench.truth import Truth

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
