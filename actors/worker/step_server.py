"""A worker's end of the step channel: a thread that carries out the engine's messages one after another.

One thread is all it takes. While it computes, the next plan waits in the socket, so that steps that are sent ahead
follow each other without a pause; and what must get through meanwhile (signs of life, aborts) comes by Ray.

A second thread sleeps unless somebody connects (actors/remote/door.py). An engine that is let in takes the place of the
one before, which may hang.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
from collections.abc import Callable
from typing import Protocol

from elastic_moe.actors.remote.calls import one_line
from elastic_moe.actors.remote.codec import Message, WireError, encode, keep_alive, receive
from elastic_moe.actors.remote.door import Door, shut
from elastic_moe.cluster.errors import StepAborted
from elastic_moe.cluster.messages.epochs import Epoch
from elastic_moe.cluster.messages.steps import CommitEpoch, Done, Failed, ForgetSequences, StepPlan, StepResult

logger = logging.getLogger(__name__)


class Steps(Protocol):
    """Runs the steps: model/worker/worker.py."""

    def step(self, plan: StepPlan) -> StepResult: ...

    def commit(self, epoch: Epoch) -> None: ...

    def forget_sequences(self) -> None: ...


class StepServer:
    """Listens from its making on; serves one engine at a time, the one that came last."""

    def __init__(self, worker: Steps, address: str) -> None:
        self._worker = worker
        self.free = threading.Event()
        """Whether nothing is being done at this moment."""
        self.free.set()
        self._door = Door(address, self._admit)
        self.endpoint = self._door.endpoint
        self._changed = threading.Condition()
        """Guards what follows."""
        self._next: socket.socket | None = None
        self._current: socket.socket | None = None
        self._closed = False
        _start("steps", self._run)
        _start("step door", self._door.run)

    def close(self) -> None:
        """Hang up, and take no more engines."""
        with self._changed:
            self._closed = True
            self._hang_up()
            self._changed.notify()
        self._door.close()

    def _admit(self, connection: socket.socket) -> None:
        with self._changed:
            self._hang_up()
            if self._closed:
                connection.close()
            else:
                self._next = connection
            self._changed.notify()

    def _hang_up(self) -> None:
        if self._next is not None:
            self._next.close()
            self._next = None
        if self._current is not None:
            # closed by the thread of the steps, which wakes up by this
            shut(self._current)

    def _run(self) -> None:
        while (connection := self._take()) is not None:
            try:
                self._serve(connection)
            except OSError as error:
                logger.info("the engine's connection has ended: %s", error)
            finally:
                with self._changed:
                    self._current = None
                    connection.close()

    def _take(self) -> socket.socket | None:
        """The next engine's connection. Blocks. None once this is closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._next is not None)
            self._current, self._next = self._next, None
            return self._current

    def _serve(self, connection: socket.socket) -> None:
        """Returns when the engine has hung up. Raises OSError, WireError for a message that no engine sends."""
        keep_alive(connection)
        while (message := receive(connection)) is not None:
            self.free.clear()
            try:
                answer = self._obey(message)
            finally:
                self.free.set()
            connection.sendall(encode(answer))

    def _obey(self, message: Message) -> Message:
        if not isinstance(message, StepPlan | CommitEpoch | ForgetSequences):
            raise WireError(f"a worker does not take a {type(message).__name__}")
        try:
            if isinstance(message, StepPlan):
                return self._worker.step(message)
            if isinstance(message, CommitEpoch):
                self._worker.commit(message.epoch)
            else:
                self._worker.forget_sequences()
        except Exception as error:  # noqa: BLE001 - any error is reported to the engine
            return Failed(reason=one_line(error), aborted=isinstance(error, StepAborted))
        return Done()


def _start(name: str, work: Callable[[], None]) -> None:
    def run() -> None:
        try:
            work()
        except BaseException:
            # a worker without this thread would make its peers wait for ever
            logger.critical("the thread %r failed", name, exc_info=True)
            os._exit(1)

    threading.Thread(target=run, name=name, daemon=True).start()
