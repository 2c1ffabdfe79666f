"""The engine's side of API replicas: takes their requests, and sends each replica its new outputs once per step.

Outputs for a replica without a connection are kept until it connects again. If it stays away for CLIENT_S seconds, its
requests are aborted.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from elastic_moe.actors.liveness import CLIENT_S
from elastic_moe.actors.remote.codec import Message, WireError, new_token
from elastic_moe.actors.remote.links import Link, listen
from elastic_moe.cluster.errors import RequestError
from elastic_moe.cluster.messages.requests import (
    AbortRequests,
    Endpoint,
    GenerateRequest,
    Hello,
    Outputs,
    Refused,
    RequestId,
    Submit,
    TokenOutput,
)
from elastic_moe.cluster.messages.steps import Done

logger = logging.getLogger(__name__)


class Requests(Protocol):
    """Takes requests. In an engine this is the scheduler."""

    def add(self, request: GenerateRequest) -> TokenOutput | None:
        """Returns the last output if nothing is left to generate. Raises RequestError."""
        ...

    def abort(self, request_id: RequestId) -> bool: ...


@dataclass(slots=True)
class _Client:
    link: Link | None
    lost_at: float = 0.0
    outputs: list[TokenOutput] = field(default_factory=list)
    """Outputs that have not been sent yet."""


class Clients:
    """All on one event loop."""

    def __init__(self, requests: Requests, *, submitted: Callable[[], None]) -> None:
        """`submitted` is called when requests have been added."""
        self._requests = requests
        self._submitted = submitted
        self._clients: dict[str, _Client] = {}
        self._names: dict[Link, str] = {}
        self._owners: dict[RequestId, str] = {}
        self._waiting: dict[RequestId, float] = {}
        """Arrival times of the requests that have no token yet."""
        self.first_tokens = 0
        """Number of requests that got their first token; `first_tokens_s` is the sum of their waits for it."""
        self.first_tokens_s = 0.0
        self._server: asyncio.Server | None = None

    async def listen(self, address: str) -> Endpoint:
        self._server, endpoint = await listen(address, new_token(), self._received, self._lost)
        return endpoint

    def close(self) -> None:
        """Close all connections."""
        if self._server is not None:
            self._server.close()
        for link in list(self._names):
            link.close()

    def __contains__(self, request_id: RequestId) -> bool:
        """Whether the request was accepted, and has not ended."""
        return request_id in self._owners

    def deliver(self, outputs: Iterable[TokenOutput]) -> None:
        """Send each output to the replica that its request came from."""
        touched: dict[str, _Client] = {}
        for output in outputs:
            owner = self._owners.get(output.request_id)
            if owner is None:
                continue
            first = bool(output.token_ids) or output.finish_reason is not None
            came = self._waiting.pop(output.request_id, None) if first else None
            if came is not None and output.token_ids:
                self.first_tokens += 1
                self.first_tokens_s += time.monotonic() - came
            if output.finish_reason is not None:
                del self._owners[output.request_id]
            client = touched[owner] = self._clients[owner]
            client.outputs.append(output)
        for client in touched.values():
            _flush(client)

    async def watch(self) -> None:
        """Abort the requests of replicas that are gone. Never returns."""
        while True:
            await asyncio.sleep(CLIENT_S / 4)
            now = time.monotonic()
            gone = [n for n, c in self._clients.items() if c.link is None and now - c.lost_at > CLIENT_S]
            for name in gone:
                lost = [request_id for request_id, owner in self._owners.items() if owner == name]
                self._abort(name, lost)
                del self._clients[name]
                if lost:
                    logger.warning("aborted %d requests of an API replica that is gone", len(lost))

    # --- Messages -----------------------------------------------------------------------------------------------

    def _received(self, link: Link, message: Message) -> None:
        name = self._names.get(link)
        if isinstance(message, Hello):
            self._greet(link, message.client_id)
        elif name is None:
            raise WireError(f"a {type(message).__name__} came before a Hello")
        elif isinstance(message, Submit):
            try:
                self._submit(name, message.requests)
            except RequestError as error:
                link.send(Refused(message=str(error), param=error.param, code=error.code, status=error.status))
            else:
                link.send(Done())
                _flush(self._clients[name])
        elif isinstance(message, AbortRequests):
            self._abort(name, message.request_ids)
        else:
            raise WireError(f"an engine does not take a {type(message).__name__}")

    def _greet(self, link: Link, name: str) -> None:
        if self._names.get(link, name) != name:
            raise WireError("a replica said hello under two names")
        client = self._clients.setdefault(name, _Client(link=None))
        if client.link is not link:
            if client.link is not None:
                client.link.close()
            client.link = link
            self._names[link] = name
        link.send(Done())
        _flush(client)

    def _submit(self, name: str, requests: Sequence[GenerateRequest]) -> None:
        client = self._clients[name]
        accepted: list[RequestId] = []
        for request in requests:
            if request.request_id in self._owners:
                continue
            try:
                ended = self._requests.add(request)
            except RequestError:
                self._abort(name, accepted)
                raise
            if ended is not None:
                client.outputs.append(ended)
            else:
                self._owners[request.request_id] = name
                self._waiting[request.request_id] = time.monotonic()
                accepted.append(request.request_id)
        self._submitted()

    def _abort(self, name: str, request_ids: Iterable[RequestId]) -> None:
        for request_id in request_ids:
            if self._owners.get(request_id) == name:
                del self._owners[request_id]
                self._waiting.pop(request_id, None)
                self._requests.abort(request_id)

    def _lost(self, link: Link) -> None:
        name = self._names.pop(link, None)
        if name is None:
            return
        client = self._clients[name]
        if client.link is link:
            client.link, client.lost_at = None, time.monotonic()


def _flush(client: _Client) -> None:
    if client.outputs and client.link is not None:
        outputs, client.outputs = tuple(client.outputs), []
        client.link.send(Outputs(outputs=outputs))
