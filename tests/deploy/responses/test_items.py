"""Items of a conversation, as clients send them and as templates get them."""

from __future__ import annotations

from typing import Any

import pytest

from elastic_moe.cluster.errors import RequestError
from elastic_moe.deploy.responses.items import input_items, messages

CALL = {"type": "function_call", "call_id": "c1", "name": "f", "arguments": '{"x": 1}'}
OUTPUT = {"type": "function_call_output", "call_id": "c1", "output": "2"}
TEMPLATE_CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}


def made(given: Any, instructions: str | None = None) -> list[dict[str, Any]]:
    return messages(input_items(given, "s"), instructions)


def test_a_string_is_a_message_of_the_user() -> None:
    assert input_items("hi", "s") == [
        {
            "id": "msg_s0000",
            "type": "message",
            "role": "user",
            "content": [{"type": "input_text", "text": "hi"}],
            "status": "completed",
        }
    ]
    assert made("hi", "be brief") == [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "hi"},
    ]


def test_an_agents_turns() -> None:
    thought = {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]}
    said = {"role": "assistant", "content": [{"type": "output_text", "text": "I look"}]}
    more = {**CALL, "call_id": "c2"}
    answer = {**OUTPUT, "call_id": "c2", "output": [{"type": "input_text", "text": "3"}]}
    given = [{"role": "user", "content": "x?"}, thought, said, CALL, more, OUTPUT, answer, thought, CALL, OUTPUT]
    assert made(given) == [
        {"role": "user", "content": "x?"},
        {
            "role": "assistant",
            "content": "I look",
            "reasoning_content": "hm",
            "tool_calls": [TEMPLATE_CALL, {**TEMPLATE_CALL, "id": "c2"}],
        },
        {"role": "tool", "tool_call_id": "c1", "content": "2"},
        {"role": "tool", "tool_call_id": "c2", "content": "3"},
        {"role": "assistant", "content": None, "reasoning_content": "hm", "tool_calls": [TEMPLATE_CALL]},
        {"role": "tool", "tool_call_id": "c1", "content": "2"},
    ]


def test_items_of_an_answer_may_be_sent_back_as_they_came() -> None:
    own = {"type": "output_text", "text": "yes", "annotations": [], "logprobs": []}
    item = {"id": "msg_1", "type": "message", "status": "completed", "role": "assistant", "content": [own]}
    assert input_items([item], "s") == [
        {**item, "content": [{"type": "output_text", "text": "yes", "annotations": []}]}
    ]


@pytest.mark.parametrize(
    ("item", "param"),
    [
        ({"role": "boss", "content": "x"}, "input.0.role"),
        ({"role": "user"}, "input.0.content"),
        ({"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}, "input.0.content.0.type"),
        ({"role": "user", "content": [{"type": "input_text", "text": 3}]}, "input.0.content.0.text"),
        ({"role": "user", "content": [3]}, "input.0.content.0"),
        ({"type": "item_reference", "id": "x"}, "input.0.type"),
        ({"type": "web_search_call"}, "input.0.type"),
        ({}, "input.0.type"),
        ({**CALL, "name": None}, "input.0.name"),
        ({**CALL, "arguments": {}}, "input.0.arguments"),
        ({"type": "function_call_output", "call_id": "c1"}, "input.0.output"),
        (OUTPUT, "input"),
    ],
)
def test_a_wrong_item_is_named(item: dict[str, Any], param: str) -> None:
    with pytest.raises(RequestError) as raised:
        made([item])
    assert raised.value.param == param
