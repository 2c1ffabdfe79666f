"""The interface between HTTP and the cluster: the engine takes requests, and the coordinator answers questions.

`Groups` (groups.py) implements it over the groups of a cluster, each of which is a `RayBackend` (ray_backend.py); tests
have a backend that runs in one process.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

from elastic_moe.actors.coordinator.coordinator import Coordinator
from elastic_moe.cluster.errors import EmoeError
from elastic_moe.cluster.messages.requests import GenerateRequest, RequestId, TokenOutput
from elastic_moe.cluster.messages.views import EngineStatus, Readiness
from elastic_moe.deploy.backend.request_stream import TakesTokens

LATER = Readiness(ready=False, reason="waits until others have started")
"""What is said of a group that has not begun to start, as groups start a few at a time."""

P = ParamSpec("P")
R = TypeVar("R")
Question = Callable[Concatenate[Coordinator, P], Coroutine[Any, Any, R]]
"""A method of the coordinator, such as `Coordinator.placement`. Only its name travels."""


class GenerationFailed(EmoeError):
    """The engine has ended a request because of a fault that is not in the request."""


class Requests(Protocol):
    """Takes requests, for the engine of one group or of any. They go on with another engine if theirs is lost."""

    @property
    def resumed(self) -> int:
        """Number of requests that this replica has submitted again because their engine was lost."""
        ...

    def group_of(self, request_id: RequestId) -> int:
        """Number of the group that generates the request; 0 where it has ended."""
        ...

    def generate(
        self, request: GenerateRequest, shortcut: TakesTokens | None = None
    ) -> AsyncGenerator[TokenOutput, None]:
        """The request's tokens as they come, in order and without repeats. The last output has a finish_reason.

        Single tokens that `shortcut` takes are in no output.

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


class Engine(Requests, Protocol):
    """The engine of one group that serves now."""

    async def status(self) -> EngineStatus:
        """Raises NotReadyError while there is no engine that answers."""
        ...


class Asked(Protocol):
    """Whoever has a coordinator to ask."""

    async def ask(self, question: Question[P, R], *arguments: P.args, **named: P.kwargs) -> R:
        """The coordinator's answer: `placement = await backend.ask(Coordinator.placement)`.

        Raises what the question raises, and NotReadyError while there is no coordinator that answers.
        """
        ...

    async def ask_within(self, timeout_s: float, question: Question[P, R], *arguments: P.args, **named: P.kwargs) -> R:
        """`ask` for a question whose answer may take this long."""
        ...


class Group(Asked, Protocol):
    """One group of workers, with its engine and its coordinator."""

    @property
    def engine(self) -> Engine: ...

    async def readiness(self) -> Readiness:
        """As that of Backend, of this group alone."""
        ...


class Backend(Asked, Protocol):
    """What the API has of the cluster. A question goes to the first group whose coordinator answers."""

    @property
    def engine(self) -> Requests:
        """Gives each request to the engine of some group."""
        ...

    @property
    def num_groups(self) -> int: ...

    @property
    def wanted_groups(self) -> int:
        """Number of groups that there are to be. Those after them are retired, and go when their requests have."""
        ...

    async def resize(self, number: int) -> None:
        """Have so many groups from now on. Returns at once: new ones start, and retired ones give their requests away.

        Raises ConfigError for more than there is room for, NotReadyError where nobody can say so.
        """
        ...

    def group(self, number: int) -> Group:
        """One of the groups, from 0. Raises RequestError where there is none of this number."""
        ...

    async def readiness(self) -> Readiness:
        """Whether the cluster is ready. Returns at once and never raises, since /ready is made of it."""
        ...

    @property
    def can_wait(self) -> bool:
        """Whether a request may wait while no worker can serve it: some worker has served, and not too long ago."""
        ...
