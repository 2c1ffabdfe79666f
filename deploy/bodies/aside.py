"""Helper processes of the API for work that would hold up every stream: large bodies, and texts of many tokens.

To decode some MB of JSON, validate it and turn it into tokens holds Python's lock for seconds, and takes hundreds of
MB. A helper process does this for one request after another, so memory has a bound, and the system gets it back when
the process is replaced. The process is started when it is first needed, runs at a lower priority, and ends with its
parent, whose pipe it reads. There are two such processes, one of them for huge requests.

    Aside.call() -> a thread that waits -> pipe -> serve() -> pipe -> the result, or the error that was raised
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import pickle
import resource
import struct
import subprocess
import sys
import threading
import time
from array import array
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import IO, Any, TypeVar

from elastic_moe.actors.stillness import TRIES, StandsStill, ended_if_still
from elastic_moe.cluster.errors import NotReadyError, RequestError
from elastic_moe.cluster.interpreter import command_of
from elastic_moe.deploy.bodies import json_text

logger = logging.getLogger(__name__)

T = TypeVar("T")

NICENESS = 10
MEMORY_BYTES = 4 * 2**30
"""Limit of the address space. A request that needs more fails, and the machine does not run out of memory."""
GROWTH_BYTES = 256 * 2**20
"""Growth after which a process is replaced."""
HUGE_BYTES = 2**20
CALL_S = 120.0
"""Seconds of processor time after which a call is ended together with its process."""
LOOK_S = 0.5
PIECE_BYTES = 2**17
"""Token ids are read in pieces of this size: to copy millions at once holds Python's lock for long."""

_HEAD = struct.Struct("<QQ")
"""Before a message: its size in bytes, and how many buffers come after it."""
_SIZE = struct.Struct("<Q")
"""Before a buffer."""


class Aside:
    """The parent's side of the two processes: one for large and one for huge requests, so that a client with huge texts
    does not hold up the others. Each runs one call after another. It belongs to no event loop."""

    def __init__(self) -> None:
        self._large = _Lane()
        self._huge = _Lane()

    def use_tokenizer(self, written: Callable[[], str]) -> None:
        """`written` returns the tokenizer as JSON. Call this before `encode` and `decode`."""
        self._large.tokenizer = self._huge.tokenizer = written

    async def parse(self, kind: type[T] | None, body: bytearray) -> T:
        """The JSON text as a validated body of `kind`, or as plain values for None. Raises RequestError."""
        parsed: T = await self._lane(len(body)).call("parse", kind, body)
        return parsed

    async def encode(self, text: str, *, add_special_tokens: bool) -> array[int]:
        """Token ids, packed as `deploy.bodies.bounds.TokenIds`."""
        ids: array[int] = await self._lane(len(text)).call("encode", text, add_special_tokens)
        return ids

    async def decode(self, token_ids: array[int]) -> str:
        return str(await self._lane(4 * len(token_ids)).call("decode", token_ids))

    def close(self) -> None:
        """End the processes. Blocks for a moment."""
        self._large.close()
        self._huge.close()

    def _lane(self, size_bytes: int) -> _Lane:
        return self._large if size_bytes < HUGE_BYTES else self._huge


class _Lane:
    """One process, and the thread that talks to it."""

    def __init__(self) -> None:
        self.tokenizer: Callable[[], str] | None = None
        self.process: subprocess.Popen[bytes] | None = None
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="aside")
        self._knows_tokenizer = False
        self._closed = False

    async def call(self, name: str, *args: object) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._answer, name, *args)

    def close(self) -> None:
        self._closed = True
        self._thread.shutdown(wait=False, cancel_futures=True)
        if self.process is not None:
            self.process.kill()
            self._thread.shutdown(wait=True)
            self._end()

    # --- In the thread ------------------------------------------------------------------------------------------

    def _answer(self, name: str, *args: object) -> Any:
        """What the call returns or raises. A process that stands still is replaced, and the call repeated; so is one
        that dies, but once, since the call may be the cause."""
        deaths = stills = 0
        while not self._closed:
            try:
                if name != "parse" and not self._knows_tokenizer:
                    assert self.tokenizer is not None
                    self._ask("use", self.tokenizer())
                    self._knows_tokenizer = True
                return self._ask(name, *args)
            except StandsStill as why:
                stills += 1
                logger.warning("the process for large requests is replaced: %s", why)
                if stills == TRIES:
                    raise NotReadyError(f"the processes for large requests stand still, the last one: {why}") from None
            except TimeoutError:
                break
            except EOFError:
                deaths += 1
                logger.warning("the process for large requests has died; another one is started")
                if deaths > 1:
                    break
        raise RequestError("the request takes too much memory or time to be read", code="request_too_large")

    def _ask(self, name: str, *args: object) -> Any:
        """Raises StandsStill, TimeoutError or EOFError where the process has ended without an answer, and why."""
        process = self.process = self.process or _start()
        assert process.stdin is not None
        assert process.stdout is not None
        answer = None
        # it may end in the middle of an answer
        broken = contextlib.suppress(OSError, EOFError, struct.error, pickle.UnpicklingError)
        with ended_if_still(process, processor_s=CALL_S) as ended, broken:
            _write(process.stdin, (name, *args))
            answer = _read(process.stdout)
        if answer is None:
            self._end()
            raise ended.why or EOFError
        value, error, last = answer
        if last:
            self._end()
        if error is not None:
            raise error
        return value

    def _end(self) -> None:
        process, self.process, self._knows_tokenizer = self.process, None, False
        if process is not None:
            process.kill()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    try:
                        pipe.close()
                    except OSError:
                        logger.debug("a pipe was broken already")
            process.wait()


def _start() -> subprocess.Popen[bytes]:
    command = command_of(main)
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)


# --- In the process ---------------------------------------------------------------------------------------------


def main() -> None:
    """Answer calls from standard input until it ends."""
    os.nice(NICENESS)
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    # what a library prints must not mix with the answers
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    serve(sys.stdin.buffer, answers)


def _end_with(parent: int) -> None:
    """End this process when its parent is killed."""
    while os.getppid() == parent:
        time.sleep(LOOK_S)
    os._exit(1)


def serve(calls: IO[bytes], answers: IO[bytes]) -> None:
    """Read (name, arguments) from `calls`, and write (value, error, whether this process ends now) to `answers`."""
    work = _Work()
    allowed_bytes = _used_bytes() + GROWTH_BYTES
    while (call := _read(calls)) is not None:
        name, *args = call
        value, error = None, None
        try:
            value = getattr(work, name)(*args)
        except RequestError as refused:
            error = refused
        except MemoryError:
            error = RequestError("the request takes too much memory to be read", code="request_too_large")
        if name == "use":
            allowed_bytes = _used_bytes() + GROWTH_BYTES
        last = _used_bytes() > allowed_bytes
        try:
            _write(answers, (value, error, last))
        except BrokenPipeError:
            return
        if last:
            return
        del call, args, value


class _Work:
    def __init__(self) -> None:
        self._tokenizer: Any = None

    def use(self, tokenizer: str) -> None:
        from tokenizers import Tokenizer

        self._tokenizer = Tokenizer.from_str(tokenizer)

    def parse(self, kind: Any, body: bytearray) -> object:
        from elastic_moe.deploy.bodies.schema import parse

        data = json_text.decode(body)
        return data if kind is None else parse(kind, data)

    def encode(self, text: str, add_special_tokens: bool) -> pickle.PickleBuffer:
        # "fast" leaves out the position of each token in the text, which takes as long as everything else
        (encoding,) = self._tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        return pickle.PickleBuffer(array("i", encoding.ids))

    def decode(self, token_ids: array[int]) -> str:
        return str(self._tokenizer.decode(token_ids.tolist(), skip_special_tokens=False))


def _used_bytes() -> int:
    """The largest memory use of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _write(pipe: IO[bytes], message: object) -> None:
    """The pickled message, and after it the token ids that it holds as PickleBuffers."""
    buffers: list[pickle.PickleBuffer] = []
    data = pickle.dumps(message, protocol=5, buffer_callback=buffers.append)
    pipe.write(_HEAD.pack(len(data), len(buffers)))
    pipe.write(data)
    for buffer in buffers:
        with buffer.raw() as raw:
            pipe.write(_SIZE.pack(raw.nbytes))
            pipe.write(raw)
    pipe.flush()


def _read(pipe: IO[bytes]) -> Any:
    """The next message; None at the end. It comes from our own process, so pickle is safe."""
    head = pipe.read(_HEAD.size)
    if len(head) < _HEAD.size:
        return None
    size, buffers = _HEAD.unpack(head)
    data = pipe.read(size)
    return pickle.loads(data, buffers=[_read_ids(pipe) for _ in range(buffers)])


def _read_ids(pipe: IO[bytes]) -> array[int]:
    """Raises EOFError where the pipe ends too early."""
    (left,) = _SIZE.unpack(pipe.read(_SIZE.size))
    ids = array("i")
    while left:
        piece = pipe.read(min(left, PIECE_BYTES))
        if not piece:
            raise EOFError
        ids.frombytes(piece)
        left -= len(piece)
    return ids
