"""Which groups the cluster of an API replica is to have: the settings' number, or the one of the last admin call.

The number lies in Ray's store, where all replicas look, and the groups' coordinators see in it whether they go on
(actors/remote/generations.py).
"""

from __future__ import annotations

import dataclasses
import os
import threading
from collections.abc import Sequence
from typing import Protocol

import psutil

from elastic_moe.actors.coordinator.coordinator import Coordinator
from elastic_moe.actors.coordinator.start import groups_at_once, start_further_groups
from elastic_moe.actors.remote import generations, ray_nodes
from elastic_moe.actors.remote.ask import Remote
from elastic_moe.cluster.config import ServeConfig
from elastic_moe.cluster.decisions.limits import check_groups
from elastic_moe.cluster.nodes import all_cores
from elastic_moe.cluster.redeploy import generation_of


class Directory(Protocol):
    """Every method blocks, and may be called from any thread. Each raises what Ray raises."""

    def wanted(self) -> int:
        """Number of groups that there are to be."""
        ...

    def want(self, number: int) -> None:
        """From now on there are to be `number` groups. Raises ConfigError for more than there is room for."""
        ...

    def find(self, number: int) -> None:
        """See that the first `number` groups have coordinators."""
        ...

    def at_once(self) -> int:
        """Number of groups that may start at a time."""
        ...

    def leave(self, number: int) -> None:
        """Groups from `number` on are left: their coordinators may end, and `find` asks for them anew."""
        ...


class RayDirectory:
    def __init__(
        self, config: ServeConfig, model_dir: str, coordinators: Sequence[Remote[Coordinator]], *, joined: bool
    ) -> None:
        """Blocks. coordinators: those of the settings' groups. joined: the Ray cluster was there before, and so workers
        may run on other machines."""
        self._config = config
        self._model_dir = model_dir
        self._generation = generation_of(config, model_dir)
        self._joined = joined
        self._finding = threading.Lock()
        self.coordinators = list(coordinators)
        """By the numbers of their groups."""
        generations.drop_other_numbers(self._generation, config.data_parallel_size)

    def wanted(self) -> int:
        return generations.number_of_groups(self._generation, self._config.data_parallel_size)

    def want(self, number: int) -> None:
        address = "auto" if self._joined else self._config.address
        asked = dataclasses.replace(self._config, data_parallel_size=number, address=address)
        present = len(self.coordinators)
        check_groups(
            asked,
            cores=len(os.sched_getaffinity(0)),
            all_cores=None if asked.address is None else all_cores(ray_nodes.nodes()),
            free_bytes=psutil.virtual_memory().available,
            present=present,
        )
        generations.ask_for_groups(self._generation, self._config.data_parallel_size, number)

    def at_once(self) -> int:
        alone = not self._joined and self._config.address is None
        return groups_at_once(self._config.workers, alone=alone)

    def find(self, number: int) -> None:
        with self._finding:
            self.coordinators = start_further_groups(self.coordinators, self._config, self._model_dir, number)

    def leave(self, number: int) -> None:
        with self._finding:
            self.coordinators = self.coordinators[:number]
