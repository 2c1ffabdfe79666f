"""Names under which our actors are found on a Ray cluster."""

from elastic_moe.cluster.placement import WorkerId

NAMESPACE = "emoe"
COORDINATOR = "coordinator"
ENGINE = "engine"
MIGRATOR = "migrator"
WORKER_PREFIX = "worker-"


def actor_name(worker: WorkerId) -> str:
    return f"{WORKER_PREFIX}{worker}"


def is_ours(name: str) -> bool:
    """Whether an actor of NAMESPACE is one that a coordinator made."""
    return name in (ENGINE, MIGRATOR) or name.startswith(WORKER_PREFIX)
