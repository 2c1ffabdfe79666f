from __future__ import annotations

import json

import pytest

from elastic_moe.cluster.lines import counted, ending, json_fault, meant, single_line, size_text


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("\x1b[36mray::Proxy\x1b[39m died\n  of\tsomething", "ray::Proxy died of something"),
        ("\x1b]0;title\x07a", "a"),
        ("\x1b[2J\x1b[1;1Ha", "a"),
        ("a\rb", "a b"),
        ("a\x00b\x07c\x9b31md", "a?b?c?31md"),
        ("grüße 世界", "grüße 世界"),
        ("", ""),
    ],
)
def test_one_line_without_colours(text: str, line: str) -> None:
    assert single_line(text) == line


def test_the_end_is_kept() -> None:
    text = "a traceback of many words and then the cause"
    assert ending(text, 100) == text
    assert ending(text, 12) == "... the cause"
    assert ending("x" * 50, 10) == "... " + "x" * 10


@pytest.mark.parametrize(
    ("name", "says"),
    [("wokers", " (did you mean workers?)"), ("workers", " (did you mean workers?)"), ("zebra", ""), ("", "")],
)
def test_a_name_that_was_probably_meant(name: str, says: str) -> None:
    assert meant(name, ["port", "workers", "planner"]) == says


def test_a_noun_agrees_with_its_number() -> None:
    assert [counted(number, "worker") for number in (0, 1, 2)] == ["0 workers", "1 worker", "2 workers"]
    assert [counted(number, "copy", "copies") for number in (1, 2)] == ["1 copy", "2 copies"]


def test_bytes_have_a_unit_in_which_they_are_seen() -> None:
    assert [size_text(n) for n in (0, 999, 1000, 12_164_000, 5e9, 3e15)] == [
        "0 B", "999 B", "1.0 kB", "12.2 MB", "5.0 GB", "3000.0 TB"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{'a': 1}", 'expected a key in double quotes, got "\'", at line 1, column 2'),
        ('{"a": 1,}', "expected a key in double quotes"),
        ("[1, 2,]", "expected a value"),
        ('{"a": }', "expected a value, got '}', at line 1, column 7"),
        ('{"a" 1}', "expected a colon behind the key, got '1', at line 1, column 6"),
        ('{"a": 1\n"b": 2}', "expected a comma or the end of the list or object, got '\"', at line 2, column 1"),
        ('{"a": 1', "expected a comma or the end of the list or object, got the end, at line 1, column 8"),
        ('{"a": "x', "the closing quote is missing of the text that begins, at line 1, column 7"),
        ('"a\nb"', "in a text, got the character itself, at line 1, column 3"),
        (r'"\x"', "expected a known character behind the \\, at line 1, column 2"),
        (r'"\u12"', "expected four hexadecimal digits behind the \\u"),
        ("{} {}", "expected the end, got '{', at line 1, column 4"),
        ("9" * 5000, "a number has more than 4300 digits"),
        ("[" * 200_000, "it is nested too deeply"),
    ],
)
def test_faults_of_json_are_told_in_plain_words(text: str, says: str) -> None:
    with pytest.raises((ValueError, RecursionError)) as caught:
        json.loads(text)
    assert says in json_fault(caught.value)
