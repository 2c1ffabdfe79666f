"""What Ray knows of its nodes: resources, and the notice that a node is about to leave.

It uses parts of Ray that its documentation does not promise; tests/deploy/launch/test_ray_private.py names them.
"""

from __future__ import annotations

import time
from typing import Any

import ray
from ray._private import worker
from ray._private.state import state

from elastic_moe.cluster.nodes import Node

HEAD = "node:__internal_head__"
"""A resource that the head alone has."""
GCS_TIMEOUT_S = 5.0


def nodes() -> tuple[Node, ...]:
    """The living nodes. Blocks for calls to GCS."""
    free: dict[str, dict[str, float]] = state.available_resources_per_node()  # type: ignore[no-untyped-call]
    draining = draining_nodes()
    table: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    return tuple(
        Node(
            id=node["NodeID"],
            head=HEAD in node["Resources"],
            total=node["Resources"],
            free=free.get(node["NodeID"], {}),
            drains=node["NodeID"] in draining,
        )
        for node in table
        if node["Alive"]
    )


def head_id() -> str:
    """The id of the head. Blocks for a call to GCS."""
    table: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    return next((str(node["NodeID"]) for node in table if node["Alive"] and HEAD in node["Resources"]), "")


def draining_nodes() -> dict[str, float | None]:
    """The nodes that drain, with the seconds until they end; None where Ray does not know. Blocks for a call to GCS."""
    connected: Any = worker.global_worker
    draining: dict[str, int] = connected.gcs_client.get_draining_nodes(timeout=GCS_TIMEOUT_S)
    now_ms = 1000 * time.time()
    return {node: (deadline_ms - now_ms) / 1000 if deadline_ms else None for node, deadline_ms in draining.items()}
