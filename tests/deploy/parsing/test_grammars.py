"""Grammars of calls and reasoning, against what the parser reads, by llguidance itself."""

from __future__ import annotations

import json
from typing import Any

import pytest
from llguidance import LLMatcher, LLTokenizer

from elastic_moe.cluster.messages.grammars import Grammar, GrammarKind
from elastic_moe.deploy.launch.builtin import MODEL_DIR
from elastic_moe.deploy.parsing.formats import AnswerForm, family_called
from elastic_moe.deploy.parsing.grammars import Thinking, answer_grammar, thinking_of, writes_calls
from tests.deploy.parsing.written import FAMILIES, form_of

SPECIAL = {"<|endoftext|>": 0}
TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string"},
                    "unit": {"type": "string", "enum": ["C", "F"]},
                    "days": {"type": "integer"},
                },
                "required": ["city"],
            },
        },
    },
    {"type": "function", "function": {"name": "stop"}},
]
ROME = ("get_weather", {"city": 'Rome, "new"', "unit": "C", "days": 3})
STOP: tuple[str, dict[str, Any]] = ("stop", {})
WITH_GRAMMAR = sorted(name for name in FAMILIES if writes_calls(AnswerForm(tools=family_called(name))))


@pytest.fixture(scope="module")
def tokenizer() -> LLTokenizer:
    return LLTokenizer((MODEL_DIR / "tokenizer.json").read_text())


def takes(tokenizer: LLTokenizer, grammar: Grammar | None, text: str, *, parts: tuple[str, int] | None = None) -> bool:
    """Whether the text is a whole answer. `parts`: a special token's text in it, and its id."""
    assert grammar is not None
    assert LLMatcher.validate_grammar(grammar.text, tokenizer) == ""
    matcher = LLMatcher(tokenizer, grammar.text)
    tokens: list[int] = []
    for number, piece in enumerate(text.split(parts[0]) if parts else [text]):
        tokens += [parts[1]] if parts and number else []
        tokens += tokenizer.tokenize_str(piece)
    return matcher.try_consume_tokens(tokens) == len(tokens) and bool(matcher.is_accepting())


def as_grammars_want(name: str, calls: list[tuple[str, dict[str, Any]]]) -> str:
    text = FAMILIES[name].calls(calls)
    return text.replace("] [", "][").replace("[CALL_ID]abcdefgh1", "").removesuffix("<|call|>")


@pytest.mark.parametrize("name", WITH_GRAMMAR)
def test_a_call_is_what_the_family_writes(name: str, tokenizer: LLTokenizer) -> None:
    form = form_of(name)
    one = answer_grammar(form, SPECIAL, tools=TOOLS, one_call=True)
    several = answer_grammar(form, SPECIAL, tools=TOOLS)
    assert takes(tokenizer, one, as_grammars_want(name, [ROME]))
    assert takes(tokenizer, one, as_grammars_want(name, [STOP]))
    both = as_grammars_want(name, [ROME, STOP])
    # in harmony, the end of a call ends the answer
    assert takes(tokenizer, several, both) == (name != "openai")
    assert not takes(tokenizer, one, both)
    for bad in ("", "Hello", as_grammars_want(name, [("start", {})]), as_grammars_want(name, [("get_weather", {})])):
        assert not takes(tokenizer, several, bad)
    assert not takes(tokenizer, one, as_grammars_want(name, [("get_weather", {"city": "x", "days": "many"})]))
    assert not takes(tokenizer, one, as_grammars_want(name, [("get_weather", {"city": "x", "unit": "K"})]))


@pytest.mark.parametrize("name", [name for name in WITH_GRAMMAR if FAMILIES[name].family_of_reasoning])
def test_reasoning_may_come_before_a_call(name: str, tokenizer: LLTokenizer) -> None:
    family, form = FAMILIES[name], form_of(name)
    begin, end = family.reasoning
    call = as_grammars_want(name, [ROME])
    free = answer_grammar(form, SPECIAL, tools=TOOLS, thinking=thinking_of(form, "", in_reasoning=False))
    assert takes(tokenizer, free, call)
    assert takes(tokenizer, free, f"{begin}a <b> {{{end}{call}")
    assert not takes(tokenizer, free, f"{begin}a")
    begun = answer_grammar(form, SPECIAL, tools=TOOLS, thinking=thinking_of(form, begin, in_reasoning=True))
    assert takes(tokenizer, begun, f"a\n{end}{call}")
    assert not takes(tokenizer, begun, call)
    assert thinking_of(form, begin + end, in_reasoning=False) is None


def test_an_answer_of_json_or_calls(tokenizer: LLTokenizer) -> None:
    content = Grammar(kind=GrammarKind.JSON_SCHEMA, text='{"type": "object", "required": ["a"]}')
    form = form_of("hermes")
    thinking = thinking_of(form, "", in_reasoning=False)
    grammar = answer_grammar(form, SPECIAL, content=content, tools=TOOLS, thinking=thinking)
    for text in ('{"a": 1}', "<think>x</think>\n\n" + '{"a": 1}', as_grammars_want("hermes", [STOP])):
        assert takes(tokenizer, grammar, text)
    assert not takes(tokenizer, grammar, '{"b": 1}')
    harmony = form_of("openai")
    thinking = thinking_of(harmony, "", in_reasoning=False)
    grammar = answer_grammar(harmony, SPECIAL, content=content, thinking=thinking)
    assert takes(tokenizer, grammar, '<|channel|>final<|message|>{"a": 1}')
    assert takes(
        tokenizer,
        grammar,
        '<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>final<|message|>{"a": 1}',
    )


@pytest.mark.parametrize(
    ("kind", "text", "good", "bad"),
    [
        (GrammarKind.CHOICE, '["yes", "a/b\\n"]', "a/b\n", "no"),
        (GrammarKind.REGEX, r"[a-z]+/\d", "ab/3", "ab3"),
        (GrammarKind.REGEX, r"a\/b", "a/b", "ab"),
    ],
)
def test_other_grammars_after_reasoning(
    kind: GrammarKind, text: str, good: str, bad: str, tokenizer: LLTokenizer
) -> None:
    thinking = Thinking(open=True, marks=("<think>", "</think>"))
    grammar = answer_grammar(AnswerForm(), SPECIAL, content=Grammar(kind=kind, text=text), thinking=thinking)
    assert takes(tokenizer, grammar, f"why</think>\n{good}")
    assert not takes(tokenizer, grammar, f"why</think>\n{bad}")


def test_a_grammar_that_cannot_be_a_part() -> None:
    tags = Grammar(kind=GrammarKind.STRUCTURAL_TAG, text="{}")
    assert answer_grammar(AnswerForm(), {}, content=tags) is None


def test_markers_that_are_special_tokens_are_named_by_their_ids() -> None:
    """Their characters would be taken for any other text, and the model does not write them so."""
    mark, token_id = "<｜tool▁sep｜>", 3072
    written = json.loads((MODEL_DIR / "tokenizer.json").read_text())
    written["added_tokens"].append({**written["added_tokens"][0], "id": token_id, "content": mark})
    tokenizer = LLTokenizer(json.dumps(written))
    form = AnswerForm(tools=family_called("deepseek_v31"))
    grammar = answer_grammar(form, {mark: token_id}, tools=TOOLS, one_call=True)
    text = as_grammars_want("deepseek_v31", [STOP])
    assert takes(tokenizer, grammar, text, parts=(mark, token_id))
    assert not takes(tokenizer, grammar, text.replace("▁", "_"))
    thinking = Thinking(open=True, marks=("", mark))
    content = Grammar(kind=GrammarKind.CHOICE, text='["yes"]')
    grammar = answer_grammar(AnswerForm(), {mark: token_id}, content=content, thinking=thinking)
    assert takes(tokenizer, grammar, f"why\n{mark}yes", parts=(mark, token_id))
    assert not takes(tokenizer, grammar, "yes")
