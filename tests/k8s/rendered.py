"""The manifests as users apply them: rendered by kustomize and by Helm, where these are installed."""

from __future__ import annotations

import shutil
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.paths import ROOT

Manifest = dict[str, Any]

K8S = ROOT / "k8s"
CHART = K8S / "chart"
GPU_VALUES = CHART / "values-gpu-spot.yaml"


@cache
def kustomized(directory: str) -> tuple[Manifest, ...]:
    """What `kubectl apply -k` applies. Skips the test where there is neither kustomize nor kubectl."""
    tool = ["kustomize", "build"] if shutil.which("kustomize") else ["kubectl", "kustomize"]
    if shutil.which(tool[0]) is None:
        pytest.skip("neither kustomize nor kubectl is installed")
    done = subprocess.run([*tool, str(K8S / directory)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return tuple(document for document in yaml.safe_load_all(done.stdout) if document)


@cache
def charted(*, values: str = "", sets: str = "") -> tuple[Manifest, ...]:
    """What `helm install elastic-moe k8s/chart` applies, with a file of values and with `--set`.

    The command `helm` renders it, or else Helm's library from `pip install helm-python-sdk`. Skips the test where
    there is neither.
    """
    if shutil.which("helm"):
        arguments = [*(["-f", values] if values else []), *(["--set", sets] if sets else [])]
        command = ["helm", "template", "elastic-moe", str(CHART), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        texts = [done.stdout]
    else:
        helm = pytest.importorskip("helm_python", reason="neither helm nor helm-python-sdk is installed")
        merged = yaml.safe_load(Path(values).read_text()) if values else {}
        for key, value in helm.parse_set_string(sets).items():
            merged[key] = {**merged.get(key, {}), **value}
        with helm.Chart.load(str(CHART)) as chart:
            texts = [*chart.render(merged, name="elastic-moe", namespace="default").values()]
    return tuple(document for text in texts for document in yaml.safe_load_all(text) if document)


def only(manifests: tuple[Manifest, ...], kind: str) -> Manifest:
    (found,) = (manifest for manifest in manifests if manifest["kind"] == kind)
    return found
