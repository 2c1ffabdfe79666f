"""Each kind of grammar restricts an answer as it says, and what cannot be compiled is refused in one line."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from llguidance import LLMatcher

from elastic_moe.cluster.errors import CheckpointError
from elastic_moe.cluster.messages.grammars import Grammar, GrammarKind
from elastic_moe.model.grammars import compiling
from elastic_moe.model.grammars.compiling import Compiler, check_grammar, compile_grammar
from elastic_moe.model.grammars.sources import GrammarError
from elastic_moe.model.grammars.vocabulary import Vocabulary, make_vocabulary, read_vocabulary
from tests.model.grammars.vocabularies import BUILTIN, EOS, WIDTH, allowed, grammar, matches, vocabulary

PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
    "required": ["name", "age"],
}
NUMBER = {"type": "json_schema", "json_schema": {"type": "integer"}}
OLD_TAGS = {
    "structures": [
        {"begin": "<f=a>", "schema": PERSON, "end": "</f>"},
        {"begin": "<f=b>", "schema": {"type": "integer"}, "end": "</f>"},
    ],
    "triggers": ["<f="],
}


@pytest.mark.parametrize(
    ("kind", "what", "good", "bad"),
    [
        (GrammarKind.JSON_SCHEMA, PERSON, ['{"name": "é😀", "age": 3}'], ['{"name": "x"}', '{"name":1,"age":3}']),
        (
            GrammarKind.JSON_SCHEMA,
            {**PERSON, "x-guidance": {"whitespace_flexible": False}},
            ['{"name":"x","age":3}'],
            ['{"name": "x","age":3}'],
        ),
        (GrammarKind.JSON_SCHEMA, True, ["1", '{"a": [null]}'], ["a", "{"]),
        (GrammarKind.REGEX, r"[a-z]+/\d\.", ["ab/1."], ["ab/1", "ab/1.x", ""]),
        (GrammarKind.CHOICE, ["yes", 'n"o\n', "日本"], ["yes", 'n"o\n', "日本"], ["y", "yesno", ""]),
        (GrammarKind.EBNF, 'root ::= "a" | "b" root', ["a", "bba"], ["b", "ab"]),
        (GrammarKind.EBNF, 'start: "x" %json {"type": "integer"}', ["x12"], ["12", "x"]),
        (
            GrammarKind.STRUCTURAL_TAG,
            OLD_TAGS,
            ["hello", 'a <f=a>{"name":"x","age":1}</f> b', "<f=b>1</f><f=b>2</f>"],
            ["<f=c>", '<f=b>"x"</f>', "<f=b>1"],
        ),
        (
            GrammarKind.STRUCTURAL_TAG,
            {"format": {"type": "tag", "begin": "<t>", "content": {"type": "any_text"}, "end": "</t>"}},
            ["<t>any < text</t>"],
            ["<t>any</t>more", "any"],
        ),
        (
            GrammarKind.STRUCTURAL_TAG,
            {
                "format": {
                    "type": "triggered_tags",
                    "triggers": ["<t"],
                    "tags": [{"begin": "<t>", "content": NUMBER, "end": "</t>"}],
                    "at_least_one": True,
                    "stop_after_first": True,
                }
            },
            ["so <t>1</t>"],
            ["so", "<t>1</t>and", "<t>1</t><t>2</t>"],
        ),
        (
            GrammarKind.STRUCTURAL_TAG,
            {
                "format": {
                    "type": "tags_with_separator",
                    "separator": ",",
                    "tags": [{"begin": "<t>", "content": NUMBER, "end": "</t>"}],
                }
            },
            ["", "<t>1</t>", "<t>1</t>,<t>2</t>"],
            ["<t>1</t>,", ",<t>1</t>"],
        ),
        (
            GrammarKind.STRUCTURAL_TAG,
            {
                "format": {
                    "type": "sequence",
                    "elements": [
                        {"type": "const_string", "value": "is "},
                        {"type": "or", "elements": [NUMBER, {"type": "regex", "pattern": "[ab/]+"}]},
                    ],
                }
            },
            ["is 12", "is a/b"],
            ["is ", "12"],
        ),
    ],
)
def test_kinds(kind: GrammarKind, what: Any, good: list[str], bad: list[str]) -> None:
    wanted = grammar(kind, what)
    check_grammar(wanted, vocabulary())
    assert [text for text in good if not matches(wanted, text)] == []
    assert [text for text in bad if matches(wanted, text)] == []


@pytest.mark.parametrize(
    ("kind", "what", "words"),
    [
        (GrammarKind.JSON_SCHEMA, "{", "property name"),
        (GrammarKind.JSON_SCHEMA, {"type": "text"}, "Invalid type: text"),
        (GrammarKind.JSON_SCHEMA, {"not": {}}, "Unimplemented keys"),
        (GrammarKind.JSON_SCHEMA, {"$ref": "http://x/y"}, "http://x/y"),
        (GrammarKind.JSON_SCHEMA, {"$ref": "#"}, "no finite JSON value"),
        (GrammarKind.JSON_SCHEMA, {"enum": []}, "Unsatisfiable"),
        (GrammarKind.JSON_SCHEMA, {"type": "string", "pattern": "(?=a)b"}, "look-around"),
        (GrammarKind.REGEX, "(", "unclosed group"),
        (GrammarKind.EBNF, "root ::= other", "other"),
        (GrammarKind.EBNF, "start: start", "no text follows"),
        (GrammarKind.EBNF, "start: <|nothing|>", "unknown special token"),
        (
            GrammarKind.JSON_SCHEMA,
            {"anyOf": [{"type": "object", "properties": {f"p{n}": {}}} for n in range(700)]},
            "too complex",
        ),
        (GrammarKind.STRUCTURAL_TAG, {"format": {"type": "table"}}, "'table' is not supported"),
        (GrammarKind.STRUCTURAL_TAG, {"structures": [{"begin": "a"}], "triggers": ["b"]}, "none of the triggers"),
        (GrammarKind.STRUCTURAL_TAG, {"structures": 5, "triggers": ["b"]}, "structures"),
    ],
)
def test_refused(kind: GrammarKind, what: Any, words: str) -> None:
    with pytest.raises(GrammarError, match=words) as caught:
        check_grammar(grammar(kind, what), vocabulary())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("width", [WIDTH - 100, WIDTH, WIDTH + 100])
@pytest.mark.parametrize("eos", [(EOS,), (WIDTH + 7,), ()], ids=str)
def test_the_answer_ends_where_the_grammar_does_and_padded_ids_are_never_allowed(
    width: int, eos: tuple[int, ...]
) -> None:
    padded = read_vocabulary(BUILTIN, width=width, eos_token_ids=eos)
    matcher = compile_grammar(grammar(GrammarKind.REGEX, "(?s:.*)"), padded)
    bits = np.frombuffer(matcher.compute_bitmask(), dtype=np.uint8)
    assert 8 * len(bits) >= width
    assert max(allowed(bits)) < WIDTH
    matcher = compile_grammar(grammar(GrammarKind.REGEX, "ab?"), padded)
    for ends in (False, True):
        bits = np.frombuffer(matcher.compute_bitmask(), dtype=np.uint8)
        assert (padded.end in allowed(bits)) == ends
        assert matcher.consume_tokens(padded.tokenizer.tokenize_str("a")) != ends


def test_models_without_a_usable_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no readable tokenizer\.json"):
        read_vocabulary(str(tmp_path))
    with pytest.raises(CheckpointError, match=r"cannot use this model's tokenizer\.json"):
        make_vocabulary("{}")


def test_equal_grammars_are_compiled_once_and_only_so_many_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = Compiler(vocabulary())
    first = compiler.get(grammar(GrammarKind.REGEX, "a"))
    assert compiler.get(grammar(GrammarKind.REGEX, "a")) is first
    assert not first.result(10).matcher.is_error()
    monkeypatch.setattr(compiling, "MAX_GRAMMARS", 3)
    others = [compiler.get(grammar(GrammarKind.REGEX, text)) for text in ("b", "(", "d")]
    assert len(compiler) == 3
    assert compiler.get(grammar(GrammarKind.REGEX, "a")) is not first
    with pytest.raises(GrammarError, match="unclosed group"):
        others[1].result(10)
    monkeypatch.setattr(compiling, "MAX_CHARS", 10)
    compiler.get(grammar(GrammarKind.REGEX, "x" * 11)).result(10)
    assert len(compiler) == 1


def test_whoever_asks_does_not_wait_for_the_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    go_on = threading.Event()
    compile_it = compile_grammar

    def slowly(wanted: Grammar, vocabulary: Vocabulary) -> LLMatcher:
        assert go_on.wait(10)
        return compile_it(wanted, vocabulary)

    monkeypatch.setattr(compiling, "compile_grammar", slowly)
    waiting = Compiler(vocabulary()).get(grammar(GrammarKind.JSON_SCHEMA, PERSON))
    assert not waiting.done()
    go_on.set()
    assert not waiting.result(10).matcher.is_error()


def test_a_worker_without_a_vocabulary_refuses_each_grammar() -> None:
    with pytest.raises(GrammarError, match="no file"):
        Compiler(CheckpointError("no file")).get(grammar(GrammarKind.REGEX, "a")).result(10)
