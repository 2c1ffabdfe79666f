"""The parser of answers against transformers' own, for every family and in pieces of every size."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.utils.chat_parsing import parse_response

from elastic_moe.cluster.errors import ConfigError
from elastic_moe.deploy.parsing.events import CallArguments, CallBegin, CallEnd, Event, TextKind, TextPiece
from elastic_moe.deploy.parsing.formats import AnswerForm, chosen_form, families, family_called, loaded
from elastic_moe.deploy.parsing.parser import AnswerParser, begun_answer
from elastic_moe.deploy.parsing.regions import Regions
from tests.deploy.parsing.written import FAMILIES, Call, Written, form_of

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


def all_events(parser: AnswerParser, pieces: Iterable[str]) -> Iterator[Event]:
    """The events of a whole text in pieces."""
    for text in pieces:
        yield from parser.push(text)
    yield from parser.end()


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
@settings(max_examples=25, deadline=None)
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


def test_values_of_tags_have_the_types_of_the_schema() -> None:
    text = FAMILIES["qwen3_coder"].calls([("get_weather", {"city": "7", "days": 7, "exact": None, "near": ["x"]})])
    events = list(all_events(AnswerParser(form_of("qwen3_coder"), tools=TOOLS), [text]))
    (arguments,) = [json.loads(arguments) for _, arguments in calls_in(events)]
    assert arguments == {"city": "7", "days": 7, "exact": None, "near": ["x"]}


def test_arguments_come_before_the_call_is_complete() -> None:
    text = FAMILIES["hermes"].calls([("get_weather", {"city": "Rome", "days": 2})])
    parser = AnswerParser(form_of("hermes"), tools=TOOLS)
    events = parser.push(text[: text.index("days")])
    assert calls_in(events) == [("get_weather", '{"city": "Rome", "')]
    assert not parser.called
    events += [*parser.push(text[text.index("days") :]), *parser.end()]
    assert calls_in(events) == [("get_weather", '{"city": "Rome", "days": 2}')]
    assert parser.called


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_a_call_that_is_cut_off_keeps_what_came(name: str) -> None:
    """As OpenAI's API does where max_tokens ends an answer. Never an error, and the call does not count as finished."""
    arguments = {"days": 12345, "exact": True}
    text = FAMILIES[name].calls([("get_weather", arguments)])
    for cut in range(len(text)):
        parser = AnswerParser(form_of(name), tools=TOOLS)
        events = list(all_events(parser, [text[:cut]]))
        for called, written in calls_in(events):
            assert called == "get_weather"
            whole = json.dumps(arguments)
            assert whole.startswith(written) or json.loads(written) == arguments
        ends = [event for event in events if isinstance(event, CallEnd)]
        assert parser.called == (bool(ends) and all(event.complete for event in ends))


@pytest.mark.parametrize(
    "text",
    [
        "<tool_call>\nno json\n</tool_call>",
        '<tool_call>{"arguments": {}}</tool_call>',
        "<tool_call>{}</tool_call>",
        "<tool_call>",
    ],
)
def test_what_is_no_call_is_content(text: str) -> None:
    """A call without a name cannot be made; the client sees what the model wrote."""
    events = list(all_events(AnswerParser(form_of("hermes"), tools=TOOLS), ["Well,\n", *text]))
    assert calls_in(events) == []
    assert said(events, TextKind.CONTENT) == f"Well,\n{text}"


def test_arguments_that_are_no_json_are_passed_on() -> None:
    text = (
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>stop<｜tool▁sep｜>{oops, 1<｜tool▁call▁end｜><｜tool▁calls▁end｜>"
    )
    events = list(all_events(AnswerParser(form_of("deepseek_v31"), tools=TOOLS), text))
    assert calls_in(events) == [("stop", "{oops, 1")]


def test_without_tools_calls_are_text() -> None:
    text = FAMILIES["hermes"].calls([("stop", {})])
    events = list(all_events(AnswerParser(form_of("hermes")), ["<think>x</think>", *text]))
    assert said(events, TextKind.CONTENT) == text
    assert said(events, TextKind.REASONING) == "x"


def test_the_prompt_may_have_begun_the_reasoning() -> None:
    form = form_of("hermes")
    prompt = "<|im_start|>user\nwhat is <think>?<|im_end|>\n<|im_start|>assistant\n"
    for begun, reasoning in (("<think>\n", True), ("", False), ("<think>\n\n</think>\n\n", False), ("</think>", False)):
        assert begun_answer(form, prompt + begun) == begun
        parser = AnswerParser(form, begun=begun, tools=TOOLS)
        assert parser.in_reasoning == reasoning
        events = list(all_events(parser, ["a\n", "</think>\n\nb"] if reasoning else ["a\n\nb"]))
        assert said(events, TextKind.REASONING) == ("a" if reasoning else "")
        assert said(events, TextKind.CONTENT) == ("b" if reasoning else "a\n\nb")
        assert parsed(form, "a</think>b" if reasoning else "a\n\nb", prompt + begun)[0] == said(
            events, TextKind.REASONING
        )
    assert begun_answer(form, "no template<think>\n") == "<think>"
    assert begun_answer(form, "no <think> template") == ""


def test_some_models_think_without_a_mark() -> None:
    form = chosen_form("", reasoning_parser="deepseek_r1")
    for text in ("why</think>so", "<think>why</think>so", "\n<think>\nwhy\n</think>\n\nso"):
        for size in (1, 3, 50):
            events = list(all_events(AnswerParser(form), [text[at : at + size] for at in range(0, len(text), size)]))
            assert (said(events, TextKind.REASONING), said(events, TextKind.CONTENT)) == ("why", "so")


def test_one_call_is_enough_where_no_more_may_be() -> None:
    text = FAMILIES["hermes"].calls([("stop", {}), ("get_weather", {})])
    parser = AnswerParser(form_of("hermes"), tools=TOOLS, max_calls=1)
    events = [event for piece in text for event in parser.push(piece)]
    assert parser.finished
    assert calls_in([*events, *parser.end()]) == [("stop", "{}")]
    assert parser.called


def test_ids_of_calls() -> None:
    def ids(name: str) -> list[str]:
        text = FAMILIES[name].calls([("stop", {}), ("stop", {})])
        events = all_events(AnswerParser(form_of(name), tools=TOOLS), [text])
        return [event.call_id for event in events if isinstance(event, CallBegin)]

    assert ids("kimi_k2") == ["functions.stop:0", "functions.stop:1"]
    for name, pattern in (("hermes", r"call_\w{24}"), ("mistral", r"\w{9}")):
        assert len(set(ids(name))) == 2
        assert all(re.fullmatch(pattern, call_id) for call_id in ids(name))


def test_a_long_answer_takes_time_in_proportion() -> None:
    """Counted in characters that are looked at, since no test measures time."""

    class Counting:
        def __init__(self, pattern: Any) -> None:
            self.pattern, self.seen = pattern, 0

        def search(self, text: str, at: int, **how: Any) -> Any:
            self.seen += len(text) - at
            return self.pattern.search(text, at, **how)

    for piece in ("word ", "<tool_cal", " ", "\n", "<"):
        seen = []
        for repeats in (1000, 4000):
            template = loaded(form_of("hermes").spec(tools=True))
            for field in template.fields.values():
                if field.open_re is not None:
                    field.open_re = Counting(field.open_re)
            regions = Regions(template)
            for _ in range(repeats):
                list(regions.feed(piece))
            seen.append(sum(field.open_re.seen for field in template.fields.values() if field.open_re is not None))
        assert seen[1] < 5 * seen[0]


def test_a_marker_that_goes_on_for_too_long_is_text() -> None:
    text = "<tool_call>" + "\n" * 3000 + "<function=stop>"
    events = list(all_events(AnswerParser(form_of("qwen3_coder"), tools=TOOLS), text))
    assert calls_in(events) == []
    assert said(events, TextKind.CONTENT).startswith("<tool_call>")


OWN = {
    "start_anchor": "A:",
    "fields": {
        "thinking": {"open": "{{", "close": "}}"},
        "tool_calls": {
            "open_pattern": r"CALL (?P<name>\w+)\n", "close": "\nDONE", "repeats": True, "content": "kv-lines",
            "transform": {"type": "function", "function": {"name": "{name}", "arguments": "{content}"}},
        },
        "content": {"content_args": {"strip": False}},
    },
}  # fmt: skip


def test_a_checkpoints_own_template() -> None:
    form = chosen_form("<tool_call>", own=OWN)
    text = "{{hm}}Well. CALL get_weather\ncity: Rome\ndays: 3\nDONE"
    events = list(all_events(AnswerParser(form, tools=TOOLS), text))
    assert said(events, TextKind.REASONING) == "hm"
    assert said(events, TextKind.CONTENT) == "Well."
    assert [(tool, json.loads(arguments)) for tool, arguments in calls_in(events)] == [
        ("get_weather", {"city": "Rome", "days": 3})
    ]
    assert chosen_form("", own=OWN, tool_parser="hermes").own is None


def test_a_pattern_that_never_ends_harms_nobody() -> None:
    """It is not ours: it comes with a checkpoint."""
    fields = {**OWN["fields"], "thinking": {"open_pattern": r"(?:x+x+)+y", "close": "}}"}}  # type: ignore[dict-item]
    form = chosen_form("", own={**OWN, "fields": fields})
    events = list(all_events(AnswerParser(form, tools=TOOLS), ["x" * 200, "z", "end"]))
    assert said(events, TextKind.CONTENT) == "x" * 200 + "zend"


CHAT_TEMPLATES = {
    "<tool_call></tool_call> {{'<think>'}}": ("hermes", "think"),
    "<tool_call> <function=": ("qwen3_coder", None),
    "<tool_call><arg_key> <think>": ("glm45", "think"),
    "<｜tool▁calls▁begin｜> ```json": ("deepseek_v3", None),
    "<｜tool▁calls▁begin｜> <think>": ("deepseek_v31", "think"),
    "<|start|>assistant <|channel|>": ("openai", "openai"),
    "[TOOL_CALLS]": ("mistral", None),
    "[TOOL_CALLS][ARGS][THINK]": ("mistral_args", "mistral_think"),
    "plain": (None, None),
}


@pytest.mark.parametrize("template", CHAT_TEMPLATES)
def test_the_chat_template_tells_the_family(template: str) -> None:
    form = chosen_form(template, model_type="qwen3_moe")
    names = tuple(family and family.name for family in (form.tools, form.reasoning))
    assert names == CHAT_TEMPLATES[template]


def test_names_of_parsers_are_vllms() -> None:
    form = chosen_form("[TOOL_CALLS][ARGS]<think>", tool_parser="mistral", reasoning_parser="none")
    assert form.tools is not None
    assert (form.tools.name, form.reasoning) == ("mistral_args", None)
    form = chosen_form("plain", tool_parser="hermes", model_type="gpt_oss")
    assert form.tools is family_called("hermes")
    assert form.reasoning is family_called("openai")
    for names, setting in (({"tool_parser": "x"}, "tool_call_parser"), ({"reasoning_parser": "x"}, "reasoning_parser")):
        with pytest.raises(ConfigError, match=f"{setting}: expected one of .*, got 'x'"):
            chosen_form("", **names)


def test_every_family_is_tested() -> None:
    assert {family.name for family in families() if family.tool_parsers} <= set(FAMILIES)
    assert {way.family_of_reasoning for way in FAMILIES.values()} - {None} == {
        family.name for family in families() if family.reasoning_parsers
    }
