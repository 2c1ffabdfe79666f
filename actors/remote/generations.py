"""The clusters that there are on one Ray: usually one, and two while a redeploy hands over from one to the next.

Each has a coordinator of its own, in a namespace of its own. What is kept here lies in Ray's key-value store, which
lives as long as the Ray cluster does. Every function blocks for calls to GCS.
"""

from __future__ import annotations

import logging
from typing import Any

import ray

from elastic_moe.actors import names
from elastic_moe.actors.remote.ask import Remote, kill
from elastic_moe.actors.remote.key_value import API_NAMESPACE, CLUSTERS_NAMESPACE, KeyValue, RayKeyValue
from elastic_moe.cluster.redeploy import Generation

logger = logging.getLogger(__name__)

_WANTED = "wanted-generation"
_BEFORE = "generation-before"
_GROUPS = "groups-of-"

_values: KeyValue = RayKeyValue(CLUSTERS_NAMESPACE)


def wanted() -> Generation | None:
    """The cluster of the last deploy; None if none was announced."""
    value = _values.get(_WANTED)
    return None if value is None else Generation(value.decode())


def announce(generation: Generation) -> None:
    """From now on this cluster is the wanted one."""
    before = wanted()
    if before == generation:
        return
    if before is not None:
        _values.put(_BEFORE, before.encode())
    _values.put(_WANTED, generation.encode())


def withdraw(generation: Generation) -> None:
    """This cluster cannot serve: the one before it is wanted again, if it still lives."""
    before = _values.get(_BEFORE)
    if before is not None and wanted() == generation and before.decode() in coordinators():
        _values.put(_WANTED, before)


def forget_wanted() -> None:
    """There is no cluster any more."""
    for key in (_WANTED, _BEFORE):
        _values.delete(key)


def number_of_groups(generation: Generation, configured: int) -> int:
    """Number of groups that this cluster is to have: the one that an admin call has asked for, as long as the settings
    say `configured` as they did then; else `configured`."""
    then, _, asked = (_values.get(_GROUPS + generation) or b"").decode().partition("=")
    return int(asked) if then == str(configured) else configured


def drop_other_numbers(generation: Generation, configured: int) -> None:
    """The settings say `configured`: a call that came while they said another number counts no more, also if they say
    that one again."""
    value = _values.get(_GROUPS + generation)
    if value is not None and not value.startswith(f"{configured}=".encode()):
        _values.delete(_GROUPS + generation)


def ask_for_groups(generation: Generation, configured: int, number: int) -> None:
    """From now on this cluster is to have `number` groups, until the settings say another number than `configured`."""
    _values.put(_GROUPS + generation, f"{configured}={number}".encode())


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
    StateStore(generation, owner="").clear()
    alive = set(coordinators())
    for other, name in _actors():
        if names.is_ours(name) and (other == generation or other not in alive):
            actor = find(other, name)
            if actor is not None:
                kill(actor)
                logger.warning("ended %s, left over from an earlier coordinator", name)


def clear(generation: Generation) -> None:
    """End every actor that an earlier coordinator made and could not end itself, and forget what it saved.

    What API replicas share is forgotten too, unless there is another cluster, whose replicas share it.
    """
    end_actors(generation)
    _values.delete(_GROUPS + generation)
    if not set(coordinators()) - {generation}:
        RayKeyValue(API_NAMESPACE).clear()


class StateStore:
    """What one coordinator saves. Nothing is found of a coordinator with another `owner`."""

    def __init__(self, generation: Generation, owner: str, values: KeyValue = _values) -> None:
        self._owner = owner.encode()
        self._values = values
        self._state_key = f"coordinator-state-{generation}"
        self._part_prefix = f"coordinator-part-{generation}-"

    def save(self, state: bytes) -> None:
        self._values.put(self._state_key, self._owner + state)

    def saved(self) -> bytes | None:
        state = self._values.get(self._state_key)
        if state is None or not state.startswith(self._owner):
            return None
        return state.removeprefix(self._owner)

    def save_part(self, name: str, part: bytes) -> None:
        self._values.put(self._part_prefix + name, part)

    def saved_part(self, name: str) -> bytes | None:
        return self._values.get(self._part_prefix + name)

    def drop_part(self, name: str) -> None:
        self._values.delete(self._part_prefix + name)

    def clear(self) -> None:
        """Forget the state and its parts, whichever coordinator saved them."""
        self._values.delete(self._state_key)
        self._values.clear(self._part_prefix)


def _actors() -> list[tuple[Generation, str]]:
    """Every actor of every cluster: the cluster, and the actor's name in it."""
    found = []
    for actor in ray.util.list_named_actors(all_namespaces=True):
        generation = names.generation_in(actor["namespace"])
        if generation is not None:
            found.append((generation, actor["name"]))
    return found
