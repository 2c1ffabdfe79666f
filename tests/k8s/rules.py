"""What KubeRay's operator refuses though its schema allows it: ValidateRayServiceSpec and what that calls, in
ray-operator/controllers/ray/utils/validation.go, for the fields that our manifests use or are near to using."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

Spec = dict[str, Any]

UPGRADES = ("NewCluster", "None", "NewClusterWithIncrementalUpgrade")
NAME = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
LONGEST_NAME = 47
"""A RayService's name is part of the names of its clusters, pods and services."""
V2_VARIABLE = "RAY_enable_autoscaler_v2"
REDIS_VARIABLES = ("REDIS_PASSWORD", "RAY_REDIS_ADDRESS")
GCS_VARIABLES = ("RAY_gcs_storage", "RAY_gcs_storage_path")
OLDEST_WITH_TOKEN = (2, 52, 0)
OLDEST_WITH_PRIORITY = (2, 56, 0)


def complaints(manifest: dict[str, Any]) -> list[str]:
    """Why the operator would refuse the RayService; empty where it takes it."""
    name, spec = manifest["metadata"]["name"], manifest["spec"]
    found = list(_of_cluster(spec["rayClusterConfig"]))
    if len(name) > LONGEST_NAME or not NAME.fullmatch(name):
        found.append(f"name: {name!r} is no DNS label of at most {LONGEST_NAME} characters")
    upgrade = spec.get("upgradeStrategy", {})
    if upgrade.get("type", "None") not in UPGRADES:
        found.append(f"upgradeStrategy.type: {upgrade['type']}")
    if upgrade.get("type") == UPGRADES[2] and not spec["rayClusterConfig"].get("enableInTreeAutoscaling"):
        found.append("upgradeStrategy: incremental upgrades need the autoscaler")
    if upgrade.get("type") == UPGRADES[2] and not upgrade.get("clusterUpgradeOptions", {}).get("gatewayClassName"):
        found.append("upgradeStrategy: incremental upgrades need a gatewayClassName")
    head_service = spec["rayClusterConfig"]["headGroupSpec"].get("headService", {})
    if head_service.get("metadata", {}).get("name"):
        found.append("headService: its name must not be set")
    ports = spec["rayClusterConfig"]["headGroupSpec"]["template"]["spec"]["containers"][0].get("ports", [])
    if "serveService" not in spec and "serve" not in [port.get("name") for port in ports]:
        found.append("head: without a port named serve there is no service")
    return found


def _of_cluster(cluster: Spec) -> Iterator[str]:
    head = cluster["headGroupSpec"]
    groups = cluster.get("workerGroupSpecs", [])
    options = cluster.get("autoscalerOptions", {})
    for name, group in (("head", head), *((group["groupName"], group) for group in groups)):
        yield from _of_group(name, group, cluster)
    for group in groups:
        yield from _of_workers(group, cluster)
    if len({group["groupName"] for group in groups}) < len(groups):
        yield "workerGroupSpecs: two groups have one name"
    if options.get("version") and V2_VARIABLE in _variables(head):
        yield f"autoscalerOptions.version and {V2_VARIABLE} are both set"
    if options.get("idleTimeoutSeconds", 0) < 0:
        yield "autoscalerOptions.idleTimeoutSeconds is negative"
    yield from _of_storage(cluster.get("gcsFaultToleranceOptions"), head)
    if cluster.get("authOptions", {}).get("mode") == "token" and _version(cluster) < OLDEST_WITH_TOKEN:
        yield "authOptions.mode: this rayVersion knows no token"
    if cluster.get("networkPolicy") is not None:
        yield "networkPolicy: needs the feature gate RayClusterNetworkPolicy"


def _of_group(name: str, group: Spec, cluster: Spec) -> Iterator[str]:
    pod, parameters = group["template"]["spec"], group.get("rayStartParams", {})
    if not pod.get("containers"):
        yield f"{name}: no container"
    if group.get("resources") and parameters.keys() & {"num-cpus", "num-gpus", "memory", "resources"}:
        yield f"{name}: resources stand in rayStartParams and in resources"
    if "labels" in parameters:
        yield f"{name}: labels stand in rayStartParams"
    if _v2(cluster) and pod.get("restartPolicy", "Never") != "Never":
        yield f"{name}: autoscaler v2 wants restartPolicy Never"


def _of_workers(group: Spec, cluster: Spec) -> Iterator[str]:
    name, least, most = group["groupName"], group.get("minReplicas", 0), group.get("maxReplicas", 2**31 - 1)
    if not 0 <= least <= most:
        yield f"{name}: minReplicas {least}, maxReplicas {most}"
    if not cluster.get("enableInTreeAutoscaling") and not group.keys() >= {"minReplicas", "maxReplicas"}:
        yield f"{name}: without the autoscaler, minReplicas and maxReplicas must be set"
    if group.get("suspend"):
        yield f"{name}: cannot be suspended with the autoscaler"
    if "idleTimeoutSeconds" in group and not _v2(cluster):
        yield f"{name}: idleTimeoutSeconds needs autoscaler v2"
    if group.get("priority") and not (_v2(cluster) and _version(cluster) >= OLDEST_WITH_PRIORITY):
        yield f"{name}: priority needs autoscaler v2 and Ray 2.56"


def _of_storage(options: Spec | None, head: Spec) -> Iterator[str]:
    variables = _variables(head)
    if options is None:
        if "RAY_REDIS_ADDRESS" in variables:
            yield "RAY_REDIS_ADDRESS is set without gcsFaultToleranceOptions"
        return
    if head.get("rayStartParams", {}).get("redis-password") or variables & set(REDIS_VARIABLES):
        yield "gcsFaultToleranceOptions: Redis stands in the head's environment or parameters too"
    redis = options.keys() & {"redisAddress", "redisUsername", "redisPassword", "externalStorageNamespace"}
    if options.get("backend", "redis") == "redis" and "storage" in options:
        yield "gcsFaultToleranceOptions: storage belongs to rocksdb"
    if options.get("backend") == "rocksdb" and (redis or variables & set(GCS_VARIABLES)):
        yield "gcsFaultToleranceOptions: rocksdb knows no Redis, and sets its own variables"


def _v2(cluster: Spec) -> bool:
    return bool(cluster.get("enableInTreeAutoscaling")) and cluster.get("autoscalerOptions", {}).get("version") == "v2"


def _version(cluster: Spec) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", cluster.get("rayVersion", "0"))[:3]))


def _variables(group: Spec) -> set[str]:
    return {variable["name"] for variable in group["template"]["spec"]["containers"][0].get("env", [])}
