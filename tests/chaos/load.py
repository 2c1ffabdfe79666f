"""Streaming, plain and background requests side by side, without end, each answer checked token by token."""

from __future__ import annotations

import json
import random
import statistics
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import jsonschema

from elastic_moe.deploy.structured.requested import json_grammar
from tests.e2e.conftest import MODEL, Reference, Server

LONG_PROMPT = [(37 * n) % 400 + 3 for n in range(280)]
"""Takes many steps where a step runs few tokens: then prompts are nearly always under way."""
PROMPTS = ([17, 42, 99, 7, 250], [5, 300, 12], [401, 33, 8, 90, 211, 77, 6], [64], LONG_PROMPT)
TEXTS = ("Where is the expert?", "What moves?", "Who dies next?")
"""Of background responses, which are chats."""
SCHEMA = {
    "type": "object",
    "properties": {
        "kind": {"enum": ["tree", "bush"]},
        "size": {"type": "integer", "minimum": 1, "maximum": 300},
        "names": {"type": "array", "items": {"type": "string", "maxLength": 6}, "maxItems": 3},
    },
    "required": ["kind", "size", "names"],
    "additionalProperties": False,
}
"""What structured answers look like."""
STRUCTURED = 0.2
"""Share of the requests whose answers must follow SCHEMA."""
ANSWER_S = 90.0
"""A stream that is silent for so long is lost."""


class Expected:
    """transformers' answers: greedy tokens of a shorter answer are the beginning of a longer one's."""

    def __init__(self, reference: Reference | None, longest: int, kept: Path | None = None) -> None:
        """longest: output tokens of the longest answer. Without a reference their number alone is known.

        The answers are read from the file `kept`, or made and written to it, as making them takes long for some models.
        """
        self.longest = longest
        self._reference = reference
        self._tokens: list[list[int]] = []
        self._chats: list[list[int]] = []
        self._structured: list[list[int]] = []
        if kept is not None and kept.exists():
            self._tokens, self._chats, self._structured = json.loads(kept.read_text())
        elif reference is not None:
            self._make(reference)
        if kept is not None and not kept.exists():
            kept.write_text(json.dumps([self._tokens, self._chats, self._structured]))

    def _make(self, reference: Reference) -> None:
        longest, grammar = self.longest, json_grammar(SCHEMA, whitespace=False)
        self._tokens = [reference.greedy(list(prompt), longest) for prompt in PROMPTS]
        self._chats = [reference.greedy(reference.chat(text), longest) for text in TEXTS]
        self._structured = [reference.structured(list(prompt), longest, grammar) for prompt in PROMPTS]

    def agrees(self, answer: str, prompt: int, tokens: int) -> bool:
        return self._reference is None or answer == self._reference.text(self._tokens[prompt][:tokens])

    def agrees_in_chat(self, answer: str, chat: int, tokens: int) -> bool:
        return self._reference is None or answer == self._reference.text(self._chats[chat][:tokens])

    def agrees_structured(self, answer: Sequence[int], prompt: int, tokens: int) -> bool:
        """Whether these are the tokens of an answer that follows SCHEMA."""
        return self._reference is None or list(answer) == self._structured[prompt][:tokens]


@dataclass(slots=True)
class Tally:
    """What became of the requests."""

    answers: int = 0
    cut: int = 0
    """Connections that ended while `Load.forgives` was set."""
    faults: list[str] = field(default_factory=list)
    """Requests that were refused or lost, and answers with other tokens than expected."""


class Load:
    """`threads` clients. Use as a context: leaving it waits for the last answers."""

    def __init__(
        self,
        server: Server,
        expected: Expected,
        *,
        threads: int,
        seed: int,
        streams: float = 0.5,
        prefill: float = 0.1,
        background: float = 0.2,
    ) -> None:
        """streams: share of requests that are streamed; prefill: of those with the long prompt; background: of those
        that are background responses, which no death of a replica may end."""
        self._server, self._expected = server, expected
        self.prefill = prefill
        self.background = background
        self.forgives = False
        """Whether a request may end with its connection, because an API replica dies."""
        self._ending = threading.Event()
        self._awake = threading.Event()
        self._awake.set()
        self._resting = 0
        self._rests: list[float] = []
        """When everybody rested."""
        self._lock = threading.Lock()
        self._stamps: list[float] = []
        self._gaps: list[tuple[float, float]] = []
        """(end, seconds) of the gaps between two tokens of one stream."""
        self.tally = Tally()
        self.clients = threads
        self._threads = [
            # the first one always streams: an outage shows in streams alone
            threading.Thread(target=self._work, args=(random.Random(f"{seed}/{n}"), streams if n else 1.0), daemon=True)
            for n in range(threads)
        ]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ending.set()
        self._awake.set()
        deadline = time.monotonic() + ANSWER_S
        for thread in self._threads:
            thread.join(max(0.1, deadline - time.monotonic()))
            if thread.is_alive():
                self.tally.faults.append("lost: an answer did not end")

    def outage_s(self, begin: float, end: float) -> float:
        """The longest time between `begin` and `end` in which no stream got a token, though some were asked for."""
        stamps = [stamp for stamp in sorted(self._stamps) if begin - 1.0 <= stamp <= end]
        pauses = [(a, b) for a, b in pairwise(stamps) if b >= begin and not any(a <= at <= b for at in self._rests)]
        return max((b - a for a, b in pauses), default=end - begin)

    def longest_gap_s(self, begin: float, end: float) -> float:
        """The same for the stream that waited longest."""
        return self.longest_gap(begin, end)[1]

    def longest_gap(self, begin: float, end: float) -> tuple[float, float]:
        """(when it ended, seconds)"""
        gaps = [(at, gap) for at, gap in self._gaps if begin <= at <= end]
        return max(gaps, key=lambda found: found[1], default=(begin, 0.0))

    def rest(self) -> None:
        """Ask for nothing more, and wait until what was asked for is answered."""
        self._awake.clear()
        self._server.wait("an idle server", lambda: self._resting == len(self._threads), ANSWER_S)
        self._rests.append(time.monotonic())

    def go_on(self) -> None:
        self._awake.set()

    def usual_gap_s(self, begin: float, end: float) -> float:
        """The median gap between two tokens of a stream."""
        return statistics.median([gap for at, gap in self._gaps if begin <= at <= end] or [0.0])

    def tokens_per_s(self, begin: float, end: float) -> float:
        """Of streams."""
        return sum(begin <= stamp <= end for stamp in self._stamps) / max(end - begin, 1e-9)

    def wait_for_tokens(self, count: int, timeout_s: float = 60.0) -> None:
        goal = len(self._stamps) + count
        self._server.wait(f"{count} tokens", lambda: len(self._stamps) >= goal, timeout_s)

    # --- Clients ------------------------------------------------------------------------------------------------

    def _work(self, rng: random.Random, streams: float) -> None:
        with httpx.Client(base_url=self._server.url, timeout=ANSWER_S) as client:
            while not self._ending.is_set():
                if not self._awake.is_set():
                    with self._lock:
                        self._resting += 1
                    self._awake.wait()
                    with self._lock:
                        self._resting -= 1
                    continue
                # the first one streams without end: it shows outages
                if streams < 1.0 and rng.random() < self.background:
                    try:
                        self._count(Background(self._expected, client, rng).fault())
                    except (httpx.HTTPError, ValueError, KeyError) as error:
                        self._ended(error)
                    continue
                short = rng.randrange(len(PROMPTS) - 1)
                prompt = len(PROMPTS) - 1 if rng.random() < self.prefill else short
                tokens = rng.randint(min(20, self._expected.longest), self._expected.longest)
                stream = rng.random() < streams
                structured = rng.random() < STRUCTURED
                try:
                    if structured:
                        ids = self._ask_structured(client, prompt, tokens, stream=stream)
                        answer, good = str(ids), self._expected.agrees_structured(ids, prompt, tokens)
                    else:
                        answer = self._ask(client, prompt, tokens, stream=stream)
                        good = self._expected.agrees(answer, prompt, tokens)
                except (httpx.HTTPError, ValueError, KeyError, jsonschema.ValidationError) as error:
                    self._ended(error)
                    continue
                if not good:
                    kind = f"{'structured ' if structured else ''}{'stream' if stream else 'plain answer'}"
                    self._count(f"other tokens: {kind} of {tokens} tokens to prompt {prompt}: {answer[:80]!r}")
                else:
                    self._count(None)

    def _count(self, fault: str | None) -> None:
        with self._lock:
            if fault is None:
                self.tally.answers += 1
            else:
                self.tally.faults.append(fault)

    def _ended(self, error: Exception) -> None:
        """A request ended without an answer."""
        if self.forgives:
            with self._lock:
                self.tally.cut += 1
        else:
            self._count(f"lost: {type(error).__name__}: {error}")

    def _ask(self, client: httpx.Client, prompt: int, tokens: int, *, stream: bool) -> str:
        """The text of the answer. Raises ValueError for an error object, which a refusal is too: it could wait."""
        body = {"model": MODEL, "prompt": PROMPTS[prompt], "max_tokens": tokens, "temperature": 0}
        body |= {"ignore_eos": True, "stream": stream}
        if stream:
            # so that every token comes at once: text alone waits for the end of a character
            body["logprobs"] = 0
        with client.stream("POST", "/v1/completions", json=body) as response:
            if stream and response.status_code == 200:
                return self._read_stream(response, tokens)
            answer = json.loads(response.read())
        text = _text(answer)
        if answer["usage"]["completion_tokens"] != tokens:
            raise ValueError(f"{answer['usage']['completion_tokens']} of {tokens} tokens came")
        return text

    def _ask_structured(self, client: httpx.Client, prompt: int, tokens: int, *, stream: bool) -> list[int]:
        """The tokens of an answer that follows SCHEMA. Raises ValueError for an error object, and for other JSON."""
        body = {"model": MODEL, "prompt": PROMPTS[prompt], "max_tokens": tokens, "temperature": 0, "stream": stream}
        body |= {"return_token_ids": True, "structured_outputs": {"json": SCHEMA, "disable_any_whitespace": True}}
        ids: list[int] = []
        text, reason, last = "", None, 0.0
        with client.stream("POST", "/v1/completions", json=body) as response:
            streamed = stream and response.status_code == 200
            for line in response.iter_lines() if streamed else [response.read().decode()]:
                if streamed and not line.startswith("data: {"):
                    continue
                answer = json.loads(line.removeprefix("data: "))
                text += _text(answer)
                new = answer["choices"][0].get("token_ids") or []
                ids += new
                reason = answer["choices"][0]["finish_reason"] or reason
                if streamed and new:
                    last = self._stamp(len(new), last)
        if reason == "stop":
            jsonschema.validate(json.loads(text), SCHEMA)
        return ids

    def _stamp(self, tokens: int, last: float) -> float:
        """Note that a stream got `tokens` tokens, and return when. `last`: when it got the ones before, or 0."""
        now = time.monotonic()
        self._stamps.extend([now] * tokens)
        if last:
            self._gaps.append((now, now - last))
        return now

    def _read_stream(self, response: httpx.Response, tokens: int) -> str:
        text, last, count = "", 0.0, 0
        for line in response.iter_lines():
            if not line.startswith("data: {"):
                continue
            chunk = json.loads(line.removeprefix("data: "))
            text += _text(chunk)
            scored = chunk["choices"][0]["logprobs"]
            new = len(scored["tokens"]) if scored else 0
            if not new:
                continue
            count += new
            last = self._stamp(new, last)
        if count != tokens:
            raise ValueError(f"{count} of {tokens} tokens came")
        return text


def _text(answer: dict[str, Any]) -> str:
    if "error" in answer:
        raise ValueError(answer["error"]["message"])
    return str(answer["choices"][0]["text"])


class Background:
    """One background response. Once it is accepted, it must end with its whole answer, whoever dies."""

    def __init__(self, expected: Expected, client: httpx.Client, rng: random.Random) -> None:
        self._expected, self._client = expected, client
        self._chat = rng.randrange(len(TEXTS))
        self._tokens = rng.randint(min(20, expected.longest), expected.longest)
        self._streams = rng.random() < 0.5

    def fault(self) -> str | None:
        """What was wrong with the answer, if anything. Raises HTTPError, ValueError and KeyError where the response was
        not accepted."""
        body = {"model": MODEL, "input": TEXTS[self._chat], "max_output_tokens": self._tokens, "temperature": 0}
        response = self._client.post("/v1/responses", json={**body, "ignore_eos": True, "background": True})
        if response.status_code != 200:
            raise ValueError(response.text)
        name = response.json()["id"]
        ended = self._streamed(name) if self._streams else self._polled(name)
        if ended is None:
            return f"lost: background response {name} did not end"
        if ended["status"] != "incomplete" or ended["usage"]["output_tokens"] != self._tokens:
            return f"background response {name}: {ended['status']}, {ended['error']}, {ended['usage']}"
        text = "".join(part["text"] for item in ended["output"] for part in item["content"])
        if not self._expected.agrees_in_chat(text, self._chat, self._tokens):
            return f"other tokens: background response of {self._tokens} tokens to chat {self._chat}: {text[:80]!r}"
        return None

    def _polled(self, name: str) -> dict[str, Any] | None:
        deadline = time.monotonic() + ANSWER_S
        while time.monotonic() < deadline:
            try:
                response = self._client.get(f"/v1/responses/{name}")
                found: dict[str, Any] = response.json()
            except (httpx.HTTPError, ValueError):
                found = {}
            if found.get("status", "queued") not in ("queued", "in_progress"):
                return found
            time.sleep(0.1)
        return None

    def _streamed(self, name: str) -> dict[str, Any] | None:
        """Read as a stream that is taken up again wherever it was cut; its text must be that of the end."""
        deadline = time.monotonic() + ANSWER_S
        events: list[dict[str, Any]] = []
        while time.monotonic() < deadline:
            query = {"stream": "true"} | ({"starting_after": str(len(events) - 1)} if events else {})
            try:
                with self._client.stream("GET", f"/v1/responses/{name}", params=query) as response:
                    lines = response.iter_lines() if response.status_code == 200 else ()
                    for line in lines:
                        # one by one: those before a cut count
                        event = json.loads(line.removeprefix("data: ")) if line.startswith("data: {") else {}
                        # an error event without a number says that the stream was cut
                        events += [event] if "sequence_number" in event else []
            except httpx.HTTPError:
                time.sleep(0.05)
            if [event["sequence_number"] for event in events] != list(range(len(events))):
                return {"status": "out of sequence", "error": None, "usage": {"output_tokens": -1}}
            if events and events[-1]["type"] == "response.incomplete":
                ended: dict[str, Any] = events[-1]["response"]
                text = "".join(event["delta"] for event in events if event["type"] == "response.output_text.delta")
                ended["output"] = [{"content": [{"text": text}]}]
                return ended
        return None
