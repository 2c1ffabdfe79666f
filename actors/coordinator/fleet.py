"""Makes and ends the actors, and asks Ray what there is.

`Fleet` is what the coordinator needs of it; tests bring their own and then need no Ray.
"""

from __future__ import annotations

import math
import os
from collections.abc import Awaitable, Mapping
from typing import Any, Protocol

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from elastic_moe.actors import names
from elastic_moe.actors.coordinator.migrator import Migrator
from elastic_moe.actors.coordinator.opening import served_model
from elastic_moe.actors.description import describe
from elastic_moe.actors.engine.engine import Engine, StepReports
from elastic_moe.actors.forkserver.stages import command_of_models, may_fork
from elastic_moe.actors.logs import LogSettings, set_up
from elastic_moe.actors.planner_process import plan_apart
from elastic_moe.actors.remote import generations, ray_nodes
from elastic_moe.actors.remote.ask import Remote, kill, remote_form
from elastic_moe.actors.remote.generations import StateStore
from elastic_moe.actors.remote.saving import Store
from elastic_moe.actors.tasks import kill_process
from elastic_moe.actors.worker.worker_actor import WorkerActor
from elastic_moe.cluster.config import ServeConfig
from elastic_moe.cluster.errors import ConfigError
from elastic_moe.cluster.messages.epochs import ModelInfo, WorkerInfo
from elastic_moe.cluster.nodes import GPU, Node, free_cores, homes, shortage, threads
from elastic_moe.cluster.placement import WorkerId
from elastic_moe.cluster.redeploy import Generation, cluster_of, group_name, number_of
from elastic_moe.optimizer import PlacementProblem, PlanResult

NODE_ID = "ray.io/node-id"
"""The label in which every node has its id."""
ON_HEAD = {"node:__internal_head__": 0.001}
"""Resource of the head node, for actors that need no GPU and must not be on a machine that may leave."""

IO_THREADS = 16
"""Threads of a worker for the control plane's calls."""
JOIN_THREADS = 4
"""Threads of a worker that join other workers: one does, and others may still hang in groups that were given up."""
COPY_THREADS = 6
"""Threads of a worker for copies of experts: one copy runs at a time, or four on GPUs. More run while they hang."""


class Fleet(Protocol):
    def attach(self) -> None:
        """Called once by the coordinator, in its own process, before anything else."""
        ...

    def clear(self) -> None:
        """End the actors that an earlier coordinator made, and delete its saved state."""
        ...

    @property
    def store(self) -> Store:
        """Keeps the coordinator's state where it outlives the coordinator."""
        ...

    def find_worker(self, worker: WorkerId) -> Remote[WorkerActor] | None:
        """The worker's actor, made by an earlier coordinator; None if it is gone."""
        ...

    def find_engine(self) -> Remote[Engine] | None:
        """The engine, as above."""
        ...

    def find_migrator(self) -> Remote[Migrator] | None:
        """The migrator, as above."""
        ...

    def read_model(self, model_dir: str) -> ModelInfo:
        """The checkpoint's description of its model, with the sizes in the served dtype. Raises CheckpointError."""
        ...

    def device(self) -> str:
        """cpu or cuda. The first answer holds for good. Raises ConfigError if cuda is asked for and can never be."""
        ...

    def settle_device(self, device: str) -> None:
        """The device that an earlier incarnation of this coordinator has chosen."""
        ...

    @property
    def shared_gpus(self) -> bool: ...

    @property
    def gpu_workers(self) -> int:
        """Most workers that share a GPU."""
        ...

    @property
    def num_nodes(self) -> int:
        """Number of nodes on which workers may run now; at least 1."""
        ...

    def node_threads(self) -> int:
        """Number of cores that the workers of a node share."""
        ...

    def shortage(self) -> str | None:
        """What a worker without a process waits for, in words; None if there is room for it. Blocks."""
        ...

    def free_cores(self) -> Mapping[str, int]:
        """Whole cores that are free on each node where another worker may run; empty for workers that share no node's
        cores, or cannot have another node. Blocks."""
        ...

    def draining_nodes(self) -> Mapping[str, float | None]:
        """The nodes that are about to leave, with the seconds until they end, where known. Blocks."""
        ...

    def configure(self, config: ServeConfig) -> None:
        """Use the settings of a redeploy for what starts from now on."""
        ...

    # --- Clusters beside one another, while a redeploy hands over ---------------------------------------------------

    def wanted(self, groups: int) -> bool:
        """Whether the last redeploy wants this cluster, and this one of its groups. `groups`: number of them that it
        has. Blocks."""
        ...

    def num_groups(self, configured: int) -> int:
        """Number of groups that the cluster is to have now. `configured`: the settings' number. Blocks."""
        ...

    def others(self) -> list[Remote[Any]]:
        """The coordinators of the other clusters. Blocks."""
        ...

    def beside(self, group: int) -> Fleet:
        """The same for another group of this cluster, from which nothing has been started yet."""
        ...

    def leave(self) -> None:
        """End this coordinator's own process for good, after all its actors."""
        ...

    @property
    def standby(self) -> bool:
        """Whether a worker's process may be started before it is needed, because it takes no resources from others."""
        ...

    def start_worker(self, worker: WorkerId, node: str | None = None) -> Remote[WorkerActor]:
        """node: where it is to run if there is room; None: anywhere, far from the others."""
        ...

    def start_engine(self) -> Remote[Engine]: ...

    def start_migrator(self, expert_bytes: int) -> Remote[Migrator]: ...

    def kill(self, actor: Remote[Any]) -> None: ...

    def kill_worker(self, actor: Remote[WorkerActor], info: WorkerInfo | None) -> None:
        """Like `kill`, and at once even where the process hangs."""
        ...

    def solve(
        self, problem: PlacementProblem, planner: str, deadline_s: float, solver: str, *, urgent: bool = False
    ) -> Awaitable[PlanResult]: ...


class RayFleet:
    """Real actors. All are detached and named, so that they can be found should the coordinator be gone.

    worker_class and engine_class are there for tests with actors that only pretend.
    """

    def __init__(
        self,
        config: ServeConfig,
        generation: Generation,
        *,
        alone: bool = False,
        model: ModelInfo | None = None,
        worker_class: type | None = None,
        engine_class: type | None = None,
    ) -> None:
        """`model`, where it is known already, saves the coordinator the seconds in which it is described.

        alone: `emoe serve` has started this Ray itself, on this machine alone. It will not grow, so workers make do
        with what it has.
        """
        self._config = config
        self.generation = generation
        self._alone = alone
        self._model = model
        self._worker_class = worker_class
        self._engine_class = engine_class
        self._coordinator: Remote[StepReports] | None = None
        self._device: str | None = None
        self._logs = LogSettings.of(config, number_of(generation))

    def attach(self) -> None:
        set_up(names.COORDINATOR, self._logs)
        self._coordinator = Remote(ray.get_runtime_context().current_actor)

    def configure(self, config: ServeConfig) -> None:
        self._config = config
        self._logs = LogSettings.of(config, number_of(self.generation))
        set_up(names.COORDINATOR, self._logs)

    def clear(self) -> None:
        generations.clear(self.generation)

    def wanted(self, groups: int) -> bool:
        if number_of(self.generation) >= self.num_groups(groups):
            return False
        return self._alone or generations.wanted() in (None, cluster_of(self.generation))

    def num_groups(self, configured: int) -> int:
        return generations.number_of_groups(cluster_of(self.generation), configured)

    def beside(self, group: int) -> RayFleet:
        name = group_name(cluster_of(self.generation), group)
        return RayFleet(
            self._config,
            name,
            alone=self._alone,
            model=self._model,
            worker_class=self._worker_class,
            engine_class=self._engine_class,
        )

    def others(self) -> list[Remote[Any]]:
        ours = cluster_of(self.generation)
        return [actor for name, actor in generations.coordinators().items() if cluster_of(name) != ours]

    def leave(self) -> None:
        assert self._coordinator is not None
        self.kill(self._coordinator)

    @property
    def store(self) -> Store:
        # a restarted actor keeps its id; an actor of another id does not continue
        return StateStore(self.generation, str(ray.get_runtime_context().get_actor_id()))

    def find_worker(self, worker: WorkerId) -> Remote[WorkerActor] | None:
        return self._find(names.actor_name(worker))

    def find_engine(self) -> Remote[Engine] | None:
        return self._find(names.ENGINE)

    def find_migrator(self) -> Remote[Migrator] | None:
        return self._find(names.MIGRATOR)

    def _find(self, name: str) -> Remote[Any] | None:
        return generations.find(self.generation, name)

    def read_model(self, model_dir: str) -> ModelInfo:
        if self._model is None:
            self._model = describe(model_dir)
        return served_model(self._config, self._model, self.device())

    def device(self) -> str:
        if self._device is None:
            self._device = self._choose_device()
        return self._device

    def settle_device(self, device: str) -> None:
        self._device = device

    def _choose_device(self) -> str:
        gpus = self._gpus
        if self._config.device == "cuda" and self._alone and not gpus:
            raise ConfigError("device: expected a GPU for cuda, but Ray sees none on this machine")
        if self._config.device != "auto":
            return self._config.device
        return "cuda" if gpus > 0 else "cpu"

    @property
    def _gpus(self) -> float:
        return sum(node.total.get(GPU, 0.0) for node in ray_nodes.nodes())

    @property
    def shared_gpus(self) -> bool:
        return self.gpu_workers > 1

    @property
    def gpu_workers(self) -> int:
        if self.device() != "cuda" or self._gpu_share == 1:
            return 1
        return math.ceil(self._config.all_workers / self._gpus)

    @property
    def _gpu_share(self) -> float:
        if not self._alone or not 0 < self._gpus < self._config.all_workers:
            return 1.0
        return int(1000 * self._gpus / self._config.all_workers) / 1000

    @property
    def _on_head(self) -> bool:
        return self._alone or self._config.workers_on_head

    @property
    def _homes(self) -> tuple[Node, ...]:
        return homes(ray_nodes.nodes(), self.device(), on_head=self._on_head)

    @property
    def num_nodes(self) -> int:
        return max(1, len(self._homes))

    def node_threads(self) -> int:
        return len(os.sched_getaffinity(0)) if self._alone else threads(self._homes)

    def shortage(self) -> str | None:
        return None if self._alone else shortage(ray_nodes.nodes(), self.device(), on_head=self._on_head)

    def free_cores(self) -> Mapping[str, int]:
        return {} if self._alone or self.device() == "cuda" else free_cores(self._homes)

    def draining_nodes(self) -> Mapping[str, float | None]:
        return {} if self._alone else ray_nodes.draining_nodes()

    @property
    def standby(self) -> bool:
        return self._config.standby and self._alone and self.device() == "cpu"

    @property
    def _forks(self) -> bool:
        return may_fork(self._config, alone=self._alone) and self.device() == "cpu"

    def start_worker(self, worker: WorkerId, node: str | None = None) -> Remote[WorkerActor]:
        worker_class = self._worker_class
        arguments: tuple[Any, ...] = ()
        if worker_class is None:
            worker_class, arguments = WorkerActor, (str(worker), self._logs)
        if self.device() == "cuda":
            resources: dict[str, Any] = {"num_gpus": self._gpu_share, "num_cpus": 0}
        else:
            # workers of one machine share its cores; if each reserved whole cores, some would not start
            resources = {"num_cpus": 0} if self._alone else {"num_cpus": 1, **self._place(node)}
        if self._forks:
            resources["runtime_env"] = {"py_executable": command_of_models()}
        actor = remote_form(worker_class, (("io", IO_THREADS), ("joins", JOIN_THREADS), ("copies", COPY_THREADS)))
        return self._create(actor, names.actor_name(worker), {"max_restarts": 0, **resources}, *arguments)

    def _place(self, node: str | None) -> dict[str, Any]:
        """Ray's options for a worker on CPUs. Unless told to spread them, Ray fills half of a node first."""
        barred = node if self._on_head else ray_nodes.head_id()
        elsewhere = {} if barred is None else {"label_selector": {NODE_ID: f"!{barred}"}}
        if node is None:
            return {"scheduling_strategy": "SPREAD", **elsewhere}
        return {"label_selector": {NODE_ID: node}, "fallback_strategy": [elsewhere]}

    def start_engine(self) -> Remote[Engine]:
        engine_class = self._engine_class
        arguments: tuple[Any, ...] = (self._config, self._coordinator)
        if engine_class is None:
            engine_class, arguments = Engine, (*arguments, self._logs)
        options = {"max_restarts": 0, "num_cpus": 0, "resources": ON_HEAD}
        return self._create(remote_form(engine_class), names.ENGINE, options, *arguments)

    def start_migrator(self, expert_bytes: int) -> Remote[Migrator]:
        options = {"max_restarts": -1, "num_cpus": 0, "resources": ON_HEAD}
        bytes_per_s = self._config.migration_bandwidth * 1e6
        arguments = (expert_bytes, bytes_per_s, self._logs, self.device() == "cuda")
        return self._create(remote_form(Migrator), names.MIGRATOR, options, *arguments)

    def _create(self, actor: Any, name: str, options: dict[str, Any], *arguments: Any) -> Remote[Any]:
        namespace = names.namespace_of(self.generation)
        named = actor.options(name=name, namespace=namespace, lifetime="detached", **options)
        return Remote(named.remote(*arguments))

    def kill(self, actor: Remote[Any]) -> None:
        kill(actor)

    def kill_worker(self, actor: Remote[WorkerActor], info: WorkerInfo | None) -> None:
        self.kill(actor)
        # Ray first asks a process to end, and a process that hangs would hold the engine up until Ray kills it
        if info is None:
            return
        if info.node == ray.get_runtime_context().get_node_id():
            kill_process(info.pid)
        else:
            there = NodeAffinitySchedulingStrategy(node_id=info.node, soft=False)
            options = {"num_cpus": 0, "max_retries": 0, "scheduling_strategy": there}
            remote_form(kill_process).options(**options).remote(info.pid)

    def solve(
        self, problem: PlacementProblem, planner: str, deadline_s: float, solver: str, *, urgent: bool = False
    ) -> Awaitable[PlanResult]:
        return plan_apart(problem, planner=planner, deadline_s=deadline_s, solver=solver, urgent=urgent)
