"""Fields that are unknown are ignored, and the log tells of each once."""

from __future__ import annotations

import logging
from collections.abc import Callable

import httpx
import pytest

from elastic_moe.deploy.bodies import bodies
from elastic_moe.deploy.bodies.responses import ResponsesRequest
from elastic_moe.deploy.bodies.schema import parse
from elastic_moe.deploy.bodies.unknown import MOST_NAMES, PAUSE_S, UnknownFields

Call = Callable[..., httpx.Response]


@pytest.mark.parametrize("prompt", ["a", "a" * bodies.LARGE_BYTES])
def test_a_misspelt_field_is_named_in_the_log(call: Call, caplog: pytest.LogCaptureFixture, prompt: str) -> None:
    """Also of a body that another process has decoded."""
    body = {"prompt": prompt, "max_tokens": 1, "temprature": 0, "user": "me", "truncate_prompt_tokens": 2}
    assert call("POST", "/v1/completions", json=body).status_code == 200
    told = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert told == ["fields of a request to /v1/completions are unknown and ignored: 'temprature'"]


def test_further_sampling_fields_of_responses_are_known() -> None:
    body = parse(ResponsesRequest, {"input": "a", "top_k": 3, "min_p": 0.1, "user": "me", "toppk": 3})
    assert body.unknown == ("toppk",)


def test_the_log_is_not_filled(caplog: pytest.LogCaptureFixture) -> None:
    fields = UnknownFields()
    fields.seen(["a"], "/x", 0.0)
    fields.seen(["a", "b"], "/x", PAUSE_S / 2)
    fields.seen(["a", "b"], "/x", PAUSE_S + 1)
    fields.seen(["a", "b"], "/x", 3 * PAUSE_S)
    assert [record.getMessage().partition(": ")[2] for record in caplog.records] == ["'a'", "'b'"]
    caplog.clear()
    for number in range(3 * MOST_NAMES):
        fields.seen([f"name {number}", "long" * 999], "/x", PAUSE_S * (10 + 2 * number))
    assert len(caplog.records) == MOST_NAMES - 3
    assert all(len(record.getMessage()) < 200 for record in caplog.records)
