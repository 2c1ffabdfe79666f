"""Kustomize's overlays and the Helm chart: Kubernetes and KubeRay take them, their parts fit together, and the chart
says what the overlays say."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import yaml

from elastic_moe.cluster.config import ServeConfig
from tests.k8s.crd import check
from tests.k8s.rendered import GPU_VALUES, K8S, Manifest, charted, kustomized, only
from tests.k8s.rules import complaints

# of Ray's own schema module, under pydantic 2
pytestmark = pytest.mark.filterwarnings("ignore:Using extra keyword arguments on `Field`")

KEYS = {"api-key", "admin-api-key", "redis-password"}
"""What the Secret has, by the commands in k8s/README.md."""
SOURCES: dict[str, Callable[[], tuple[Manifest, ...]]] = {
    "base": lambda: kustomized("base"),
    "cpu-demo": lambda: kustomized("overlays/cpu-demo"),
    "gpu-spot": lambda: kustomized("overlays/gpu-spot"),
    "chart": charted,
    "chart-gpu-spot": lambda: charted(values=str(GPU_VALUES)),
    "chart-monitored": lambda: charted(sets="serviceMonitor.enabled=true"),
}


@pytest.fixture(params=SOURCES)
def manifests(request: pytest.FixtureRequest) -> tuple[Manifest, ...]:
    return SOURCES[request.param]()


def pods(manifests: tuple[Manifest, ...]) -> Iterator[tuple[dict[str, str], dict[str, Any]]]:
    """Labels and spec of every pod that the server consists of."""
    cluster = only(manifests, "RayService")["spec"]["rayClusterConfig"]
    templates = [group["template"] for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])]
    templates += [manifest["spec"]["template"] for manifest in manifests if manifest["kind"] == "StatefulSet"]
    for template in templates:
        yield template["metadata"]["labels"], template["spec"]


def test_kubernetes_and_kuberay_take_them(manifests: tuple[Manifest, ...]) -> None:
    for manifest in manifests:
        check(manifest)
    assert complaints(only(manifests, "RayService")) == []


def test_serve_takes_the_application(manifests: tuple[Manifest, ...]) -> None:
    from ray.serve.schema import ServeDeploySchema

    data = yaml.safe_load(only(manifests, "RayService")["spec"]["serveConfigV2"])
    ServeDeploySchema.model_validate(data)
    # Ray accepts misspelled keys
    assert set(data) <= set(ServeDeploySchema.model_fields)
    (application,) = data["applications"]
    module, _, name = application["import_path"].partition(":")
    assert callable(getattr(importlib.import_module(module), name))
    config = ServeConfig.from_mapping(application["args"])
    # or changing things under /admin would not ask for a key
    assert config.host == data["http_options"]["host"] == "0.0.0.0"


def test_there_is_a_pod_for_every_worker(manifests: tuple[Manifest, ...]) -> None:
    spec = only(manifests, "RayService")["spec"]
    (application,) = yaml.safe_load(spec["serveConfigV2"])["applications"]
    config = ServeConfig.from_mapping(application["args"])
    groups = spec["rayClusterConfig"]["workerGroupSpecs"]
    assert sum(group["maxReplicas"] for group in groups) >= config.workers
    gpu = [
        "nvidia.com/gpu" in container["resources"]["limits"]
        for group in groups
        for container in group["template"]["spec"]["containers"]
    ]
    assert set(gpu) == {config.device == "cuda"}


def test_every_container_is_confined_and_finds_what_it_mounts(manifests: tuple[Manifest, ...]) -> None:
    claims = {manifest["metadata"]["name"] for manifest in manifests if manifest["kind"] == "PersistentVolumeClaim"}
    for labels, pod in pods(manifests):
        assert pod["securityContext"]["runAsNonRoot"]
        assert pod["securityContext"]["runAsUser"] > 0
        volumes = {volume["name"]: volume for volume in pod.get("volumes", [])} | {"data": {}}
        for container in (*pod["containers"], *pod.get("initContainers", [])):
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
            assert ":" in container["image"]
            assert {mount["name"] for mount in container["volumeMounts"]} <= volumes.keys()
            keys = [variable["valueFrom"]["secretKeyRef"]["key"] for variable in container.get("env", [])
                    if "valueFrom" in variable]  # fmt: skip
            assert set(keys) <= KEYS
        for volume in volumes.values():
            if "persistentVolumeClaim" in volume and claims:
                assert volume["persistentVolumeClaim"]["claimName"] in claims
        assert labels["app.kubernetes.io/part-of"] == "elastic-moe"


def gibibytes(quantity: str) -> int:
    return int(quantity.removesuffix("Gi"))


def test_shared_memory_is_memory_and_fits(manifests: tuple[Manifest, ...]) -> None:
    cluster = only(manifests, "RayService")["spec"]["rayClusterConfig"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        (name,) = (mount["name"] for mount in container["volumeMounts"] if mount["mountPath"] == "/dev/shm")
        (volume,) = (volume["emptyDir"] for volume in pod["volumes"] if volume["name"] == name)
        assert volume["medium"] == "Memory"
        assert 0 < gibibytes(volume["sizeLimit"]) <= gibibytes(container["resources"]["limits"]["memory"])


def test_a_pod_has_time_to_drain(manifests: tuple[Manifest, ...]) -> None:
    cluster = only(manifests, "RayService")["spec"]["rayClusterConfig"]
    (application,) = yaml.safe_load(only(manifests, "RayService")["spec"]["serveConfigV2"])["applications"]
    requests_s = ServeConfig.from_mapping(application["args"]).drain_timeout
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        variables = {variable["name"]: variable.get("value") for variable in pod["containers"][0]["env"]}
        drain_s = float(variables["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"])
        assert requests_s < drain_s < pod["terminationGracePeriodSeconds"]


def test_ray_asks_for_a_token_and_finds_its_redis(manifests: tuple[Manifest, ...]) -> None:
    cluster = only(manifests, "RayService")["spec"]["rayClusterConfig"]
    assert cluster["authOptions"]["mode"] == "token"
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    host, _, port = cluster["gcsFaultToleranceOptions"]["redisAddress"].partition(":")
    service = only(manifests, "Service")
    assert (service["metadata"]["name"], service["spec"]["ports"][0]["port"]) == (host, int(port))
    redis = only(manifests, "StatefulSet")["spec"]["template"]
    assert service["spec"]["selector"].items() <= redis["metadata"]["labels"].items()


def test_the_network_policy_covers_every_pod_and_opens_the_api_alone(manifests: tuple[Manifest, ...]) -> None:
    policy = only(manifests, "NetworkPolicy")["spec"]
    for labels, _ in pods(manifests):
        assert policy["podSelector"]["matchLabels"].items() <= labels.items()
    (to_all,) = (rule for rule in policy["ingress"] if "from" not in rule)
    assert to_all["ports"] == [{"port": 8000}]


def test_the_head_is_the_only_pod_that_a_budget_holds(manifests: tuple[Manifest, ...]) -> None:
    for manifest in manifests:
        if manifest["kind"] == "PodDisruptionBudget":
            assert manifest["spec"]["selector"]["matchLabels"]["ray.io/node-type"] == "head"
            # pods of a custom resource: Kubernetes cannot tell how many there should be
            assert manifest["spec"].keys() == {"minAvailable", "unhealthyPodEvictionPolicy", "selector"}


@pytest.mark.parametrize(
    ("charts", "overlays"), [("chart", "base"), ("chart-gpu-spot", "gpu-spot")], ids=["default", "gpu-spot"]
)
def test_the_chart_says_what_the_overlay_says(charts: str, overlays: str) -> None:
    chart, overlay = SOURCES[charts](), SOURCES[overlays]()
    fetched = ("PersistentVolumeClaim", "Job")
    kinds = sorted(manifest["kind"] for manifest in overlay if manifest["kind"] not in fetched)
    assert sorted(manifest["kind"] for manifest in chart) == kinds
    for kind in kinds:
        assert comparable(only(chart, kind)) == comparable(only(overlay, kind))


def comparable(manifest: Manifest) -> Manifest:
    """With the string of the application as a value, and without what says nothing."""
    if manifest["kind"] != "RayService":
        return manifest
    spec = dict(manifest["spec"])
    spec["serveConfigV2"] = yaml.safe_load(spec["serveConfigV2"])
    for group in spec["rayClusterConfig"]["workerGroupSpecs"]:
        group.setdefault("priority", 0)
    return manifest | {"spec": spec}


def test_the_monitor_reads_one_process() -> None:
    """Each API process tells the sums of all: reading every one would count everything several times."""
    component = yaml.safe_load((K8S / "components" / "monitoring" / "service-monitor.yaml").read_text())
    assert component["spec"]["selector"]["matchLabels"]["ray.io/node-type"] == "head"
    assert component["spec"] == only(SOURCES["chart-monitored"](), "ServiceMonitor")["spec"]
