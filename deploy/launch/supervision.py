"""The decisions of a server's supervisor: an event comes in, an action goes out. Pure; supervisor.py carries it out.

A start that fails because the machine is too busy for one of Ray's time limits is tried again. A signal, the end of the
main process, and the death of a process that Ray cannot do without end a server for good.
"""

from __future__ import annotations

import signal
from dataclasses import dataclass, field
from enum import Enum, auto

ATTEMPTS = 3
"""Largest number of starts that are tried."""
TRY_AGAIN = 75
"""Exit code of a main process whose start failed for a reason that may pass (EX_TEMPFAIL)."""
ANSWER_S = 15.0
"""Seconds after which a main process that was asked to stop, and has not begun to, counts as hung."""
SILENCE_S = 20.0
"""Seconds without a line from a starting server after which the supervisor says what is waited for."""


class Phase(Enum):
    STARTING = auto()
    SERVING = auto()
    STOPPING = auto()


@dataclass(frozen=True, slots=True, kw_only=True)
class Wait:
    """Do nothing now, except print `say`."""

    say: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class AskToStop:
    """Ask the main process to end in good order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StartAgain:
    """Kill all processes of the server, and start the main process again."""

    say: str


@dataclass(frozen=True, slots=True, kw_only=True)
class End:
    """Kill all processes of the server, and exit with this code."""

    code: int
    say: str = ""


Action = Wait | AskToStop | StartAgain | End
NOTHING = Wait()


@dataclass(slots=True, kw_only=True)
class Supervision:
    local: bool
    """Whether all processes are on this machine. Then a start can be broken off without leaving anything elsewhere."""
    stop_s: float
    """Most seconds that an orderly end may take."""
    phase: Phase = Phase.STARTING
    failure: str = ""
    """Why the start failed, as the main process has reported it."""
    _signals: int = field(default=0, init=False)
    _attempt: int = field(default=1, init=False)
    _stage: str = field(default="", init=False)
    _stage_since: float = field(default=0.0, init=False)
    _said_at: float = field(default=0.0, init=False)
    _stop_by: float | None = field(default=None, init=False)

    def reached(self, phase: Phase, now: float) -> None:
        """The main process reports its phase. No phase follows STOPPING."""
        if self.phase is not Phase.STOPPING:
            self.phase = phase
        if phase is Phase.STOPPING and self._stop_by is not None:
            self._stop_by = now + self.stop_s

    def stage(self, text: str, now: float) -> None:
        """The main process reports what it waits for; it has shown the user this text."""
        if text != self._stage:
            self._stage, self._stage_since = text, now
        self._said_at = now

    def signalled(self, number: int, now: float) -> Action:
        """A signal has come. The first one ends the server in good order, the second one at once."""
        self._signals += 1
        if self._signals > 1:
            return End(code=128 + number)
        if self.phase is Phase.STARTING and self.local:
            return End(code=0, say="stopping")
        self._stop_by = now + ANSWER_S
        self.phase = Phase.STOPPING
        return AskToStop()

    def abandoned(self, now: float) -> Action:
        """The command that the user started has ended."""
        if self.local:
            return End(code=1)
        return NOTHING if self._signals else self.signalled(signal.SIGTERM, now)

    def main_ended(self, status: int, words: str = "") -> Action:
        """The main process has ended.

        `status` is an exit code, or a negative signal number. `words` is the last line that it has written, if any.
        """
        if self._signals:
            return End(code=status if status in (0, 2) else 1)
        if status == TRY_AGAIN:
            return self._start_again(self.failure) if self.local else End(code=1, say=f"emoe: error: {self.failure}")
        if self.phase is Phase.STOPPING and status >= 0:
            # the main process has printed the reason itself
            return End(code=status)
        how = f"was ended by {_signal_name(-status)}" if status < 0 else f"has ended with code {status}"
        what = f"the server's main process {how}{f': {words}' if words else ''}"
        if self.phase is Phase.STARTING and self.local and status != -signal.SIGKILL:
            return self._start_again(what)
        return End(code=1, say=f"emoe: error: {what}")

    def part_died(self, name: str, pid: int) -> Action:
        """A process that Ray cannot do without has ended."""
        if self.phase is Phase.STOPPING:
            return NOTHING
        what = f"{name} (process {pid}) has ended"
        if self.phase is Phase.STARTING:
            return self._start_again(what)
        return End(code=1, say=f"emoe: error: {what}; the server cannot go on without it")

    def tick(self, now: float, load: float) -> Action:
        """Time has passed. `load` is the number of runnable processes per core."""
        if self._stop_by is not None:
            if now > self._stop_by:
                return End(code=1, say="emoe: error: the server did not end in good order, and was killed")
            return NOTHING
        # the checks before the first stage are quick, and answer a mistake of the user's with one line
        if self.phase is not Phase.STARTING or not self._stage or now - self._said_at < SILENCE_S:
            return NOTHING
        self._said_at = now
        waited = f"still {self._stage}, for {now - self._stage_since:.0f} s"
        return Wait(say=f"{waited}; the machine is busy: {load:.0f} processes per core" if load > 2 else waited)

    def _start_again(self, why: str) -> Action:
        if self._attempt >= ATTEMPTS:
            return End(code=1, say=f"emoe: error: {why} ({ATTEMPTS} starts were tried)")
        self._attempt += 1
        self.phase, self.failure = Phase.STARTING, ""
        return StartAgain(say=f"{why}; starting again ({self._attempt} of {ATTEMPTS})")


def _signal_name(number: int) -> str:
    return signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"
