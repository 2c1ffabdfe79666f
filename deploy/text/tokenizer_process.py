"""A process that has the tokenizer and the chat template, and forks workers that use them within limits.

    TokenizerProcess (the API)  --control socket-->  main(): loads, tries, then forks a worker for each socket it gets
    BoundedPrompts (the API)    --worker socket-->   a worker: one call at a time, each with its own limits

The kernel enforces the limits, so that they hold in the middle of a regular expression: an interval timer limits
processor time, and its signal ends the process; the size of the address space is limited too. A new worker is forked in
milliseconds. A process ends when the other side of its socket is closed, so no process outlives the API. One that is
stopped or blocked is found by who waits for it (actors/stillness.py), and ended.
"""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import os
import resource
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from elastic_moe.actors.stillness import TRIES, Watch, ended_if_still
from elastic_moe.cluster.errors import CheckpointError, ConfigError, RequestError, UserError
from elastic_moe.cluster.interpreter import command_of
from elastic_moe.deploy.text.conversation import MARK
from elastic_moe.deploy.text.grammar_check import GRAMMAR_S, GrammarCheck
from elastic_moe.deploy.text.tokenizer import Tokenizer, without_torch
from elastic_moe.model.grammars.vocabulary import tokenizer_json

logger = logging.getLogger(__name__)

HEADER = struct.Struct("!Q")
"""The size in bytes, which precedes every message on a worker's socket. The first thing that a worker sends is its
process's number in the same form."""

MIB = 1 << 20
CALL_S, CALL_S_PER_MIB = 2.0, 2.0
"""Seconds of processor time for one call, and for each MiB of its input."""
CALL_BYTES, CALL_BYTES_PER_BYTE = 1024 * MIB, 300
LOAD_S, LOAD_S_PER_MIB = 3.0, 2.0
"""Seconds of processor time for loading, and for each MiB of the tokenizer's files; converting some takes long."""
LOAD_BYTES, LOAD_BYTES_PER_BYTE = 2048 * MIB, 60

TRIED_TEXTS = tuple(piece * 200 + "!" for piece in ("a", "A", " ", "1", "\n", "-", "é", "ab ", "a1", " \n", "x.y,"))
"""Texts on which a regular expression that backtracks does not end."""


class TokenizerProcess:
    """The API's side of the process. Its methods block; use it from one thread at a time."""

    def __init__(self, model_dir: str, chat_template: str | None) -> None:
        self._model_dir = model_dir
        self._chat_template = chat_template
        self._start()

    def _start(self) -> None:
        self._control, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                command_of(main, str(theirs.fileno()), self._model_dir, self._chat_template or ""),
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )

    def wait(self) -> None:
        """Wait until the tokenizer is loaded and tried. Raises CheckpointError or ConfigError where it is unusable."""
        for left in reversed(range(TRIES)):
            with ended_if_still(self._process) as ended:
                try:
                    self._hear()
                    return
                except UserError:
                    if ended.why is None or not left:
                        raise
            logger.warning("the tokenizer's process is started again: %s", ended.why)
            self.close()
            self._start()

    def _hear(self) -> None:
        doing, kind = "the tokenizer's process does not start", "CheckpointError"
        with self._control.makefile("rb") as said:
            for line in said:
                news = json.loads(line)
                if news.get("ready"):
                    return
                if "error" in news:
                    raise _ERRORS[news["kind"]](news["error"])
                doing, kind = news["doing"], news["kind"]
        raise _ERRORS[kind](f"{self._chat_template if kind == 'ConfigError' else self._model_dir}: {doing}")

    def worker(self) -> socket.socket:
        """The socket of a new worker. Raises OSError where the process has ended."""
        if self._process.poll() is not None:
            raise BrokenPipeError
        ours, theirs = socket.socketpair()
        with theirs:
            socket.send_fds(self._control, [b"w"], [theirs.fileno()])
        return ours

    def again(self) -> TokenizerProcess:
        """Start another process like this one, and wait until it is ready."""
        process = TokenizerProcess(self._model_dir, self._chat_template)
        try:
            process.wait()
        except BaseException:
            process.close()
            raise
        return process

    def watch(self) -> Watch:
        """For whoever waits for a new worker to be forked."""
        return Watch(self._process.pid)

    def close(self) -> None:
        """End the process. Its workers go on until they are closed."""
        self._control.close()
        self._process.kill()
        self._process.wait()

    def __enter__(self) -> TokenizerProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


_ERRORS: dict[str, type[UserError]] = {"CheckpointError": CheckpointError, "ConfigError": ConfigError}


def call_s(payload_bytes: int) -> float:
    """Seconds of processor time for a call."""
    return _call_limits(payload_bytes)[0]


def limits_in_words(payload_bytes: int = 0) -> str:
    seconds, memory = _call_limits(payload_bytes)
    return f"{seconds:.0f} s of processor time and {memory / 2**30:.1f} GiB of memory"


# --- The process itself -----------------------------------------------------------------------------------------


def main() -> None:
    fd, model_dir, chat_template = sys.argv[1:]
    control = socket.socket(fileno=int(fd))
    # Ctrl-C is meant for the server, which then closes the sockets
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # the API has ended
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        tokenizer = _loaded(control, model_dir, chat_template or None)
        if tokenizer is not None:
            grammars = GrammarCheck(lambda: tokenizer_json(model_dir))
            with _bounds(*_load_limits(model_dir)) as limits:
                _say(control, kind="CheckpointError", doing=f"llguidance does not load the tokenizer within {limits}")
                grammars.load()
            _say(control, ready=True)
            gc.freeze()
            _fork_workers(control, tokenizer, grammars)


def _loaded(control: socket.socket, model_dir: str, chat_template: str | None) -> Tokenizer | None:
    """The tokenizer; None where it cannot be used, after the reason was sent to the other side."""
    try:
        without_torch()
        with _bounds(*_load_limits(model_dir)) as limits:
            _say(control, kind="CheckpointError", doing=f"the tokenizer cannot be loaded within {limits}")
            tokenizer = Tokenizer.load(model_dir, chat_template)
        with _bounds(*_call_limits(0)) as limits:
            if tokenizer.has_chat_template:
                kind = "ConfigError" if chat_template else "CheckpointError"
                doing = f"the chat template renders not even a short conversation within {limits}"
                _say(control, kind=kind, doing=doing)
                if chat_template:
                    _check_syntax(tokenizer, chat_template)
                tokenizer.template_forms  # noqa: B018 - found now, and kept
        with _bounds(*_call_limits(0)) as limits:
            _say(control, kind="CheckpointError", doing=f"the tokenizer encodes not even short texts within {limits}")
            for text in TRIED_TEXTS:
                tokenizer.decode(tokenizer.encode(text))
    except UserError as error:
        _say(control, kind=type(error).__name__, error=str(error))
    except MemoryError:
        return None  # the other side knows what was being tried
    except BaseException as error:  # noqa: BLE001 - what Rust panics with is no Exception
        _say(control, kind="CheckpointError", error=f"{model_dir}: the tokenizer cannot be used: {_one_line(error)}")
    else:
        return tokenizer
    return None


def _check_syntax(tokenizer: Tokenizer, chat_template: str) -> None:
    from jinja2 import TemplateSyntaxError

    try:
        tokenizer.render([{"role": "user", "content": MARK}])
    except TemplateSyntaxError as error:
        raise ConfigError(f"chat_template: {chat_template}: line {error.lineno}: {error.message}") from None
    except Exception:  # noqa: BLE001 - it may refuse this conversation and take others
        return


def _fork_workers(control: socket.socket, tokenizer: Tokenizer, grammars: GrammarCheck) -> None:
    while True:
        data, fds, *_ = socket.recv_fds(control, 1, 1)
        if not data:
            return
        for fd in fds:
            if os.fork() == 0:
                control.close()
                with contextlib.suppress(OSError, EOFError), socket.socket(fileno=fd) as api:
                    _serve(api, _methods(tokenizer, grammars))
                os._exit(0)
            os.close(fd)


Method = Callable[..., object]


def _methods(tokenizer: Tokenizer, grammars: GrammarCheck) -> dict[str, Method]:
    def fault_of_grammar(kind: str, text: str) -> str | None:
        # less than other calls may take
        signal.setitimer(signal.ITIMER_PROF, GRAMMAR_S)
        return grammars.fault(kind, text)

    return {
        "encode": tokenizer.encode,
        "render_chat": tokenizer.render_chat,
        "fault_of_grammar": fault_of_grammar,
    }


def _serve(api: socket.socket, methods: dict[str, Method]) -> None:
    # so that the other side can look at this process, and end it
    api.sendall(HEADER.pack(os.getpid()))
    with api.makefile("rb") as requests:
        while header := requests.read(HEADER.size):
            (size,) = HEADER.unpack(header)
            with _bounds(*_call_limits(size)):
                answer = _answer(methods, requests.read(size))
            api.sendall(HEADER.pack(len(answer)) + answer)


def _answer(methods: dict[str, Method], payload: bytes) -> bytes:
    try:
        method, arguments = json.loads(payload)
        answer: dict[str, Any] = {"value": methods[method](**arguments)}
    except RequestError as error:
        answer = {"refused": {"message": str(error), "param": error.param, "code": error.code}}
    except MemoryError:
        # this process would keep the memory, so it ends as it does at the limit of processor time
        os._exit(1)
    except BaseException as error:  # noqa: BLE001 - what Rust panics with is no Exception
        answer = {"failed": _one_line(error)}
    return json.dumps(answer, ensure_ascii=False, separators=(",", ":")).encode("utf-8", errors="replace")


@contextlib.contextmanager
def _bounds(seconds: float, memory_bytes: int) -> Iterator[str]:
    """Limit what the block may use, and yield the limits in words.

    At the limit of time the process dies; at the limit of memory it gets a MemoryError, or aborts.
    """
    _limit_memory(memory_bytes)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield f"{seconds:.0f} s of processor time and {memory_bytes / 2**30:.1f} GiB of memory"
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        _limit_memory(None)


def _limit_memory(more_bytes: int | None) -> None:
    """Limit the address space to its present size and `more_bytes`; None lifts the limit.

    Sets no limit where the system does not report the present size.
    """
    statm = Path("/proc/self/statm")
    if more_bytes is None or not statm.exists():
        limit = resource.RLIM_INFINITY
    else:
        limit = int(statm.read_text().split()[0]) * resource.getpagesize() + more_bytes
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    if hard != resource.RLIM_INFINITY:
        limit = hard if limit == resource.RLIM_INFINITY else min(limit, hard)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))


def _call_limits(payload_bytes: int) -> tuple[float, int]:
    seconds = CALL_S + CALL_S_PER_MIB * payload_bytes / MIB
    return seconds, CALL_BYTES + CALL_BYTES_PER_BYTE * payload_bytes


def _load_limits(model_dir: str) -> tuple[float, int]:
    size = sum(file.stat().st_size for file in Path(model_dir).glob("*token*") if file.is_file())
    return LOAD_S + LOAD_S_PER_MIB * size / MIB, LOAD_BYTES + LOAD_BYTES_PER_BYTE * size


def _say(control: socket.socket, **news: object) -> None:
    control.sendall(json.dumps(news).encode() + b"\n")


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
