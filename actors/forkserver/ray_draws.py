"""Forks must not draw the ids that Ray makes at random, for tasks among others, from one sequence.

Ray's library has a generator of its own, which gets its seed from the system when it is first used, and which a fork
cannot seed again. So nothing may be drawn before. Some modules do when they are imported: each class of an actor gets
an id.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

_CHILDREN = 2


@contextlib.contextmanager
def none_for_classes() -> Iterator[None]:
    """Within the block, the ids of actors' classes come from the system, and not from Ray's generator."""
    from ray import actor

    ids: Any = getattr(actor, "ActorClassID", None)
    if ids is None:
        # whether anything was drawn is looked at later
        yield
        return

    class FromSystem:
        @staticmethod
        def from_random() -> Any:
            return ids(os.urandom(len(ids.nil().binary())))

    actor.ActorClassID = FromSystem  # type: ignore[assignment,attr-defined]
    try:
        yield
    finally:
        actor.ActorClassID = ids  # type: ignore[attr-defined]


def draws_are_common() -> bool:
    """Whether forks of this process would draw the same ids."""
    from ray import NodeID

    drawn = set()
    for _ in range(_CHILDREN):
        read, write = os.pipe()
        child = os.fork()
        if not child:
            try:
                os.write(write, NodeID.from_random().binary())
            finally:
                os._exit(0)
        os.close(write)
        with open(read, "rb") as source:
            drawn.add(source.read())
        os.waitpid(child, 0)
    return len(drawn - {b""}) < _CHILDREN
