"""A host's end of the step channel: a thread that does what the engine says, one message after another.

One thread is all it takes. While it computes, the next plan waits in the socket, so that steps that are sent ahead
follow each other without a pause; and what must get through meanwhile (signs of life, aborts) comes by Ray.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
from typing import Protocol

from actors.calls import one_line
from actors.liveness import TOKEN_S
from actors.wire import TOKEN_BYTES, Message, encode, keep_alive, new_token, opens, receive, receive_exactly
from cluster.errors import StepAborted
from cluster.protocol import CommitEpoch, Done, Endpoint, Epoch, Failed, ForgetSequences, StepPlan, StepResult

logger = logging.getLogger(__name__)


class Steps(Protocol):
    """Who runs them: model/worker.py."""

    def step(self, plan: StepPlan) -> StepResult: ...

    def commit(self, epoch: Epoch) -> None: ...

    def forget_sequences(self) -> None: ...


class StepServer:
    """Listens from its making on; serves one engine at a time, the next when the connection of the last has ended."""

    def __init__(self, worker: Steps, address: str) -> None:
        self._worker = worker
        self.free = threading.Event()
        """Whether nothing is being done at this moment."""
        self.free.set()
        self._listener = socket.create_server((address, 0), family=_family(address))
        self.endpoint = Endpoint(address=address, port=self._listener.getsockname()[1], token=new_token())
        self._connection: socket.socket | None = None
        self._closed = False
        threading.Thread(target=self._run, name="steps", daemon=True).start()

    def close(self) -> None:
        """Hang up, and take no more engines."""
        self._closed = True
        for end in (self._listener, self._connection):
            if end is not None:
                with contextlib.suppress(OSError):  # it is not connected any more
                    end.shutdown(socket.SHUT_RDWR)

    def _run(self) -> None:
        try:
            with self._listener:
                while not self._closed:
                    self._accept()
        except BaseException:
            # a host without this thread would hang its group
            logger.critical("the step thread failed", exc_info=True)
            os._exit(1)

    def _accept(self) -> None:
        try:
            self._connection, _ = self._listener.accept()
        except OSError:
            if self._closed:
                return
            raise
        with self._connection:
            self._serve(self._connection)

    def _serve(self, connection: socket.socket) -> None:
        try:
            keep_alive(connection)
            connection.settimeout(TOKEN_S)
            shown = receive_exactly(connection, TOKEN_BYTES)
            if shown is None or not opens(self.endpoint.token, shown):
                return
            connection.settimeout(None)
            while (message := receive(connection)) is not None:
                self.free.clear()
                answer = self._obey(message)
                self.free.set()
                connection.sendall(encode(answer))
        except OSError as error:
            logger.info("the engine's connection has ended: %s", error)

    def _obey(self, message: Message) -> Message:
        try:
            if isinstance(message, StepPlan):
                return self._worker.step(message)
            if isinstance(message, CommitEpoch):
                self._worker.commit(message.epoch)
            else:
                assert isinstance(message, ForgetSequences), message
                self._worker.forget_sequences()
        except Exception as error:  # noqa: BLE001 - told to the engine, whatever it is
            return Failed(reason=one_line(error), aborted=isinstance(error, StepAborted))
        return Done()


def _family(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET
