"""The interface between HTTP and the cluster: the engine takes requests, and the coordinator answers questions.

`RayBackend` (ray_backend.py) implements it on Ray; tests have a backend that runs in one process.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

from elastic_moe.actors.coordinator.coordinator import Coordinator
from elastic_moe.cluster.errors import EmoeError
from elastic_moe.cluster.messages.requests import GenerateRequest, RequestId, TokenOutput
from elastic_moe.cluster.messages.views import EngineStatus, Readiness

P = ParamSpec("P")
R = TypeVar("R")
Question = Callable[Concatenate[Coordinator, P], Coroutine[Any, Any, R]]
"""A method of the coordinator, such as `Coordinator.placement`. Only its name travels."""


class GenerationFailed(EmoeError):
    """The engine has ended a request because of a fault that is not in the request."""


class Engine(Protocol):
    """The engine that serves now. Requests go on with the next one if it is lost."""

    resumed: int
    """Number of requests that this replica has submitted again because their engine was lost."""

    def generate(self, request: GenerateRequest) -> AsyncGenerator[TokenOutput, None]:
        """The request's tokens as they come, in order and without repeats. The last output has a finish_reason.

        Closing the iterator before the last output aborts the request, unless it is lasting. Raises RequestError where
        the engine refuses it. Of a lasting request that the engine has already, all tokens come, from the first one.
        """
        ...

    def cancel(self, request_id: RequestId) -> None:
        """End a lasting request: its last output will have the reason ABORT.

        Raises KeyError where this replica does not generate it.
        """
        ...

    async def orphans(self, request_ids: Sequence[RequestId]) -> tuple[RequestId, ...]:
        """Those of these lasting requests that no replica generates; none while there is no engine that could know."""
        ...

    def forget(self, request_id: RequestId) -> None:
        """The engine need not keep the answer of this lasting request, which has ended, any longer."""
        ...

    async def status(self) -> EngineStatus:
        """Raises NotReadyError while there is no engine that answers."""
        ...


class Backend(Protocol):
    """What the API has of the cluster."""

    @property
    def engine(self) -> Engine: ...

    async def ask(self, question: Question[P, R], *arguments: P.args, **named: P.kwargs) -> R:
        """The coordinator's answer: `placement = await backend.ask(Coordinator.placement)`.

        Raises what the question raises, and NotReadyError while there is no coordinator that answers.
        """
        ...

    async def ask_within(self, timeout_s: float, question: Question[P, R], *arguments: P.args, **named: P.kwargs) -> R:
        """`ask` for a question whose answer may take this long."""
        ...

    async def readiness(self) -> Readiness:
        """Whether the cluster is ready. Returns at once and never raises, since /ready is made of it."""
        ...

    @property
    def can_wait(self) -> bool:
        """Whether a request may wait while no worker can serve it: some worker has served, and not too long ago."""
        ...
