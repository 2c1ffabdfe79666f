"""Typed calls to actors: a handle that knows the actor's class, and the only place that calls through Ray's handles.

    info = await ask(worker, WorkerActor.load, spec)

mypy checks the arguments against `WorkerActor.load` and knows the type of the answer. Only the method's name travels,
so the handle may belong to an actor of another class that has the same methods (a fake in a test).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from functools import cache
from typing import Any, Concatenate, Generic, ParamSpec, TypeVar, cast, overload

import ray

A = TypeVar("A")
P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")
Method = TypeVar("Method", bound=Callable[..., Any])


# without slots: a frozen dataclass that has them cannot be made as Remote[A](handle)
@dataclass(frozen=True)
class Remote(Generic[A]):
    """An actor of class A in another process. Two are equal if they mean the same actor. Ray can send it in a call."""

    handle: Any
    """Ray's handle, which has no types of its own."""


@cache
def remote_form(of: type | Callable[..., Any], concurrency_groups: tuple[tuple[str, int], ...] = ()) -> Any:
    """What `ray.remote` makes of an actor's class or of a function, once in this process.

    Each form has an id of its own. Ray keeps the pickled class under it, and so does each process that gets a handle of
    such an actor, which loads the class again: none is ever removed, and one for each worker was 70 kB in each of them.

    concurrency_groups: names of groups of an actor's methods, with the number of threads of each.
    """
    decoration: dict[str, Any] = {"concurrency_groups": dict(concurrency_groups)} if concurrency_groups else {}
    return ray.remote(**decoration)(of) if decoration else ray.remote(of)


@overload
def ask(
    actor: Remote[A],
    method: Callable[Concatenate[A, P], Coroutine[Any, Any, R]],
    *arguments: P.args,
    **named: P.kwargs,
) -> Awaitable[R]: ...


@overload
def ask(
    actor: Remote[A], method: Callable[Concatenate[A, P], R], *arguments: P.args, **named: P.kwargs
) -> Awaitable[R]: ...


def ask(actor: Remote[Any], method: Callable[..., Any], *arguments: Any, **named: Any) -> Awaitable[Any]:
    """Begin the call at once; awaiting the result gives the method's answer or raises its error.

    A caller that wants no answer may drop the result.
    """
    return cast(Awaitable[Any], getattr(actor.handle, method.__name__).remote(*arguments, **named))


def forward(actor: Remote[A], method: Callable[[A, T], R], argument: Awaitable[T]) -> Awaitable[R]:
    """Call `method` with the answer to another call, which goes straight from that callee to `actor`.

    `argument` is what `ask` returned for the other call.
    """
    return cast(Awaitable[R], getattr(actor.handle, method.__name__).remote(argument))


def wait(answer: Awaitable[R], timeout_s: float) -> R:
    """The answer of `ask` for a caller without an event loop. Blocks; raises GetTimeoutError after `timeout_s`."""
    return cast(R, ray.get(cast(Any, answer), timeout=timeout_s))


def in_group(name: str) -> Callable[[Method], Method]:
    """Decorator: an actor's method runs in this concurrency group. Unlike `ray.method`, it keeps the method's type."""
    return cast(Callable[[Method], Method], ray.method(concurrency_group=name))


def kill(actor: Remote[Any], *, restart: bool = False) -> None:
    """End the actor's process. `restart`: Ray makes the actor anew where its options allow that."""
    ray.kill(actor.handle, no_restart=not restart)
