"""The engine's side of API replicas: takes their requests, and sends each replica its new outputs once per step.

Outputs for a replica without a connection are kept until it connects again. If it stays away for CLIENT_S seconds, its
requests are aborted, except lasting ones (lasting.py).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import compress, zip_longest
from typing import Protocol

from elastic_moe.actors.engine.lasting import Lasting
from elastic_moe.actors.liveness import CLIENT_S
from elastic_moe.actors.remote.codec import Message, WireError, new_token
from elastic_moe.actors.remote.links import Link, listen
from elastic_moe.cluster.errors import RequestError
from elastic_moe.cluster.lines import counted
from elastic_moe.cluster.messages.columns import column_of
from elastic_moe.cluster.messages.requests import (
    AbortRequests,
    Adopt,
    Adopted,
    CancelRequests,
    Endpoint,
    GenerateRequest,
    Hello,
    Outputs,
    Refused,
    RequestId,
    Submit,
    TokenOutput,
    Tokens,
)
from elastic_moe.cluster.messages.steps import Done

logger = logging.getLogger(__name__)

_NO_TOKENS = Tokens()


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
    tokens: Tokens = _NO_TOKENS
    """Tokens that are sent at once, with `outputs`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Part:
    """The requests of one owner among all those that have tokens in a step."""

    owner: str | None
    which: list[bool] | None
    """Which of all they are; None: all."""
    numbers: bytes
    """[n] 32-bit integers, the numbers by which the owner knows them; empty if it has not told one of each."""


@dataclass(slots=True)
class _Wait:
    """A request that has no token yet. Times are monotonic."""

    came: float
    begun: float | None = None
    """When its first step was sent to the workers."""


class Clients:
    """All on one event loop."""

    def __init__(self, requests: Requests, *, submitted: Callable[[], None]) -> None:
        """`submitted` is called when requests have been added."""
        self._requests = requests
        self._submitted = submitted
        self._clients: dict[str, _Client] = {}
        self._names: dict[Link, str] = {}
        self._owners: dict[RequestId, str] = {}
        self._numbers: dict[RequestId, int] = {}
        """The number by which its owner knows a request, where it has told one."""
        self._known: tuple[RequestId, ...] = ()
        self._known_parts: list[_Part] = []
        """The owners of the requests in `_known`, which the step before the present one had tokens of."""
        self._lasting = Lasting()
        self._waiting: dict[RequestId, _Wait] = {}
        """The requests that have no token yet."""
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
        return request_id in self._owners or self._lasting.runs(request_id)

    @property
    def present(self) -> list[str]:
        """The replicas that are connected."""
        return [name for name, client in self._clients.items() if client.link is not None]

    def began(self, request_ids: Iterable[RequestId]) -> None:
        """These requests are in a step that was just sent to the workers."""
        now = time.monotonic()
        for request_id in request_ids:
            wait = self._waiting.get(request_id)
            if wait is not None and wait.begun is None:
                wait.begun = now

    def deliver(self, outputs: Iterable[TokenOutput], tokens: Tokens = _NO_TOKENS) -> None:
        """Send each output to the replica that its request came from; of a lasting one, to all that follow it.

        `tokens` are outputs of requests that have had outputs before.
        """
        touched: dict[str, _Client] = {}
        now = time.monotonic()
        outputs = [*outputs, *self._send_tokens(tokens, touched)]
        for output in outputs:
            readers = self._readers(output, now)
            if readers is None:
                continue
            first = bool(output.token_ids) or output.finish_reason is not None
            wait = self._waiting.pop(output.request_id, None) if first else None
            if wait is not None and output.token_ids:
                self.first_tokens += 1
                self.first_tokens_s += now - wait.came
            if wait is not None and wait.begun is not None:
                output = replace(output, queued_s=wait.begun - wait.came)
            for reader in readers:
                client = touched[reader] = self._clients[reader]
                client.outputs.append(output)
        for client in touched.values():
            _flush(client)

    def _send_tokens(self, tokens: Tokens, touched: dict[str, _Client]) -> list[TokenOutput]:
        """Have columns sent where that is enough. Returns the outputs that have to be looked at one by one."""
        if not tokens:
            return []
        if tokens.request_ids is not self._known:
            # while no request begins or ends, all is as in the step before
            self._known = tokens.request_ids
            self._known_parts = self._parts(tokens.request_ids)
        rest: list[TokenOutput] = []
        for known in self._known_parts:
            owner = known.owner
            client = None if owner is None else self._clients[owner]
            part = tokens if known.which is None else tokens.chosen(known.which)
            if owner is None or client is None or client.link is None or client.outputs or not known.numbers:
                rest += part
            else:
                touched[owner] = client
                client.tokens = Tokens(offsets=part.offsets, token_ids=part.token_ids, numbers=known.numbers)
        return rest

    def _parts(self, request_ids: Sequence[RequestId]) -> list[_Part]:
        """These requests by their owners."""
        owners = list(map(self._owners.get, request_ids))
        numbers = [self._numbers.get(name, 0) for name in request_ids]
        parts: list[_Part] = []
        for owner in set(owners):
            which = None if owners.count(owner) == len(owners) else [own == owner for own in owners]
            told = numbers if which is None else list(compress(numbers, which))
            parts.append(_Part(owner=owner, which=which, numbers=column_of(told) if all(told) else b""))
        return parts

    def _own(self, request_id: RequestId, owner: str, number: int) -> None:
        self._owners[request_id] = owner
        if number:
            self._numbers[request_id] = number
        self._known = ()

    def _disown(self, request_id: RequestId) -> str | None:
        """Forget whose request it is. Returns whose it was."""
        self._known = ()
        self._numbers.pop(request_id, None)
        return self._owners.pop(request_id, None)

    def _readers(self, output: TokenOutput, now: float) -> Collection[str] | None:
        """The names of the replicas that get this output; None where its request is not known any more."""
        if output.request_id in self._lasting:
            return self._lasting.take(output, now) if self._lasting.runs(output.request_id) else None
        ended = output.finish_reason is not None
        owner = self._disown(output.request_id) if ended else self._owners.get(output.request_id)
        return None if owner is None else (owner,)

    async def watch(self) -> None:
        """Abort the requests of replicas that are gone. Never returns."""
        while True:
            await asyncio.sleep(CLIENT_S / 4)
            now = time.monotonic()
            gone = [n for n, c in self._clients.items() if c.link is None and now - c.lost_at > CLIENT_S]
            for name in gone:
                lost = [request_id for request_id, owner in self._owners.items() if owner == name]
                self._abort(name, lost)
                self._lasting.gone(name)
                del self._clients[name]
                if lost:
                    logger.warning("aborted %s of an API replica that is gone", counted(len(lost), "request"))
            self._lasting.forget_old(now)

    # --- Messages -----------------------------------------------------------------------------------------------

    def _received(self, link: Link, message: Message) -> None:
        name = self._names.get(link)
        if isinstance(message, Hello):
            self._greet(link, message.client_id)
        elif name is None:
            raise WireError(f"a {type(message).__name__} came before a Hello")
        elif isinstance(message, Submit):
            try:
                self._submit(name, message.requests, message.numbers)
            except RequestError as error:
                link.send(Refused(message=str(error), param=error.param, code=error.code, status=error.status))
            else:
                link.send(Done())
                _flush(self._clients[name])
        elif isinstance(message, AbortRequests):
            self._abort(name, message.request_ids)
            if message.numbers:
                self._abort(name, [known for known, number in self._numbers.items() if number in message.numbers])
        elif isinstance(message, CancelRequests):
            self._cancel(message.request_ids)
        elif isinstance(message, Adopt):
            link.send(Adopted(request_ids=self._lasting.orphans(message.request_ids, self.present)))
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

    def _submit(self, name: str, requests: Sequence[GenerateRequest], numbers: Sequence[int]) -> None:
        client = self._clients[name]
        accepted: list[RequestId] = []
        for request, number in zip_longest(requests, numbers[: len(requests)], fillvalue=0):
            assert isinstance(request, GenerateRequest)
            if request.request_id in self._owners:
                if self._owners[request.request_id] == name:
                    self._own(request.request_id, name, number)
                continue
            if request.request_id in self._lasting:
                missed = self._lasting.follow(request, name)
                client.outputs += [missed] if missed is not None else []
                continue
            try:
                ended = self._requests.add(request)
            except RequestError:
                self._give_up(name, accepted)
                raise
            if request.lasting:
                self._lasting.begin(request, name)
            if ended is not None:
                self._readers(ended, time.monotonic())
                client.outputs.append(ended)
                continue
            if not request.lasting:
                self._own(request.request_id, name, number)
            self._waiting[request.request_id] = _Wait(time.monotonic())
            accepted.append(request.request_id)
        self._submitted()

    def _give_up(self, name: str, accepted: Sequence[RequestId]) -> None:
        """Take back what was accepted of a Submit that is refused."""
        self._abort(name, accepted)
        for request_id in accepted:
            if request_id in self._lasting:
                self._lasting.forget(request_id)
                self._waiting.pop(request_id, None)
                self._requests.abort(request_id)

    def _abort(self, name: str, request_ids: Iterable[RequestId]) -> None:
        for request_id in request_ids:
            if self._owners.get(request_id) == name:
                self._disown(request_id)
                self._waiting.pop(request_id, None)
                self._requests.abort(request_id)
            elif request_id in self._lasting:
                self._lasting.leave(request_id, name, time.monotonic())

    def _cancel(self, request_ids: Iterable[RequestId]) -> None:
        running = [request_id for request_id in request_ids if self._lasting.runs(request_id)]
        for request_id in running:
            self._waiting.pop(request_id, None)
            self._requests.abort(request_id)
        self.deliver(self._lasting.cancelled(request_id) for request_id in running)

    def _lost(self, link: Link) -> None:
        name = self._names.pop(link, None)
        if name is None:
            return
        client = self._clients[name]
        if client.link is link:
            client.link, client.lost_at = None, time.monotonic()


def _flush(client: _Client) -> None:
    if (client.outputs or client.tokens) and client.link is not None:
        outputs, client.outputs = tuple(client.outputs), []
        tokens, client.tokens = client.tokens, _NO_TOKENS
        client.link.send(Outputs(outputs=outputs, tokens=tokens))
