"""The clusters that there are on one Ray: usually one, and two while a redeploy hands over from one to the next.

Each has a coordinator of its own, in a namespace of its own. What is kept here lies in Ray's key-value store, which
lives as long as the Ray cluster does. Every function blocks for calls to GCS.
"""

from __future__ import annotations

import logging
from typing import Any

import ray
from ray.experimental import internal_kv

from elastic_moe.actors import names
from elastic_moe.actors.remote.ask import Remote
from elastic_moe.cluster.redeploy import Generation

logger = logging.getLogger(__name__)

_KV_NAMESPACE = b"emoe"
_WANTED = b"wanted-generation"
_BEFORE = b"generation-before"


def wanted() -> Generation | None:
    """The cluster of the last deploy; None if none was announced."""
    value: bytes | None = internal_kv._internal_kv_get(_WANTED, namespace=_KV_NAMESPACE)
    return None if value is None else Generation(value.decode())


def announce(generation: Generation) -> None:
    """From now on this cluster is the wanted one."""
    before = wanted()
    if before == generation:
        return
    if before is not None:
        internal_kv._internal_kv_put(_BEFORE, before.encode(), overwrite=True, namespace=_KV_NAMESPACE)
    internal_kv._internal_kv_put(_WANTED, generation.encode(), overwrite=True, namespace=_KV_NAMESPACE)


def withdraw(generation: Generation) -> None:
    """This cluster cannot serve: the one before it is wanted again, if it still lives."""
    before: bytes | None = internal_kv._internal_kv_get(_BEFORE, namespace=_KV_NAMESPACE)
    if before is not None and wanted() == generation and before.decode() in coordinators():
        internal_kv._internal_kv_put(_WANTED, before, overwrite=True, namespace=_KV_NAMESPACE)


def forget_wanted() -> None:
    """There is no cluster any more."""
    for key in (_WANTED, _BEFORE):
        internal_kv._internal_kv_del(key, namespace=_KV_NAMESPACE)


def coordinators() -> dict[Generation, Remote[Any]]:
    """The coordinators that live, or are being restarted."""
    found = {}
    for generation, name in _actors():
        if name == names.COORDINATOR and (actor := find(generation, name)) is not None:
            found[generation] = actor
    return found


def find(generation: Generation, name: str) -> Remote[Any] | None:
    try:
        return Remote(ray.get_actor(name, namespace=names.namespace_of(generation)))
    except ValueError:
        return None


def end_actors(generation: Generation) -> None:
    """End every actor of this cluster but its coordinator, and of clusters without one; forget what it saved."""
    internal_kv._internal_kv_del(_state_key(generation), namespace=_KV_NAMESPACE)
    internal_kv._internal_kv_del(_part_key(generation, ""), del_by_prefix=True, namespace=_KV_NAMESPACE)
    alive = set(coordinators())
    for other, name in _actors():
        if names.is_ours(name) and (other == generation or other not in alive):
            actor = find(other, name)
            if actor is not None:
                ray.kill(actor.handle, no_restart=True)
                logger.warning("ended %s, left over from an earlier coordinator", name)


class StateStore:
    """What one coordinator saves. Nothing is found of a coordinator with another `owner`."""

    def __init__(self, generation: Generation, owner: str) -> None:
        self._generation = generation
        self._owner = owner.encode()

    def save(self, state: bytes) -> None:
        internal_kv._internal_kv_put(
            _state_key(self._generation), self._owner + state, overwrite=True, namespace=_KV_NAMESPACE
        )

    def saved(self) -> bytes | None:
        state: bytes | None = internal_kv._internal_kv_get(_state_key(self._generation), namespace=_KV_NAMESPACE)
        if state is None or not state.startswith(self._owner):
            return None
        return state.removeprefix(self._owner)

    def save_part(self, name: str, part: bytes) -> None:
        internal_kv._internal_kv_put(_part_key(self._generation, name), part, overwrite=True, namespace=_KV_NAMESPACE)

    def saved_part(self, name: str) -> bytes | None:
        part: bytes | None = internal_kv._internal_kv_get(_part_key(self._generation, name), namespace=_KV_NAMESPACE)
        return part

    def drop_part(self, name: str) -> None:
        internal_kv._internal_kv_del(_part_key(self._generation, name), namespace=_KV_NAMESPACE)


def _part_key(generation: Generation, name: str) -> bytes:
    return f"coordinator-part-{generation}-{name}".encode()


def _state_key(generation: Generation) -> bytes:
    return f"coordinator-state-{generation}".encode()


def _actors() -> list[tuple[Generation, str]]:
    """Every actor of every cluster: the cluster, and the actor's name in it."""
    found = []
    for actor in ray.util.list_named_actors(all_namespaces=True):
        generation = names.generation_in(actor["namespace"])
        if generation is not None:
            found.append((generation, actor["name"]))
    return found
