"""What a redeploy changes: which settings the serving cluster can take over, and which need another cluster.

A redeploy (`serve deploy` with other `args`) makes new API replicas. Those settings that only the API reads are theirs
from the start. The cluster takes over the ones in LIVE while it serves. All others, and the model, make another
*generation*: a cluster of its own beside the old one, to which the API replicas hand over once it can serve.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Any, NewType

from elastic_moe.cluster.config import ServeConfig

Generation = NewType("Generation", str)
"""Names a cluster: two clusters with the same name serve the same model with the same settings, apart from LIVE. The
further groups of a cluster, after the first one, have names of their own: the cluster's, a dot and their number."""

LIVE = frozenset({
    "workers", "min_workers", "max_workers", "autoscale_window", "rebalance_interval", "planner", "solver",
    "migration_bandwidth", "plan_deadline", "standby", "heartbeat_timeout", "drain_timeout", "api_replicas",
    "handover_timeout", "calibration", "data_parallel_size", "fork_workers",
})  # fmt: skip
"""Settings that a serving cluster takes over."""

API = frozenset({
    "model", "served_model_name", "host", "port", "address", "recovery_timeout", "max_waiting_requests",
    "max_stored_responses", "stored_responses_memory_bytes", "stored_responses_ttl", "max_connections",
    "max_connections_per_address", "forwarded_allow_ips", "allowed_hosts", "allowed_origins", "allowed_methods",
    "allowed_headers", "allow_credentials", "root_path", "api_key", "api_key_file", "admin_api_key",
    "admin_api_key_file", "admin_read_key", "admin_read_key_file", "chat_template", "tool_call_parser",
    "reasoning_parser", "stream_interval", "shutdown_timeout", "log_level", "log_format", "log_file",
})  # fmt: skip
"""Settings that the API reads. The cluster's processes may read some too, and use the new values from their next start.
`model` is here because a cluster is made for the directory that it means, and not for the way it is written."""

SECRETS = frozenset({"api_key", "admin_api_key", "admin_read_key"})
MASK = "********"


def generation_of(config: ServeConfig, model_dir: str) -> Generation:
    """The name of the cluster that serves this model with these settings, and of its first group."""
    values = {name: value for name, value in dataclasses.asdict(config).items() if name not in LIVE | API}
    text = json.dumps([model_dir, values], sort_keys=True)
    return Generation(hashlib.blake2b(text.encode(), digest_size=5).hexdigest())


def group_name(generation: Generation, number: int) -> Generation:
    """The name of one group of the cluster with this name."""
    return Generation(f"{generation}.{number}") if number else generation


def cluster_of(group: Generation) -> Generation:
    """The name of the cluster that this group is a part of."""
    return Generation(group.partition(".")[0])


def number_of(group: Generation) -> int:
    """The number of this group in its cluster, from 0."""
    return int(group.partition(".")[2] or 0)


def changes(old: ServeConfig, new: ServeConfig) -> dict[str, tuple[Any, Any]]:
    """The settings that differ, with their old and new values; keys are masked."""
    before, after = shown(old), shown(new)
    return {name: (before[name], after[name]) for name in before if getattr(old, name) != getattr(new, name)}


def shown(config: ServeConfig) -> dict[str, Any]:
    """Every setting with its value, for people to read; keys are masked."""
    return {name: _masked(name, value) for name, value in dataclasses.asdict(config).items()}


def in_force(api: ServeConfig, cluster: ServeConfig) -> dict[str, Any]:
    """Every setting with the value that is in force where it is read. api: as an API replica has it."""
    ours, theirs = shown(api), shown(cluster)
    return {name: ours[name] if name in API else theirs[name] for name in ours}


def _masked(name: str, value: Any) -> Any:
    return MASK if name in SECRETS and value is not None else value


def in_words(differences: Mapping[str, tuple[Any, Any]]) -> str:
    return ", ".join(f"{name} {old} -> {new}" for name, (old, new) in differences.items())
