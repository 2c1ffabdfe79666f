"""Makes prompts of what clients send: renders chats and encodes text.

A chat template is a program, and a tokenizer's regular expressions are nearly one. Both come from strangers, and so
does their input. `BoundedPrompts` runs them in processes whose time and memory are limited, so that an endless loop
hurts only its own request. `DirectPrompts` runs them in this process, for tests.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import msgspec

from elastic_moe.actors.stillness import TRIES, StandsStill, Watch, while_it_works
from elastic_moe.cluster.errors import NotReadyError, RequestError, UserError
from elastic_moe.cluster.messages.grammars import Grammar
from elastic_moe.deploy.text.grammar_check import GRAMMAR_S, GrammarCheck
from elastic_moe.deploy.text.tokenizer import Tokenizer
from elastic_moe.deploy.text.tokenizer_process import HEADER, TokenizerProcess, call_s, limits_in_words

logger = logging.getLogger(__name__)

LONG_TEXT = 4096
"""Characters from which on a text is encoded in a thread, so that streams do not stall."""
SHORT_BYTES = 1 << 16
"""Size up to which a prompt counts as short."""
SHORT_SEATS, LONG_SEATS, GRAMMAR_SEATS = 2, 1, 1
"""Number of short prompts, of long prompts and of grammars that are worked on at a time. None holds up the others."""
LARGE_BYTES = 1 << 20
"""Size of input above which a process is not used again, because it would keep the memory."""


class Prompts(Protocol):
    async def encode(self, text: str, *, add_special_tokens: bool, param: str) -> list[int]:
        """The token ids of a text. Raises RequestError, which names `param`."""
        ...

    async def render_chat(self, messages: Sequence[Mapping[str, Any]], **how: Any) -> str:
        """The prompt of a chat; see Tokenizer.render_chat."""
        ...

    async def fault_of_grammar(self, grammar: Grammar) -> str | None:
        """Why the grammar cannot be used: it does not compile, matches nothing, or is too complex. None if it can."""
        ...

    def close(self) -> None: ...


class DirectPrompts:
    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._grammars = GrammarCheck(tokenizer.to_json)

    async def encode(self, text: str, *, add_special_tokens: bool, param: str) -> list[int]:
        if len(text) < LONG_TEXT:
            return self._tokenizer.encode(text, add_special_tokens=add_special_tokens)
        return await asyncio.to_thread(self._tokenizer.encode, text, add_special_tokens=add_special_tokens)

    async def render_chat(self, messages: Sequence[Mapping[str, Any]], **how: Any) -> str:
        return self._tokenizer.render_chat(messages, **how)

    async def fault_of_grammar(self, grammar: Grammar) -> str | None:
        return await asyncio.to_thread(self._grammars.fault, grammar.kind, grammar.text)

    def close(self) -> None:
        pass


class BoundedPrompts:
    """Renders and encodes in processes with limits. Use it on the event loop that opened it."""

    def __init__(self, process: TokenizerProcess) -> None:
        self._process = process
        self._idle: list[_Worker] = []
        self._short = asyncio.Semaphore(SHORT_SEATS)
        self._long = asyncio.Semaphore(LONG_SEATS)
        self._grammars = asyncio.Semaphore(GRAMMAR_SEATS)
        self._restarting = asyncio.Lock()

    @classmethod
    async def open(cls, model_dir: str, chat_template: str | None) -> BoundedPrompts:
        """Start the processes. Raises CheckpointError or ConfigError where the tokenizer or the template is
        unusable."""
        process = TokenizerProcess(model_dir, chat_template)
        try:
            await asyncio.to_thread(process.wait)
        except BaseException:
            process.close()
            raise
        return cls(process)

    async def encode(self, text: str, *, add_special_tokens: bool, param: str) -> list[int]:
        tokens: list[int] = await self._call(param, "encode", text=text, add_special_tokens=add_special_tokens)
        return tokens

    async def render_chat(self, messages: Sequence[Mapping[str, Any]], **how: Any) -> str:
        text: str = await self._call("messages", "render_chat", messages=messages, **how)
        return text

    def close(self) -> None:
        for worker in self._idle:
            worker.close()
        self._process.close()

    async def fault_of_grammar(self, grammar: Grammar) -> str | None:
        payload = msgspec.json.encode(["fault_of_grammar", {"kind": grammar.kind, "text": grammar.text}])
        answer = await self._ask(payload, self._grammars, GRAMMAR_S)
        if answer is None:
            logger.warning("a grammar was given up: it is not compiled within %.0f s of processor time", GRAMMAR_S)
            return f"it is not compiled within {GRAMMAR_S:.0f} s of processor time; make it simpler"
        fault = answer.get("failed") or answer["value"]
        return None if fault is None else str(fault)

    async def _call(self, param: str, method: str, **arguments: Any) -> Any:
        payload = msgspec.json.encode([method, arguments])
        seats = self._short if len(payload) <= SHORT_BYTES else self._long
        answer = await self._ask(payload, seats, call_s(len(payload)))
        what = "the chat template" if method == "render_chat" else "the tokenizer"
        if answer is None:
            logger.warning("a prompt was given up, because it needs more than %s", limits_in_words(len(payload)))
            raise RequestError(
                f"{param}: {what} does not finish this within {limits_in_words(len(payload))}",
                param=param,
                code="prompt_too_expensive",
            )
        if failed := answer.get("failed"):
            raise RequestError(f"{param}: {what} fails on this: {failed}", param=param, code="invalid_value")
        if refused := answer.get("refused"):
            raise RequestError(refused["message"], param=refused["param"], code=refused["code"])
        return answer["value"]

    async def _ask(self, payload: bytes, seats: asyncio.Semaphore, limit_s: float) -> dict[str, Any] | None:
        """A process's answer to a call; None where it was given up. limit_s: processor time at which a process ends.

        A process that stands still is ended, and another one is asked, since the answer depends on the call alone. So
        is one more where a process has died too early for that limit: perhaps somebody else has ended it.
        Raises NotReadyError where no process answers.
        """
        stills = deaths = 0
        async with seats:
            while True:
                worker, began = await self._worker(), time.monotonic()
                answer = None
                try:
                    answer = await worker.ask(payload)
                    return answer
                except StandsStill as why:
                    stills += 1
                    logger.warning("a process that makes prompts is replaced: %s", why)
                    if stills == TRIES:
                        raise NotReadyError(
                            f"the processes that make prompts stand still, the last one: {why}"
                        ) from None
                except (OSError, EOFError):
                    deaths += 1
                    if deaths > 1 or time.monotonic() - began >= limit_s:
                        return None
                finally:
                    if answer is None or len(payload) > LARGE_BYTES:
                        worker.close()
                    else:
                        self._idle.append(worker)

    async def _worker(self) -> _Worker:
        while self._idle:
            worker = self._idle.pop()
            if worker.alive:
                return worker
            worker.close()
        async with self._restarting:
            for _ in range(TRIES):
                try:
                    return await self._fork()
                except StandsStill as why:
                    logger.warning("the tokenizer's process is started again: %s", why)
                except (OSError, EOFError):
                    logger.warning("the tokenizer's process has ended and is started again")
                self._process.close()
                try:
                    self._process = await asyncio.to_thread(self._process.again)
                except UserError as error:
                    # it was usable when the server started
                    raise NotReadyError(str(error)) from None
        raise NotReadyError("the tokenizer's process ends or stands still whenever it is started again")

    async def _fork(self) -> _Worker:
        """A new worker. Raises StandsStill, OSError or EOFError."""
        reader, writer = await asyncio.open_unix_connection(sock=self._process.worker())
        try:
            (pid,) = HEADER.unpack(await while_it_works(reader.readexactly(HEADER.size), self._process.watch()))
        except BaseException:
            writer.close()
            raise
        return _Worker(reader, writer, Watch(pid))


class _Worker:
    """Our end of a process that makes one prompt at a time."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, watch: Watch) -> None:
        self._reader = reader
        self._writer = writer
        self._watch = watch

    @property
    def alive(self) -> bool:
        return not self._reader.at_eof()

    async def ask(self, payload: bytes) -> dict[str, Any]:
        """Send one call, and wait for its answer. Raises OSError or EOFError where the process has ended, and
        StandsStill where it does nothing."""
        return await while_it_works(self._exchange(payload), self._watch)

    async def _exchange(self, payload: bytes) -> dict[str, Any]:
        self._writer.write(HEADER.pack(len(payload)) + payload)
        await self._writer.drain()
        (size,) = HEADER.unpack(await self._reader.readexactly(HEADER.size))
        answer: dict[str, Any] = msgspec.json.decode(await self._reader.readexactly(size))
        return answer

    def close(self) -> None:
        """End the process."""
        # one that is stopped would not see that its socket is closed
        self._watch.kill()
        with contextlib.suppress(RuntimeError):  # the loop may be closed already
            self._writer.close()
