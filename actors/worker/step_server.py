"""A worker's end of the step channel: a thread that carries out the engine's messages one after another.

While the thread computes, the next plan waits in the socket, so that steps which are sent ahead follow each other
without a pause. Signs of life and aborts must not wait, so they come as Ray calls.

A second thread lets engines in (actors/remote/door.py), and sleeps otherwise. A new engine takes the place of the one
before it, which may hang.
"""

from __future__ import annotations

import logging
import os
import select
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

REST_S = 0.5
"""Seconds without a message after which a worker that has run steps rests."""


class Steps(Protocol):
    """The methods of model/worker/data_plane.py that the engine's messages call."""

    def step(self, plan: StepPlan) -> StepResult: ...

    def commit(self, epoch: Epoch) -> None: ...

    def forget_sequences(self) -> None: ...

    def rest(self) -> None: ...


class StepServer:
    """Listens from its creation on, and serves one engine at a time: the one that connected last."""

    def __init__(self, worker: Steps, address: str) -> None:
        self._worker = worker
        self.free = threading.Event()
        """Set while the thread of the steps has nothing to do."""
        self.free.set()
        self._door = Door(address, self._admit)
        self.endpoint = self._door.endpoint
        self._changed = threading.Condition()
        """Guards the three fields below."""
        self._next: socket.socket | None = None
        self._current: socket.socket | None = None
        self._closed = False
        _start("steps", self._run)
        _start("step door", self._door.run)

    def close(self) -> None:
        """End the engine's connection, and accept no other."""
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
            # this wakes the thread of the steps, which closes the connection
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
        """Blocks until an engine has connected. Returns its connection; None after `close`."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._next is not None)
            self._current, self._next = self._next, None
            return self._current

    def _serve(self, connection: socket.socket) -> None:
        """Returns when the engine has hung up. Raises OSError, WireError for a message that no engine sends."""
        keep_alive(connection)
        messages = select.poll()
        messages.register(connection, select.POLLIN)
        tired = False
        while True:
            if tired and not messages.poll(1e3 * REST_S):
                self._worker.rest()
                tired = False
            if (message := receive(connection)) is None:
                return
            tired = tired or isinstance(message, StepPlan)
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
