"""The parser of answers against transformers' own, for every family and in pieces of every size."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers.utils.chat_parsing import parse_response

from elastic_moe.cluster.errors import ConfigError
from elastic_moe.deploy.parsing.events import CallArguments, CallBegin, CallEnd, Event, TextKind, TextPiece
from elastic_moe.deploy.parsing.formats import AnswerForm, chosen_form, families, family_called
from elastic_moe.deploy.parsing.parser import AnswerParser, all_events
from tests.deploy.parsing.written import FAMILIES, Call, Written, as_json

TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string"},
                    "days": {"type": "integer"},
                    "exact": {"type": ["boolean", "null"]},
                    "near": {"type": "array", "items": {"type": "string"}},
                },
            },
        },
    },
    {"type": "function", "function": {"name": "stop"}},
]

WORDS = st.text(st.sampled_from("abc XY.,:'\"{}[]\\\n\t日é😀=()"), max_size=20)
SHOWN = WORDS.map(str.strip)
ARGUMENTS = st.fixed_dictionaries(
    {},
    optional={
        "city": WORDS.map(str.strip),
        "days": st.integers(-5, 1000),
        "exact": st.sampled_from([True, False, None]),
        "near": st.lists(st.sampled_from(["Rome", 'St. "Gall"', "日本"]), max_size=2),
    },
)
CALLS = st.one_of(st.tuples(st.just("get_weather"), ARGUMENTS), st.tuples(st.just("stop"), st.just({})))


def form_of(name: str) -> AnswerForm:
    reasoning = FAMILIES[name].family_of_reasoning
    return AnswerForm(tools=family_called(name), reasoning=family_called(reasoning) if reasoning else None)


def pieces(text: str, rng: random.Random, most: int) -> list[str]:
    cut: list[str] = []
    while text:
        size = rng.randint(1, most)
        cut.append(text[:size])
        text = text[size:]
    return cut


def said(events: Sequence[Event], kind: TextKind) -> str:
    return "".join(event.text for event in events if isinstance(event, TextPiece) and event.kind is kind)


def calls_in(events: Sequence[Event]) -> list[tuple[str, str]]:
    """Names and arguments; what OpenAI's clients do with the deltas."""
    calls: list[tuple[str, str]] = []
    for event in events:
        if isinstance(event, CallBegin):
            assert event.index == len(calls)
            calls.append((event.name, ""))
        elif isinstance(event, CallArguments):
            assert event.index == len(calls) - 1
            calls[-1] = (calls[-1][0], calls[-1][1] + event.text)
    return calls


def parsed(form: AnswerForm, text: str, prompt: str = "") -> tuple[str, str, list[Any]]:
    """Reasoning, content and calls as transformers finds them."""
    spec = form.spec(tools=True)
    assert spec is not None
    message = parse_response(text, spec, prefix=prompt, tools=TOOLS)
    reasoning = message.get("reasoning_content", "")
    content = [part.strip() for part in message.get("content", [])]
    calls = message.get("tool_calls", [])
    calls = [call for each in calls for call in (each if isinstance(each, list) else [each])]
    functions = [(call["function"]["name"], call["function"].get("arguments", {})) for call in calls]
    return reasoning, "\n".join(part for part in content if part), functions


def text_of(family: Written, reasoning: str, content: str, calls: Sequence[Call]) -> str:
    text = family.calls(calls[: family.most_calls]) if calls else ""
    if not family.before:
        return text
    if content:
        text = family.content[0] + content + family.content[1] + text
    if reasoning and family.family_of_reasoning:
        text = family.reasoning[0] + reasoning + family.reasoning[1] + text
    return text


@pytest.mark.parametrize("name", sorted(FAMILIES))
@given(data=st.data())
def test_it_agrees_with_transformers(name: str, data: st.DataObject) -> None:
    family, form = FAMILIES[name], form_of(name)
    reasoning, content = data.draw(SHOWN), data.draw(SHOWN)
    calls = data.draw(st.lists(CALLS, max_size=family.most_calls))
    if name == "gemma4":
        # its quotes of strings cannot be escaped, and transformers reads words before a colon as keys
        calls = [(tool, {k: v for k, v in args.items() if k in ("days", "exact")}) for tool, args in calls]
    text = text_of(family, reasoning, content, calls)
    rng = random.Random(data.draw(st.integers(0, 9)))
    events = list(
        all_events(AnswerParser(form, tools=TOOLS), pieces(text, rng, data.draw(st.sampled_from([1, 3, 99]))))
    )

    expected = parsed(form, text)
    assert said(events, TextKind.REASONING) == expected[0]
    assert said(events, TextKind.CONTENT).strip() == expected[1]
    assert [(tool, json.loads(arguments)) for tool, arguments in calls_in(events)] == expected[2]
    if calls:
        assert [(tool, dict(args)) for tool, args in calls[: family.most_calls]] == expected[2]
