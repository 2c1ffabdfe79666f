"""Every range of numbers that is accepted is kept by answers."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from elastic_moe.cluster.messages.grammars import GrammarKind
from elastic_moe.model.grammars.compiling import check_grammar, compile_grammar
from elastic_moe.model.grammars.ranges import check_ranges
from elastic_moe.model.grammars.sources import GrammarError
from tests.model.grammars.vocabularies import encode, grammar, vocabulary

BOUNDS = (-4.5, -4, -0.5, 0, 0.5, 4)
NUMBERS = (-5, -4.51, -4.5, -4.25, -4, -3.99, -0.5, -0.25, 0, 0.25, 0.5, 3.99, 4, 4.01)


def test_accepted_ranges() -> None:
    refused = 0
    kinds = itertools.product(("minimum", "exclusiveMinimum"), ("maximum", "exclusiveMaximum"))
    for (low_kind, high_kind), low, high in itertools.product(kinds, BOUNDS, BOUNDS):
        wanted = grammar(GrammarKind.JSON_SCHEMA, {"type": "number", low_kind: low, high_kind: high})
        try:
            check_grammar(wanted, vocabulary())
        except GrammarError:
            refused += low < high
            continue
        matcher = compile_grammar(wanted, vocabulary())
        for number in NUMBERS:
            inside = (low < number or (low == number and low_kind == "minimum")) and (
                number < high or (number == high and high_kind == "maximum")
            )
            tried, tokens = matcher.deep_copy(), encode(str(number))
            allowed = tried.try_consume_tokens(tokens) == len(tokens) and tried.is_accepting()
            assert allowed == inside, (wanted.text, number)
    assert 0 < refused < 20


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "integer", "exclusiveMinimum": 4, "maximum": 5},
        {"type": "number", "exclusiveMinimum": 0, "maximum": 2},
        {"type": "number", "minimum": 0, "maximum": 0.5},
        {"const": {"exclusiveMinimum": "x"}},
        True,
    ],
    ids=str,
)
def test_others_are_left_alone(schema: Any) -> None:
    check_ranges(schema)


def test_it_is_found_anywhere() -> None:
    with pytest.raises(ValueError, match=r"between 0 and 0\.5"):
        check_ranges({"anyOf": [{"properties": {"a": {"type": "number", "exclusiveMinimum": 0, "maximum": 0.5}}}]})
