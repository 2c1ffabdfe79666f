"""The operator's rules find what the schema lets through: a mistake in the overlay for spot nodes, one at a time."""

from __future__ import annotations

import copy
from typing import Any

import jsonschema
import pytest

from tests.k8s.crd import check_rayservice
from tests.k8s.rendered import kustomized, only
from tests.k8s.rules import complaints


def changed(path: str, value: Any) -> dict[str, Any]:
    """The RayService of the overlay, with one value of its spec set; numbers in the path are places in lists."""
    manifest = copy.deepcopy(only(kustomized("overlays/gpu-spot"), "RayService"))
    *parents, last = (int(part) if part.isdigit() else part for part in path.split("/"))
    place: Any = manifest["spec"]
    for part in parents:
        place = place.setdefault(part, {}) if isinstance(place, dict) else place[part]
    place[last] = value
    return manifest


CLUSTER, HEAD, GROUP = "rayClusterConfig", "rayClusterConfig/headGroupSpec", "rayClusterConfig/workerGroupSpecs/0"
CONTAINER = "template/spec/containers/0"


@pytest.mark.parametrize(
    ("path", "value", "complaint"),
    [
        ("upgradeStrategy/type", "BlueGreen", "upgradeStrategy.type"),
        ("upgradeStrategy/type", "NewClusterWithIncrementalUpgrade", "gatewayClassName"),
        (f"{CLUSTER}/rayVersion", "2.50.0", "token"),
        (f"{CLUSTER}/rayVersion", "2.54.0", "priority"),
        (f"{CLUSTER}/autoscalerOptions/version", "v1", "idleTimeoutSeconds needs"),
        (f"{CLUSTER}/autoscalerOptions/idleTimeoutSeconds", -1, "negative"),
        (f"{CLUSTER}/networkPolicy", {"mode": "DenyAll"}, "feature gate"),
        (f"{CLUSTER}/gcsFaultToleranceOptions/backend", "rocksdb", "no Redis"),
        (f"{CLUSTER}/gcsFaultToleranceOptions/storage", {"size": "1Gi"}, "belongs to rocksdb"),
        (f"{HEAD}/rayStartParams/redis-password", "x", "Redis stands"),
        (f"{HEAD}/{CONTAINER}/env/0/name", "RAY_REDIS_ADDRESS", "Redis stands"),
        (f"{HEAD}/{CONTAINER}/env/0/name", "RAY_enable_autoscaler_v2", "both set"),
        (f"{HEAD}/resources", {"CPU": "4"}, "head: resources"),
        (f"{HEAD}/headService/metadata/name", "head", "headService"),
        (f"{HEAD}/{CONTAINER}/ports/2/name", "http", "port named serve"),
        (f"{HEAD}/template/spec/restartPolicy", "Always", "restartPolicy"),
        (f"{GROUP}/minReplicas", 9, "minReplicas 9"),
        (f"{GROUP}/rayStartParams/labels", "a=b", "labels"),
        (f"{GROUP}/suspend", True, "suspended"),
        (f"{GROUP}/groupName", "gpu-on-demand", "one name"),
    ],
)  # fmt: skip
def test_a_mistake_is_found(path: str, value: Any, complaint: str) -> None:
    assert [found for found in complaints(changed(path, value)) if complaint in found]


@pytest.mark.parametrize("name", ["elastic_moe", "1moe", "m" * 48])
def test_a_name_is_part_of_names(name: str) -> None:
    manifest = changed("upgradeStrategy/type", "None")
    manifest["metadata"] = {"name": name}
    assert complaints(manifest) == [f"name: {name!r} is no DNS label of at most 47 characters"]


def test_a_misspelled_key_is_found() -> None:
    """The API server would drop it."""
    with pytest.raises(jsonschema.ValidationError, match="idleTimeoutSecond"):
        check_rayservice(changed(f"{GROUP}/idleTimeoutSecond", 1))
