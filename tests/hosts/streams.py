"""Streams that note when each piece came, and how they ended, whatever becomes of the server meanwhile."""

from __future__ import annotations

import json
import threading
import time
from itertools import pairwise
from typing import Any

import httpx

from tests.e2e.conftest import MODEL, Reference, Server

PROMPTS = ([17, 42, 99, 7, 250], [5, 300, 12], [401, 33, 8, 90, 211, 77, 6], [64], [9, 9, 9, 31], [120, 7])


class HostStream(threading.Thread):
    """A streamed greedy completion of `tokens` tokens in a thread."""

    def __init__(
        self,
        server: Server,
        prompt: list[int],
        tokens: int,
        timeout_s: float = 180,
        *,
        model: str = MODEL,
        key: str = "",
    ) -> None:
        super().__init__(daemon=True)
        self._model, self._headers = model, {"Authorization": f"Bearer {key}"} if key else {}
        self.prompt, self.tokens = prompt, tokens
        self.text = ""
        self.stamps: list[float] = []
        self.finish_reason: str | None = None
        self.error: str | None = None
        """The message of an error event, or why the connection ended early."""
        self.ended_at: float | None = None
        self._url, self._timeout_s = server.url, timeout_s
        self.start()

    def run(self) -> None:
        body: dict[str, Any] = {"model": self._model, "prompt": self.prompt, "max_tokens": self.tokens, "stream": True}
        body |= {"temperature": 0, "ignore_eos": True}
        call: dict[str, Any] = {"json": body, "headers": self._headers, "timeout": self._timeout_s}
        try:
            with httpx.stream("POST", f"{self._url}/v1/completions", **call) as response:
                if response.status_code != 200:
                    self.error = f"{response.status_code}: {response.read().decode()}"
                    return
                for line in response.iter_lines():
                    self._take(line)
        except httpx.HTTPError as error:
            self.error = self.error or f"cut: {type(error).__name__}: {error}"
        finally:
            self.ended_at = time.monotonic()

    def _take(self, line: str) -> None:
        if not line.startswith("data: ") or line == "data: [DONE]":
            return
        event = json.loads(line.removeprefix("data: "))
        if "error" in event:
            self.error = str(event["error"]["message"])
            return
        self.stamps.append(time.monotonic())
        self.text += event["choices"][0]["text"]
        self.finish_reason = event["choices"][0]["finish_reason"] or self.finish_reason

    def longest_gap_s(self, since: float) -> float:
        """The longest time after `since` in which nothing came, until the end of the stream."""
        stamps = [since, *(stamp for stamp in self.stamps if stamp > since)]
        return max((b - a for a, b in pairwise(stamps)), default=0.0)


class Streaming(threading.Thread):
    """One stream after another until it is told to stop, all of the same prompt."""

    def __init__(self, server: Server, prompt: list[int], tokens: int, **named: str) -> None:
        super().__init__(daemon=True)
        self.streams: list[HostStream] = []
        self.over = threading.Event()
        self._begin = lambda: HostStream(server, prompt, tokens, **named)
        self.start()

    def run(self) -> None:
        while not self.over.is_set():
            stream = self._begin()
            stream.join()
            self.streams.append(stream)

    def end(self) -> float:
        """The longest time in which a stream that had begun got nothing. All must have ended well, with one text."""
        self.over.set()
        self.join(180)
        assert not self.is_alive(), "a stream has not ended"
        assert {stream.error for stream in self.streams} == {None}
        assert len({stream.text for stream in self.streams}) == 1, "other tokens than before"
        return max(stream.longest_gap_s(stream.stamps[0]) for stream in self.streams)


def begin(server: Server, count: int, tokens: int) -> list[HostStream]:
    """`count` streams of different prompts, each of which has brought its first piece."""
    streams = [HostStream(server, PROMPTS[n % len(PROMPTS)], tokens) for n in range(count)]
    for stream in streams:
        server.wait("a first piece", lambda s=stream: s.stamps or s.ended_at, 60)  # type: ignore[misc]
    return streams


def end(streams: list[HostStream], reference: Reference, timeout_s: float = 180) -> None:
    """Wait for all, and compare their texts with transformers' on one machine."""
    deadline = time.monotonic() + timeout_s
    for stream in streams:
        stream.join(max(0.1, deadline - time.monotonic()))
        assert not stream.is_alive(), f"a stream has not ended after {len(stream.stamps)} pieces"
        assert stream.error is None, stream.error
        expected = reference.text(reference.greedy(stream.prompt, stream.tokens))
        assert stream.text == expected, "other tokens than on one machine"
