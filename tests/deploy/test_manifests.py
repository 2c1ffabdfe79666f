"""The files that start clusters say what Ray, KubeRay and this project understand, to the key."""

from __future__ import annotations

import copy
import gzip
import json
from typing import Any

import jsonschema
import pytest
import yaml

from elastic_moe.cluster.config import ServeConfig
from tests.paths import ROOT

CRD = ROOT / "tests" / "deploy" / "kuberay" / "rayservices-v1.json.gz"


# of Ray's own schema module, under pydantic 2
pytestmark = pytest.mark.filterwarnings("ignore:Using extra keyword arguments on `Field`")


def serve_config(text: str) -> None:
    """Fails where Ray Serve or ServeConfig would refuse it. Ray accepts misspelled keys; they are looked for here."""
    from ray.serve.schema import ServeDeploySchema

    data = yaml.safe_load(text)
    ServeDeploySchema.model_validate(data)
    assert set(data) <= set(ServeDeploySchema.model_fields)
    for application in data["applications"]:
        assert application["import_path"] == "elastic_moe.deploy.launch.serve_app:build_app"
        ServeConfig.from_mapping(application["args"])


def test_serve_yaml() -> None:
    serve_config((ROOT / "deploy" / "serve.yaml").read_text())


def test_rayservice_serve_config() -> None:
    manifest = yaml.safe_load((ROOT / "k8s" / "rayservice.yaml").read_text())
    serve_config(manifest["spec"]["serveConfigV2"])


def strict(schema: Any) -> Any:
    """The schema, refusing keys it does not name: the API server would drop them silently."""
    if isinstance(schema, dict):
        schema = {key: strict(value) for key, value in schema.items()}
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


def test_rayservice_fits_kuberays_schema() -> None:
    manifest = yaml.safe_load((ROOT / "k8s" / "rayservice.yaml").read_text())
    versions = json.loads(gzip.decompress(CRD.read_bytes()))["spec"]["versions"]
    schema = next(v for v in versions if v["name"] == "v1")["schema"]["openAPIV3Schema"]
    body = {key: value for key, value in manifest.items() if key != "metadata"}
    # jsonschema.validate would check the schema itself at each call, which takes seconds
    validator = jsonschema.Draft202012Validator(strict(schema))
    validator.validate(with_defaults(body, schema))
    with pytest.raises(jsonschema.ValidationError):
        validator.validate(with_defaults(body | {"spec": {"serveConfigV3": ""}}, schema))


def test_ray_up_file(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = yaml.safe_load((ROOT / "deploy" / "ray-cluster.yaml").read_text())
    validate_config(prepare_config(copy.deepcopy(config)))
    with pytest.raises(Exception, match="misspelled"):
        validate_config(prepare_config(copy.deepcopy(config) | {"misspelled": 1}))
