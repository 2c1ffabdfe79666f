"""The dashboard and the alert rules name metrics, labels and values that /metrics has."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

GRAFANA = Path(__file__).parents[2] / "deploy" / "grafana"
SELECTOR = re.compile(r"\b((?:vllm|emoe):\w+)(?:\{([^}]*)\})?")
MATCHER = re.compile(r'(\w+)\s*(=~|!=|=)\s*"([^"]*)"')
LEGEND = re.compile(r"\{\{\s*(?:\$labels\.)?([a-z_]+)\s*\}\}")

Labels = dict[str, set[str]]


@pytest.fixture(scope="module")
def rules() -> list[dict[str, Any]]:
    groups = yaml.safe_load((GRAFANA / "alerts.yaml").read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


@pytest.fixture(scope="module")
def dashboard() -> dict[str, Any]:
    read: dict[str, Any] = json.loads((GRAFANA / "dashboard.json").read_text())
    return read


@pytest.fixture
def served(call: Callable[..., httpx.Response]) -> dict[str, Labels]:
    """Of every sample of a scrape: its labels, with the values that they have."""
    found: dict[str, Labels] = {}
    for family in text_string_to_metric_families(call("GET", "/metrics").text):
        for sample in family.samples:
            labels = found.setdefault(sample.name, {})
            for label, value in sample.labels.items():
                labels.setdefault(label, set()).add(value)
    return found


def texts(value: Any) -> Iterator[str]:
    """Every text in a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from texts(part)


def unknown(text: str, served: dict[str, Labels]) -> Iterator[str]:
    for name, matchers in SELECTOR.findall(text):
        if name not in served:
            yield name
            continue
        for label, _, value in MATCHER.findall(matchers):
            known = served[name].get(label, set())
            wanted = set() if value.startswith("$") else set(value.split("|"))
            # of the rarer causes and results the scrape may know none yet, but never a label
            if label not in served[name] or (label == "state" and not wanted <= known):
                yield f"{name}{{{label}={value}}}"


def test_the_check_finds_what_is_not_there(served: dict[str, Labels]) -> None:
    wrong = 'emoe:worker + emoe:workers{kind="serving"} + emoe:workers{state="serving|asleep"} + emoe:ready{state="x"}'
    assert len(list(unknown(wrong, served))) == 4
    assert not list(unknown('emoe:workers{model_name="$model_name", state=~"serving|draining"}', served))


def test_the_alerts_name_what_exists(rules: list[dict[str, Any]], served: dict[str, Labels]) -> None:
    for rule in rules:
        assert SELECTOR.search(rule["expr"]), rule["alert"]
        assert not list(unknown(rule["expr"], served)), rule["alert"]
        assert rule["labels"]["severity"] in ("critical", "warning", "info")
        # a text may use the labels that the expression leaves
        left = set(re.findall(r"\w+", " ".join(re.findall(r"by \(([^)]*)\)", rule["expr"])))) or {"model_name"}
        assert set(LEGEND.findall(" ".join(rule["annotations"].values()))) <= left, rule["alert"]
    assert len({rule["alert"] for rule in rules}) == len(rules)


def test_the_readme_lists_every_alert(rules: list[dict[str, Any]]) -> None:
    assert {rule["alert"] for rule in rules} == set(re.findall(r"\bEmoe\w+", (GRAFANA / "README.md").read_text()))


def test_the_dashboard_names_what_exists(dashboard: dict[str, Any], served: dict[str, Labels]) -> None:
    named = [text for text in texts(dashboard) if SELECTOR.search(text)]
    assert len(named) > 30
    for text in named:
        assert not list(unknown(text, served)), text
    for panel in dashboard["panels"]:
        for target in panel.get("targets", ()):
            labels = {label for name, _ in SELECTOR.findall(target["expr"]) for label in served[name]}
            assert set(LEGEND.findall(target["legendFormat"])) <= labels, panel["title"]


def test_every_metric_is_on_the_dashboard(dashboard: dict[str, Any], served: dict[str, Labels]) -> None:
    """Those that count when a counter began say nothing to anybody."""
    shown = {name for text in texts(dashboard) for name, _ in SELECTOR.findall(text)}
    families = {re.sub(r"_(total|bucket|sum|count)$", "", name) for name in served if not name.endswith("_created")}
    assert families == {re.sub(r"_(total|bucket|sum|count)$", "", name) for name in shown}


def test_panels_do_not_overlap(dashboard: dict[str, Any]) -> None:
    taken: set[tuple[int, int]] = set()
    for panel in dashboard["panels"]:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & taken
        assert max(x for x, _ in cells) < 24
        taken |= cells
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
