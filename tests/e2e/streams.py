"""Requests that run beside what a test does to the server."""

from __future__ import annotations

import threading
import time
from typing import Any

from tests.e2e.conftest import MODEL, Server

PROMPT = [17, 42, 99, 7, 250]
GREEDY: dict[str, Any] = {"temperature": 0, "extra_body": {"ignore_eos": True}}


class Stream(threading.Thread):
    """A streamed completion in a thread: its text, and when each piece came."""

    def __init__(self, server: Server, tokens: int) -> None:
        super().__init__(daemon=True)
        self.text = ""
        self.stamps: list[float] = []
        self.finish_reason: str | None = None
        self._server, self._tokens = server, tokens
        # made here: where threads make theirs at the same time, the last one begins a second after the first
        self._create = server.client().completions.create
        self.start()

    def run(self) -> None:
        for event in self._create(model=MODEL, prompt=PROMPT, max_tokens=self._tokens, stream=True, **GREEDY):
            self.text += event.choices[0].text
            self.finish_reason = event.choices[0].finish_reason
            self.stamps.append(time.monotonic())

    def wait_for_pieces(self, count: int) -> None:
        self._server.wait(f"{count} pieces", lambda: len(self.stamps) >= count)
