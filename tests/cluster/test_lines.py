from __future__ import annotations

import pytest

from elastic_moe.cluster.lines import ending, meant, single_line


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
