"""/v1/responses: OpenAI's own client against it, and what is refused by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from elastic_moe.cluster.errors import RequestError
from tests.deploy.api.asking import error
from tests.deploy.api.test_openai_client import LETTERS
from tests.deploy.fakes import FakeBackend
from tests.deploy.listening import Server

Call = Callable[..., httpx.Response]
MODEL = "tiny-moe"


# --- The client -------------------------------------------------------------------------------------------------


def test_a_whole_response(client: openai.OpenAI) -> None:
    made = client.responses.create(model=MODEL, input="hello", metadata={"a": "b"}, temperature=0.5)
    assert (made.status, made.output_text, made.object) == ("completed", LETTERS, "response")
    assert made.id.startswith("resp_")
    assert made.usage is not None
    assert made.usage.output_tokens == len(LETTERS) + 1
    assert made.usage.total_tokens == made.usage.input_tokens + made.usage.output_tokens
    assert (made.metadata, made.temperature, made.tools, made.error) == ({"a": "b"}, 0.5, [], None)
    assert client.responses.retrieve(made.id) == made
    items = client.responses.input_items.list(made.id)
    assert [item.type for item in items.data] == ["message"]
    client.responses.delete(made.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(made.id)


def test_a_response_that_is_cut_off(client: openai.OpenAI) -> None:
    made = client.responses.create(model=MODEL, input="hello", max_output_tokens=3)
    assert (made.status, made.output_text) == ("incomplete", LETTERS[:3])
    assert made.incomplete_details is not None
    assert made.incomplete_details.reason == "max_output_tokens"


def test_a_stream(client: openai.OpenAI) -> None:
    events = list(client.responses.create(model=MODEL, input="hello", stream=True))
    kinds = [event.type for event in events if event.type != "response.output_text.delta"]
    assert kinds == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert "".join(deltas) == LETTERS
    last = events[-1]
    assert last.type == "response.completed"
    assert last.response.output_text == LETTERS
    # it can be continued as soon as its end is told
    assert client.responses.retrieve(last.response.id) == last.response


def test_the_clients_own_accumulation(client: openai.OpenAI) -> None:
    with client.responses.stream(model=MODEL, input="hello") as stream:
        stream.until_done()
        assert stream.get_final_response().output_text == LETTERS


def test_in_background(client: openai.OpenAI) -> None:
    queued = client.responses.create(model=MODEL, input="hello", background=True)
    assert (queued.status, queued.background) == ("queued", True)
    events = list(client.responses.retrieve(queued.id, stream=True))
    assert [event.type for event in events[:3]] == ["response.created", "response.queued", "response.in_progress"]
    again = list(client.responses.retrieve(queued.id, stream=True, starting_after=5))
    assert again == events[6:]
    whole = client.responses.retrieve(queued.id)
    assert (whole.status, whole.output_text) == ("completed", LETTERS)
    assert client.responses.cancel(queued.id) == whole


def test_a_background_stream_that_is_cut_goes_on(client: openai.OpenAI) -> None:
    stream = client.responses.create(model=MODEL, input="hello", background=True, stream=True)
    first = [next(stream) for _ in range(8)]
    stream.close()
    created = first[0]
    assert created.type == "response.created"
    rest = list(client.responses.retrieve(created.response.id, stream=True, starting_after=7))
    events = [*first, *rest]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert "".join(e.delta for e in events if e.type == "response.output_text.delta") == LETTERS


def test_log_probabilities(client: openai.OpenAI) -> None:
    made = client.responses.create(
        model=MODEL, input="hello", max_output_tokens=2, top_logprobs=1, include=["message.output_text.logprobs"]
    )
    item = made.output[0]
    assert item.type == "message"
    part = item.content[0]
    assert part.type == "output_text"
    assert part.logprobs is not None
    assert [(each.token, each.logprob, len(each.top_logprobs)) for each in part.logprobs] == [
        ("`", -0.5, 1),
        ("a", -0.5, 1),
    ]


def test_a_failure_is_a_response_that_failed(model_dir: Path) -> None:
    with Server(FakeBackend(fail_after=3), model_dir) as failing:
        client = openai.OpenAI(base_url=f"{failing.url}/v1", api_key="key", max_retries=0)
        events = list(client.responses.create(model=MODEL, input="hello", stream=True))
        last = events[-1]
        assert last.type == "response.failed"
        assert last.response.error is not None
        assert (last.response.error.code, last.response.error.message) == ("server_error", "worker w1 is lost")
        queued = client.responses.create(model=MODEL, input="hello", background=True)
        list(client.responses.retrieve(queued.id, stream=True))
        assert client.responses.retrieve(queued.id).status == "failed"
        with pytest.raises(openai.InternalServerError):
            client.responses.create(model=MODEL, input="hello")
        client.close()


# --- What is refused --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "input"),
        ({"input": 3}, "input"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input.0.content.0.type"),
        ({"previous_response_id": "resp_nobody"}, "previous_response_id"),
        ({"previous_response_id": "resp_" + 48 * "0"}, "previous_response_id"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"prompt": {"id": "p"}}, "prompt"),
        ({"truncation": "auto"}, "truncation"),
        ({"service_tier": "flex"}, "service_tier"),
        ({"max_tokens": 3}, "max_tokens"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"max_output_tokens": 1000}, "max_output_tokens"),
        ({"input": "hello " * 1000}, "input"),
        ({"top_p": 2}, "top_p"),
        ({"n": 2}, "n"),
        ({"stop": [""]}, "stop"),
        ({"use_beam_search": True}, "use_beam_search"),
        ({"include": ["file_search_call.results"]}, "include.0"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"stream_options": {"include_obfuscation": False}}, "stream_options"),
        ({"background": True, "store": False}, "background"),
        ({"background": True, "include": ["message.output_text.logprobs"]}, "include"),
        ({"tools": [{"type": "web_search"}]}, "tools.0.type"),
        ({"tools": [{"type": "function"}]}, "tools.0.name"),
        ({"reasoning": {"summary": "detailed"}}, "reasoning.summary"),
        ({"text": {"format": {"type": "grammar"}}}, "text.format.type"),
        ({"text": {"format": {"type": "json_schema", "schema": {}}}}, "text.format.name"),
        ({"text": {"verbosity": "low"}}, "text.verbosity"),
        ({"metadata": {"a": 3}}, "metadata.a"),
        ({"model": "nobody"}, "model"),
    ],
)
def test_a_fault_is_named(call: Call, body: dict[str, Any], param: str) -> None:
    given = {"input": "hello", **body} if body else {}
    found = error(call("POST", "/v1/responses", json=given), 404 if param == "model" else 400)
    assert found["param"] == param
    assert found["message"].startswith(param) or param in ("model", "input"), found


@pytest.mark.parametrize(
    ("method", "path", "status", "param"),
    [
        ("GET", "/v1/responses/resp_1", 404, "response_id"),
        ("DELETE", "/v1/responses/resp_1", 404, "response_id"),
        ("POST", "/v1/responses/resp_1/cancel", 404, "response_id"),
        ("GET", "/v1/responses/resp_1/input_items", 404, "response_id"),
        ("GET", "/v1/responses/resp_1?stream=yes", 400, "stream"),
        ("GET", "/v1/responses/resp_1?stream=true&starting_after=-1", 400, "starting_after"),
    ],
)
def test_questions_for_what_is_not_there(call: Call, method: str, path: str, status: int, param: str) -> None:
    assert error(call(method, path), status)["param"] == param


def test_a_response_that_was_not_in_background_cannot_be_cancelled_or_streamed_again(client: openai.OpenAI) -> None:
    made = client.responses.create(model=MODEL, input="hello", max_output_tokens=1)
    with pytest.raises(openai.BadRequestError):
        client.responses.cancel(made.id)
    with pytest.raises(openai.BadRequestError):
        list(client.responses.retrieve(made.id, stream=True))


def test_the_engines_refusal_names_the_clients_field(call: Call) -> None:
    backend = FakeBackend(refuse=RequestError("max_tokens: too many", param="max_tokens"))
    for stream in (False, True):
        found = error(call("POST", "/v1/responses", json={"input": "x", "stream": stream}, backend=backend), 400)
        assert found["param"] == "max_output_tokens"


def test_input_items_come_in_pages(client: openai.OpenAI) -> None:
    turns = [{"role": "user", "content": str(number)} for number in range(5)]
    made = client.responses.create(model=MODEL, input=turns, max_output_tokens=1)  # type: ignore[arg-type]
    listed = list(client.responses.input_items.list(made.id, limit=2, order="asc"))
    assert [item.content[0].text for item in listed] == list("01234")  # type: ignore[union-attr]
    newest = client.responses.input_items.list(made.id, limit=1)
    assert (newest.data[0].content[0].text, newest.has_more) == ("4", True)  # type: ignore[union-attr]
