"""The three processes of `emoe serve`: the command, its supervisor, and the server's main process below that.

The supervisor is the ancestor of all processes of a server, and does not import Ray. It notices when the command, the
main process or a part of Ray has ended, and kills the rest. If the supervisor itself is killed, the main process dies
with it, and the command kills the rest. So no single `kill -9` leaves a process behind.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import time
import warnings
from collections.abc import Callable
from types import FrameType, NoneType

import psutil

from elastic_moe.deploy.launch.process_tree import adopt_orphans, die_with_parent, end_descendants, lives, reap
from elastic_moe.deploy.launch.supervision import Action, AskToStop, End, Phase, StartAgain, Supervision, Wait

POLL_S = 1.0
"""Seconds between two looks at the parts of Ray. Signals and the end of the main process wake the supervisor."""


class Report:
    """The main process's reports to its supervisor: one line through a pipe for each."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def phase(self, phase: Phase) -> None:
        self._tell("phase", phase.name)

    def stage(self, text: str) -> None:
        """Report what the start waits for; the user has seen this text."""
        self._tell("stage", text)

    def part(self, name: str, pid: int) -> None:
        """Report a process whose end is the end of the server."""
        self._tell("part", f"{pid} {name}")

    def failure(self, reason: str) -> None:
        """Report why the start failed. Call this before the exit with TRY_AGAIN."""
        self._tell("failure", reason)

    def _tell(self, kind: str, value: str) -> None:
        # if the supervisor has ended, this process ends too
        with contextlib.suppress(OSError):
            os.write(self._descriptor, f"{kind}\t{' '.join(value.split())}\n".encode())


Main = Callable[[Report], int]


def supervised(
    main: Main,
    *,
    local: bool,
    stop_s: float,
    clean_up: Callable[[], None],
    last_words: Callable[[], str] = str,
) -> int:
    """Run `main` below a supervisor, each in a process of its own. Blocks; returns the exit code of the command.

    SIGINT, SIGTERM and SIGHUP are passed to the supervisor; when it has ended, they are ignored. `clean_up` is called
    when no process of the server is left. `last_words` returns a line that may say why the main process crashed.
    """
    adopt_orphans()
    # `nohup` sets SIGHUP to be ignored, and that must stay. A shell's `&` does the same with SIGINT, but `kill -INT`
    # must still end the server
    ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    taken = [signal.SIGINT, signal.SIGTERM] + [signal.SIGHUP] * (not ignored)
    orders, give = os.pipe()
    _flush()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, taken)
    supervisor = _fork()
    if supervisor == 0:
        os.close(give)
        # away from the terminal's foreground, so that each signal comes once, from the command
        os.setsid()
        for number in taken:
            signal.signal(number, lambda *_: None)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        _leave(lambda: _Supervisor(main, orders, Supervision(local=local, stop_s=stop_s), clean_up, last_words).run())
    os.close(orders)

    def pass_on(number: int, _: FrameType | None) -> None:
        with contextlib.suppress(OSError):
            os.write(give, bytes([number]))

    for number in taken:
        signal.signal(number, pass_on)
    signal.pthread_sigmask(signal.SIG_SETMASK, before)
    _, status = os.waitpid(supervisor, 0)
    # the server has ended: another signal must not change the exit code
    for number in taken:
        signal.signal(number, signal.SIG_IGN)
    os.close(give)
    code = os.waitstatus_to_exitcode(status)
    # processes are left only where the supervisor was killed
    end_descendants()
    clean_up()
    if code < 0:
        _say(f"emoe: error: the server's supervisor was ended by signal {-code}")
        return 1
    return code


class _Supervisor:
    """The shell around `Supervision`: descriptors, processes and the clock."""

    def __init__(
        self,
        main: Main,
        orders: int,
        rules: Supervision,
        clean_up: Callable[[], None],
        last_words: Callable[[], str],
    ) -> None:
        self._main = main
        self._orders = orders
        self._abandoned = False
        self._rules = rules
        self._clean_up = clean_up
        self._last_words = last_words
        self._server = 0
        self._reports = -1
        self._rest = b""
        self._parts: dict[str, tuple[int, psutil.Process | None]] = {}
        self._ended: dict[int, int] = {}

    def run(self) -> int:
        """Run until no process of the server is left. Returns the exit code."""
        adopt_orphans()
        self._start()
        while True:
            for action in self._events():
                if isinstance(action, End):
                    left = end_descendants()
                    self._clean_up()
                    _say(action.say)
                    if left:
                        _say(f"emoe: error: processes that could not be killed: {', '.join(map(str, left))}")
                    return action.code
                self._do(action)
                if isinstance(action, StartAgain):
                    break

    def _do(self, action: Action) -> None:
        match action:
            case Wait(say=text):
                _say(text)
            case AskToStop():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(self._server, signal.SIGTERM)
            case StartAgain(say=text):
                end_descendants()
                os.close(self._reports)
                _say(text)
                self._start()

    def _start(self) -> None:
        self._parts.clear()
        self._ended.clear()
        self._rest = b""
        self._reports, tell = os.pipe()
        _flush()
        supervisor = os.getpid()
        self._server = _fork()
        if self._server == 0:
            die_with_parent(supervisor)
            os.close(self._orders)
            os.close(self._reports)
            _leave(lambda: self._main(Report(tell)))
        os.close(tell)

    def _events(self) -> list[Action]:
        """The actions that follow from the events since the last call; waits up to POLL_S for an event."""
        listened = [self._reports] if self._abandoned else [self._orders, self._reports]
        readable, _, _ = select.select(listened, [], [], POLL_S)
        now = time.monotonic()
        actions: list[Action] = []
        # reports come first, because a signal means something else to a server that has reported that it serves
        if self._reports in readable:
            self._hear(now)
        if self._orders in readable:
            orders = os.read(self._orders, 64)
            actions += [self._rules.signalled(number, now) for number in orders]
            if not orders:
                self._abandoned = True
                actions.append(self._rules.abandoned(now))
        self._ended |= reap()
        if self._server in self._ended:
            while self._hear(now):
                pass
            status = os.waitstatus_to_exitcode(self._ended[self._server])
            return [*actions, self._rules.main_ended(status, self._last_words())]
        if not _lives(self._server):
            # it is about to be reaped; the parts that die with it are not the reason
            return actions
        for name, (pid, part) in list(self._parts.items()):
            if part is None or not lives(part):
                del self._parts[name]
                actions.append(self._rules.part_died(name, pid))
        return [*actions, self._rules.tick(now, os.getloadavg()[0] / (os.cpu_count() or 1))]

    def _hear(self, now: float) -> bool:
        """Read the reports of the main process. Returns whether there were any."""
        data = os.read(self._reports, 65536) if select.select([self._reports], [], [], 0)[0] else b""
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            kind, _, value = line.decode(errors="replace").partition("\t")
            if kind == "phase":
                self._rules.reached(Phase[value], now)
            elif kind == "stage":
                self._rules.stage(value, now)
            elif kind == "failure":
                self._rules.failure = value
            elif kind == "part":
                self._watch(value)
        return bool(data)

    def _watch(self, value: str) -> None:
        pid, _, name = value.partition(" ")
        part = None
        with contextlib.suppress(psutil.NoSuchProcess):
            part = psutil.Process(int(pid))
        self._parts[name] = int(pid), part


def _lives(pid: int) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return lives(psutil.Process(pid))
    return False


def _fork() -> int:
    with warnings.catch_warnings():
        # Python warns of numpy's threads; this process does not use them, and numpy mends them after a fork
        warnings.simplefilter("ignore", DeprecationWarning)
        return os.fork()


def _leave(work: Callable[[], int]) -> None:
    """End this forked process with the exit code that `work` returns, without unwinding the parent's stack."""
    code = 1
    try:
        code = work()
    finally:
        if not isinstance(sys.exc_info()[1], (SystemExit, NoneType)):
            sys.excepthook(*sys.exc_info())
        _flush()
        os._exit(code)


def _say(text: str) -> None:
    if text:
        start = "\r\033[K" if sys.stderr.isatty() else ""
        with contextlib.suppress(OSError, ValueError):
            sys.stderr.write(f"{start}{text}\n")
            sys.stderr.flush()


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
