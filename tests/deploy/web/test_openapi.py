"""The description of the calls: complete, and true of what the server answers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import httpx
import pytest
from pydantic import BaseModel

from elastic_moe.cluster.config import ServeConfig
from elastic_moe.cluster.errors import ConfigError
from elastic_moe.deploy.bodies.schema import ChatCompletionRequest, CompletionRequest

Call = Callable[..., httpx.Response]
WITHOUT_BODY = {"/is_scaling_elastic_ep", "/ping"}


@pytest.fixture
def document(call: Call) -> dict[str, Any]:
    return dict(call("GET", "/openapi.json").json())


def operations(document: dict[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    return {(m, path): o for path, methods in document["paths"].items() for m, o in methods.items()}


def test_every_call_that_takes_a_body_describes_it(document: dict[str, Any]) -> None:
    without = {path for (m, path), o in operations(document).items() if m in ("post", "put") and "requestBody" not in o}
    assert {path for path in without if not path.endswith("/cancel")} == WITHOUT_BODY


def test_every_call_describes_its_errors(document: dict[str, Any]) -> None:
    for call, operation in operations(document).items():
        assert {"401", "403", "500", "503"} <= set(operation["responses"]), call
        assert "422" not in operation["responses"], call
        if "requestBody" in operation:
            assert {"400", "413", "415"} <= set(operation["responses"]), call


def test_an_answer_without_a_body_has_no_content(document: dict[str, Any]) -> None:
    for path, method in (("/health", "get"), ("/ping", "get"), ("/ping", "post")):
        assert "content" not in document["paths"][path][method]["responses"]["200"]
    assert "application/json" in document["paths"]["/version"]["get"]["responses"]["200"]["content"]


def test_every_reference_has_its_definition(document: dict[str, Any]) -> None:
    def references(value: Any) -> set[str]:
        if isinstance(value, dict):
            own = {value["$ref"]} if isinstance(value.get("$ref"), str) else set()
            return own.union(*map(references, value.values()))
        return set().union(*map(references, value)) if isinstance(value, list) else set()

    names = {name.removeprefix("#/components/schemas/") for name in references(document)}
    assert names <= set(document["components"]["schemas"])


@pytest.mark.parametrize("body", [CompletionRequest, ChatCompletionRequest])
def test_every_field_of_a_body_is_in_it(document: dict[str, Any], body: type[BaseModel]) -> None:
    path = "/v1/completions" if body is CompletionRequest else "/v1/chat/completions"
    schema = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert set(schema["properties"]) == set(body.model_fields)


def test_the_page_shows_every_call(call: Call, document: dict[str, Any]) -> None:
    answer = call("GET", "/docs")
    assert answer.headers["content-type"].startswith("text/html")
    assert "<script" not in answer.text
    for method, path in operations(document):
        assert f"{method.upper()} {path}" in answer.text
    assert "prompt_logprobs" in answer.text


def test_a_path_under_which_a_proxy_serves(call: Call) -> None:
    """The proxy may remove the path, or pass it on; the keys are asked for either way."""
    config = {"root_path": "/llm", "api_key": "secret"}
    assert call("GET", "/llm/openapi.json", config=config).json()["servers"] == [{"url": "/llm"}]
    for path in ("/v1/models", "/llm/v1/models"):
        assert call("GET", path, config=config).status_code == 401
        key = {"authorization": "Bearer secret"}
        assert call("GET", path, config=config, headers=key).json()["object"] == "list"
    for path in ("/llm/admin/scale", "/admin/scale"):
        headers = {"origin": "https://evil.example"}
        assert call("POST", path, config=config, headers=headers, json={"workers": 1}).status_code == 403
    assert call("GET", "/llmx/health", config=config, headers=key).status_code == 404
    moved = call("GET", "/llm", config=config)
    assert (moved.status_code, moved.headers["location"]) == (307, "/llm/")
    assert "text/html" in call("GET", "/llm/", config=config).headers["content-type"]


@pytest.mark.parametrize("path", ["llm", "/llm/", "/v1", "/admin/x", "/a b", "//x"])
def test_what_cannot_be_a_root_path(path: str) -> None:
    with pytest.raises(ConfigError, match="root_path"):
        ServeConfig(root_path=path)
