"""Reasoning, text and calls of a response as items and events, the same however they are cut and read."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from tests.deploy.conftest import client_of
from tests.deploy.fakes import FakeBackend
from tests.deploy.parsing.written import FAMILIES
from tests.deploy.responses.replicas import events_of
from tests.deploy.tools.test_chats import HERMES, HOW, ROME, Model, model

TOOLS = [
    {"type": "function", "name": "get_weather", "parameters": {"properties": {"city": {"type": "string"}}}},
    {"type": "function", "name": "stop"},
]
THOUGHT = "<think>\nWhere is it?\n</think>\n\n"
TEXT = THOUGHT + "Let me see.\n" + FAMILIES["hermes"].calls([ROME, ("stop", {})])
ASKED: dict[str, Any] = {"input": "hi", "tools": TOOLS}


@pytest.fixture(scope="module")
def hermes(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return model(tmp_path_factory.mktemp("hermes"), template=HERMES + "{# <think> #}")


def writing(hermes: Model, text: str, chunk: int = 1, cut: int = 0) -> FakeBackend:
    tokens = hermes.tokenizer.encode(text, add_special_tokens=False).ids
    return FakeBackend(script=lambda _: tokens[: len(tokens) - cut], chunk=chunk, **HOW)


def ask(hermes: Model, backend: FakeBackend, *, interval: int = 1, **body: Any) -> Any:
    """The response, or the events of a stream."""

    async def work() -> Any:
        async with client_of(backend, hermes.directory, stream_interval=interval) as client:
            response = await client.post("/v1/responses", json={**ASKED, **body})
            return events_of(response) if body.get("stream") else response.json()

    return asyncio.run(work())


def shapes(output: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    """The items without ids."""
    made: list[tuple[Any, ...]] = []
    for item in output:
        if item["type"] == "function_call":
            made.append((item["type"], item["status"], item["name"], item["arguments"]))
        else:
            made.append((item["type"], item["status"], "".join(part["text"] for part in item["content"])))
    return made


WHOLE = [
    ("reasoning", "completed", "Where is it?"),
    ("message", "completed", "Let me see."),
    ("function_call", "completed", "get_weather", '{"city": "Rome"}'),
    ("function_call", "completed", "stop", "{}"),
]


@pytest.mark.parametrize("chunk", [1, 7, 500])
def test_items_of_an_answer(hermes: Model, chunk: int) -> None:
    response = ask(hermes, writing(hermes, TEXT, chunk))
    assert (response["status"], shapes(response["output"])) == ("completed", WHOLE)
    assert 0 < response["usage"]["output_tokens_details"]["reasoning_tokens"] < response["usage"]["output_tokens"]
    ids = [item["id"] for item in response["output"]]
    assert [name.split("_")[0] for name in ids] == ["rs", "msg", "fc", "fc"]
    assert len({*ids, *(item.get("call_id") for item in response["output"])}) == 7


def test_parts_of_several_tokens_say_the_same(hermes: Model) -> None:
    singly, five = (ask(hermes, writing(hermes, TEXT, 1), stream=True, interval=interval) for interval in (1, 5))
    assert shapes(five[-1]["response"]["output"]) == shapes(singly[-1]["response"]["output"]) == WHOLE
    few, many = (sum(event["type"].endswith(".delta") for event in events) for events in (five, singly))
    assert few < 0.5 * many
    assert [event["sequence_number"] for event in five] == list(range(len(five)))


def test_events_are_the_same_however_tokens_come(hermes: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("elastic_moe.deploy.api.responses_route.new_response_id", lambda: "resp_" + 48 * "7")
    monkeypatch.setattr("time.time", lambda: 1e9)
    one, many = (ask(hermes, writing(hermes, TEXT, chunk), stream=True) for chunk in (1, 30))
    assert one == many
    kinds = [event["type"].removeprefix("response.") for event in one if not event["type"].endswith(".delta")]
    item = ["output_item.added", "content_part.added"]
    call = ["output_item.added", "function_call_arguments.done", "output_item.done"]
    assert kinds == [
        *("created", "in_progress"),
        *item,
        *("reasoning_text.done", "content_part.done", "output_item.done"),
        *item,
        *("output_text.done", "content_part.done", "output_item.done"),
        *call,
        *call,
        "completed",
    ]
    assert [event["sequence_number"] for event in one] == list(range(len(one)))
    pieces: dict[int, str] = {}
    for event in one:
        if event["type"].endswith(".delta"):
            pieces[event["output_index"]] = pieces.get(event["output_index"], "") + event["delta"]
    assert list(pieces.values()) == [shape[-1] for shape in WHOLE]
    done = [event["item"] for event in one if event["type"] == "response.output_item.done"]
    assert done == one[-1]["response"]["output"]


def test_a_call_that_was_cut_off_is_incomplete(hermes: Model) -> None:
    text = FAMILIES["hermes"].calls([ROME])
    tokens = len(hermes.tokenizer.encode(text, add_special_tokens=False).ids)
    response = ask(hermes, writing(hermes, text), max_output_tokens=tokens - 20)
    assert response["status"] == "incomplete"
    (item,) = response["output"]
    assert (item["type"], item["status"]) == ("function_call", "incomplete")


def test_a_tools_result_goes_on_from_the_previous_response(hermes: Model) -> None:
    async def work() -> str:
        backend = writing(hermes, TEXT)
        async with client_of(backend, hermes.directory) as client:
            first = (await client.post("/v1/responses", json={**ASKED, "background": True})).json()
            whole = events_of(await client.get(f"/v1/responses/{first['id']}", params={"stream": "true"}))
            calls = [item for item in whole[-1]["response"]["output"] if item["type"] == "function_call"]
            results = [
                {"type": "function_call_output", "call_id": call["call_id"], "output": f"result {number}"}
                for number, call in enumerate(calls)
            ]
            body = {**ASKED, "input": results, "previous_response_id": first["id"]}
            assert (await client.post("/v1/responses", json=body)).status_code == 200
            wrong = {**body, "input": [{**results[0], "call_id": "call_x"}]}
            refused = await client.post("/v1/responses", json=wrong)
            assert (refused.status_code, refused.json()["error"]["param"]) == (400, "input")
        return str(hermes.tokenizer.decode(backend.requests[-1].prompt_token_ids, skip_special_tokens=False))

    prompt = asyncio.run(work())
    assert "get_weather city=Rome" in prompt
    assert prompt.index("result 0") < prompt.index("result 1")


@pytest.mark.parametrize(
    ("choice", "tools", "param"),
    [
        ({"type": "function", "name": "nobody"}, TOOLS, "tool_choice"),
        ({"type": "mcp", "server_label": "x"}, TOOLS, "tool_choice.type"),
        ("required", [], "tool_choice"),
        ("auto", [{"type": "function", "name": "no spaces"}], "tools.0.name"),
    ],
)
def test_a_wrong_choice_is_named(hermes: Model, choice: Any, tools: list[Any], param: str) -> None:
    response = ask(hermes, writing(hermes, TEXT), tool_choice=choice, tools=tools)
    assert response["error"]["param"] == param, json.dumps(response)


def test_structured_output_and_a_required_call_have_a_grammar(hermes: Model) -> None:
    backend = writing(hermes, "{}")
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    wanted = {"format": {"type": "json_schema", "name": "x", "schema": schema, "strict": True}}
    response = ask(hermes, backend, tools=[], text=wanted)
    assert response["text"] == wanted
    ask(hermes, backend, tool_choice="required")
    assert all(request.params.grammar is not None for request in backend.requests)
    refused = ask(hermes, backend, tools=[], text={"format": {**wanted["format"], "schema": {"type": "nothing"}}})
    assert refused["error"]["param"] == "text.format.schema"
