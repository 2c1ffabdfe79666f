"""`serve.yaml` says what Ray Serve and this project understand, to the key. k8s/ is tested in kuberay/, and the files
of `ray up` in ray_up/."""

from __future__ import annotations

import pytest
import yaml

from elastic_moe.cluster.config import ServeConfig
from tests.paths import ROOT


@pytest.mark.filterwarnings("ignore:Using extra keyword arguments on `Field`")  # of Ray's own schema module
def test_serve_yaml() -> None:
    from ray.serve.schema import ServeDeploySchema

    data = yaml.safe_load((ROOT / "deploy" / "serve.yaml").read_text())
    ServeDeploySchema.model_validate(data)
    # Ray accepts misspelled keys
    assert set(data) <= set(ServeDeploySchema.model_fields)
    (application,) = data["applications"]
    assert application["import_path"] == "elastic_moe.deploy.launch.serve_app:build_app"
    ServeConfig.from_mapping(application["args"])
