"""Ends the waits of a group that has failed, and frees its memory when nobody uses it any more."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence

import psutil

from elastic_moe.cluster.errors import StepAborted
from elastic_moe.model.shared_gpu.memory import Mapped
from elastic_moe.model.shared_gpu.signals import Signals, Silence

logger = logging.getLogger(__name__)

_LOOK_S = 0.02
"""Seconds between two looks of the thread that watches."""


class Watch:
    """Ends the waits of a group that has failed, and frees its memory when nobody uses it any more."""

    def __init__(
        self, mapped: Mapped, signals: Signals, names: Sequence[str], pids: Sequence[int], timeout_s: float
    ) -> None:
        self.launched = 0
        """The number of the last exchange."""
        self.failure: str | None = None
        self._mapped = mapped
        self._signals = signals
        self._names = names
        self._pids = pids
        self._timeout_s = timeout_s
        self._done: Callable[[], bool] | None = None
        """Set when the transport is closed: whether the stream has done all exchanges."""
        self._failing = threading.Lock()
        self._ended = threading.Event()
        threading.Thread(target=self._run, name="device-exchange", daemon=True).start()

    def fail(self, reason: str) -> None:
        """Abort the group, on this rank and on the others."""
        with self._failing:
            if self.failure is None:
                self._signals.tell_aborted()
                self.failure = reason
        self._signals.release(self.launched)

    def check(self) -> None:
        """Raises StepAborted if this rank or another has aborted."""
        if self.failure is None:
            aborted = self._signals.aborted_peers()
            if aborted:
                self.fail(f"{self._say(aborted)} has aborted the exchange")
        if self.failure is not None:
            raise StepAborted(self.failure)

    def close(self, done: Callable[[], bool]) -> None:
        """Free everything when the stream has `done` all exchanges."""
        self._done = self._done or done

    def wait_end(self, timeout_s: float) -> bool:
        """Wait until all is freed, for tests."""
        return self._ended.wait(timeout_s)

    def _run(self) -> None:
        silence = Silence(time.monotonic())
        try:
            self._mapped.device.attach()
            while not self._look(silence):
                time.sleep(_LOOK_S)
            self._ended.set()
        except RuntimeError as error:
            # the device has failed as a whole: the steps fail too, and only the process's end frees its memory
            self.fail(f"the device has failed: {error}")
            logger.warning("the exchange of a shared GPU has ended: %s", error)

    def _look(self, silence: Silence) -> bool:
        """Returns whether everything is freed."""
        if self.failure is None:
            aborted = self._signals.aborted_peers()
            silent_s = silence.lasts_s(self.launched, self._signals.arrived(), time.monotonic())
            if aborted:
                self.fail(f"{self._say(aborted)} has aborted the exchange")
            elif silent_s > self._timeout_s:
                late = [
                    peer
                    for peer in range(len(self._names))
                    if peer in self._mapped.peers and not self._signals.has_arrived(peer, self.launched)
                ]
                self.fail(f"{self._say(late)} has not answered for {self._timeout_s:g} s")
        else:
            self._signals.release(self.launched)
        return self._done is not None and self._done() and self._free()

    def _free(self) -> bool:
        if self._mapped.peers:
            self._mapped.close_peers()
            self._signals.tell_closed()
        if any(_lives(self._pids[peer]) for peer in self._signals.open_peers()):
            return False
        self._mapped.free()
        return True

    def _say(self, peers: Sequence[int]) -> str:
        return ", ".join(self._names[peer] for peer in peers)


def _lives(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
