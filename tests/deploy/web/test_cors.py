"""Which web pages may read answers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import httpx
import pytest

from elastic_moe.cluster.config import ServeConfig
from elastic_moe.cluster.errors import ConfigError

Call = Callable[..., httpx.Response]
PAGE = "https://chat.example.org"
ALLOWED = "access-control-allow-origin"


def ask(call: Call, method: str, path: str, config: dict[str, Any], origin: str = PAGE, **how: Any) -> httpx.Response:
    return call(method, path, config=config, headers={"origin": origin, **how.pop("headers", {})}, **how)


def test_without_the_flag_no_page_may() -> None:
    assert ServeConfig().origins == ()


@pytest.mark.parametrize("origins", [f"https://a.example, {PAGE}", f'["{PAGE}"]'])
def test_the_pages_that_were_named_may(call: Call, origins: str) -> None:
    config = {"allowed_origins": origins, "api_key": "secret"}
    question = {"access-control-request-method": "POST", "access-control-request-headers": "authorization"}
    # browsers send no key with the question
    answer = ask(call, "OPTIONS", "/v1/chat/completions", config, headers=question)
    assert (answer.status_code, answer.headers[ALLOWED]) == (200, PAGE)
    assert "POST" in answer.headers["access-control-allow-methods"]
    assert answer.headers["access-control-allow-headers"] == "authorization"
    # a page must be able to read why it was refused
    refused = ask(call, "GET", "/v1/models", config)
    assert (refused.status_code, refused.headers[ALLOWED]) == (401, PAGE)
    assert ALLOWED not in ask(call, "GET", "/v1/models", config, origin="https://evil.example").headers
    assert (
        ask(call, "OPTIONS", "/v1/models", config, origin="https://evil.example", headers=question).status_code == 400
    )


def test_every_page_may(call: Call) -> None:
    assert ask(call, "GET", "/health", {"allowed_origins": "*"}).headers[ALLOWED] == "*"
    answer = ask(call, "GET", "/health", {"allowed_origins": "*", "allow_credentials": True})
    assert answer.headers["access-control-allow-credentials"] == "true"
    assert ALLOWED not in ask(call, "GET", "/health", {}).headers


def test_an_allowed_page_changes_nothing_without_the_admin_key(call: Call) -> None:
    refused = ask(call, "POST", "/admin/scale", {"allowed_origins": "*"}, json={"workers": 1})
    assert (refused.status_code, refused.headers[ALLOWED]) == (403, "*")


@pytest.mark.parametrize("origins", ["chat.example.org", f"{PAGE}/", "[1]", "[", "https://a b"])
def test_what_is_no_origin(origins: str) -> None:
    with pytest.raises(ConfigError, match="allowed_origins"):
        ServeConfig(allowed_origins=origins)
