"""Whether Kubernetes would take a manifest: KubeRay's own schema for a RayService, Kubernetes' for everything else."""

from __future__ import annotations

import copy
import gzip
import json
from functools import cache
from typing import Any

import jsonschema
import kubernetes_validate

from tests.paths import ROOT

CRD = ROOT / "tests" / "k8s" / "rayservices-v1.json.gz"
KUBERNETES = "1.33"
"""The version whose schemas are used: one that clusters run today."""
Manifest = dict[str, Any]


def check(manifest: Manifest) -> None:
    """Raises ValidationError where the API server would refuse the manifest, or would drop a key of it silently.

    A ServiceMonitor is passed over: its schema belongs to the Prometheus operator.
    """
    if manifest["kind"] == "RayService":
        check_rayservice(manifest)
    elif manifest["kind"] != "ServiceMonitor":
        kubernetes_validate.validate(manifest, KUBERNETES, strict=True)


def check_rayservice(manifest: Manifest) -> None:
    body = {key: copy.deepcopy(value) for key, value in manifest.items() if key != "metadata"}
    _validator().validate(with_defaults(body, _schema()))


@cache
def _schema() -> Any:
    versions = json.loads(gzip.decompress(CRD.read_bytes()))["spec"]["versions"]
    return next(version for version in versions if version["name"] == "v1")["schema"]["openAPIV3Schema"]


@cache
def _validator() -> jsonschema.Draft202012Validator:
    # jsonschema.validate would check the schema itself at each call, which takes seconds
    return jsonschema.Draft202012Validator(_strict(_schema()))


def _strict(schema: Any) -> Any:
    """The schema, refusing keys it does not name: the API server would drop them silently."""
    if isinstance(schema, dict):
        schema = {key: _strict(value) for key, value in schema.items()}
        if "properties" in schema and not schema.get("x-kubernetes-preserve-unknown-fields"):
            schema.setdefault("additionalProperties", False)
    return schema


def with_defaults(value: Any, schema: Any) -> Any:
    """The manifest as the API server would store it."""
    if isinstance(value, dict):
        for key, part in schema.get("properties", {}).items():
            if key not in value and "default" in part:
                value[key] = copy.deepcopy(part["default"])
            if key in value:
                value[key] = with_defaults(value[key], part)
    elif isinstance(value, list):
        value = [with_defaults(item, schema.get("items", {})) for item in value]
    return value
