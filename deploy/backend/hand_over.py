"""An API replica of a redeploy takes over: from the replicas before it, whose cluster may be its own or another one."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Protocol

from elastic_moe.actors.coordinator.coordinator import Coordinator
from elastic_moe.actors.liveness import CALL_TIMEOUT_S
from elastic_moe.actors.remote.ask import Remote, ask
from elastic_moe.actors.remote.calls import CALL_ERRORS, one_line, within
from elastic_moe.cluster.config import ServeConfig
from elastic_moe.cluster.errors import NotReadyError
from elastic_moe.cluster.messages.views import Readiness
from elastic_moe.cluster.redeploy import Generation, cluster_of, number_of

READY_POLL_S = 0.5
"""Seconds between two questions whether a cluster can serve."""


class Clusters(Protocol):
    """The clusters on this Ray; the module actors/remote/generations.py is one. Functions block."""

    def coordinators(self) -> Mapping[Generation, Remote[Any]]: ...

    def withdraw(self, generation: Generation) -> None: ...


async def take_over(
    config: ServeConfig,
    generation: Generation,
    coordinators: Sequence[Remote[Coordinator]],
    readiness: Callable[[], Awaitable[Readiness]],
    clusters: Clusters,
) -> bool:
    """Have the cluster take over these settings; while another cluster serves, wait until this one can.

    Where this one needs the resources of the other, the wait ends when it has asked for them, since the other one ends
    as soon as it gets no more requests. Returns whether requests are to wait here for this cluster: because of that, or
    because the other one has ended meanwhile.

    generation, coordinators: of this replica's cluster and its groups. readiness: as the replica tells it. Raises
    NotReadyError where a group cannot take the settings over, or no group can ever serve: in the latter case, the
    cluster before this one is the wanted one again.
    """
    served = False
    try:
        # the coordinators may have to start first
        for coordinator in coordinators:
            await within(ask(coordinator, Coordinator.reconfigure, config), config.recovery_timeout)
        await _tell_others(config, generation, clusters)
        while await _another_serves(generation, clusters):
            served = True
            state = await readiness()
            if state.ready:
                return False
            if state.error is not None:
                raise NotReadyError(state.error)
            calls = [within(ask(c, Coordinator.needs_way), CALL_TIMEOUT_S) for c in coordinators]
            if any(await asyncio.gather(*calls)):
                return True
            await asyncio.sleep(READY_POLL_S)
    except CALL_ERRORS as error:
        if not any([await _serves(coordinator) for coordinator in coordinators]):
            await asyncio.to_thread(clusters.withdraw, generation)
        raise NotReadyError(f"this deployment cannot take over: {one_line(error)}") from None
    return served


async def _tell_others(config: ServeConfig, generation: Generation, clusters: Clusters) -> None:
    """Tell groups of this cluster that the settings no longer ask for. They end when no replica uses them."""
    for name, coordinator in (await asyncio.to_thread(clusters.coordinators)).items():
        if cluster_of(name) == generation and number_of(name) >= config.data_parallel_size:
            await within(ask(coordinator, Coordinator.reconfigure, config), CALL_TIMEOUT_S)


async def _another_serves(generation: Generation, clusters: Clusters) -> bool:
    for name, coordinator in (await asyncio.to_thread(clusters.coordinators)).items():
        if cluster_of(name) != generation and await _serves(coordinator):
            return True
    return False


async def _serves(coordinator: Remote[Coordinator]) -> bool:
    with contextlib.suppress(*CALL_ERRORS):
        return (await ready(coordinator)).ready
    return False


async def ready(coordinator: Remote[Coordinator]) -> Readiness:
    """Raises CALL_ERRORS."""
    return await within(ask(coordinator, Coordinator.readiness), CALL_TIMEOUT_S)
