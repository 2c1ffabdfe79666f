"""Names under which our actors are found on a Ray cluster."""

from elastic_moe.cluster.placement import WorkerId
from elastic_moe.cluster.redeploy import Generation

NAMESPACE = "emoe"
"""The namespace of processes that connect to Ray. Each cluster's actors have one of their own, which begins with it."""
COORDINATOR = "coordinator"
ENGINE = "engine"
MIGRATOR = "migrator"
WORKER_PREFIX = "worker-"


def namespace_of(generation: Generation) -> str:
    """The namespace of the actors of one cluster."""
    return f"{NAMESPACE}-{generation}"


def generation_in(namespace: str) -> Generation | None:
    """The cluster whose namespace this is; None for a namespace of somebody else."""
    prefix = f"{NAMESPACE}-"
    return Generation(namespace.removeprefix(prefix)) if namespace.startswith(prefix) else None


def actor_name(worker: WorkerId) -> str:
    return f"{WORKER_PREFIX}{worker}"


def is_ours(name: str) -> bool:
    """Whether an actor of NAMESPACE is one that a coordinator made."""
    return name in (ENGINE, MIGRATOR) or name.startswith(WORKER_PREFIX)
