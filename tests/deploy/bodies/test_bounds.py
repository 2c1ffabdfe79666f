"""Bounds of bodies: what is refused before it is validated, what it costs, and which field the refusal names."""

from __future__ import annotations

import re
from array import array
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from elastic_moe.cluster.errors import RequestError
from elastic_moe.deploy.bodies import schema
from elastic_moe.deploy.bodies.bounds import MAX_MESSAGES, MAX_STOP_CHARS, MAX_VALUES, pack_prompt
from elastic_moe.deploy.bodies.schema import (
    Body,
    ChatCompletionRequest,
    CompletionRequest,
    DetokenizeRequest,
    EnginesRequest,
    ScaleRequest,
    TokenizeRequest,
    parse,
)

USER = {"role": "user", "content": "hi"}


def refused(kind: type[Body], data: object) -> RequestError:
    with pytest.raises(RequestError) as caught:
        parse(kind, data)
    return caught.value


@pytest.mark.parametrize(
    ("prompt", "path"),
    [
        (["a"] * 200 + [1] * 200, "prompt"),
        (["a", "b", 1, None], "prompt.2"),
        ([1, 2, "a"], "prompt.2"),
        ([1, True], "prompt.1"),
        ([1, 2**31], "prompt.1"),
        ([None] * 1000, "prompt.0"),
        ([[1], [2, "a"]], "prompt.1.1"),
        ([[1], "a"], "prompt.1"),
        ([[1.5]], "prompt.0.0"),
        ({"a": 1}, "prompt"),
        (None, "prompt"),
    ],
)
def test_the_first_element_that_is_wrong_is_named(prompt: Any, path: str) -> None:
    error = refused(CompletionRequest, {"prompt": prompt})
    assert error.param == path
    assert str(error).startswith(f"{path}: expected ")


@given(
    st.one_of(
        st.text(),
        st.lists(st.text(), max_size=5),
        st.lists(st.integers(-(2**31), 2**31 - 1), max_size=9),
        st.lists(st.lists(st.integers(0, 9), max_size=3), max_size=5),
    )
)
def test_prompts_are_what_was_sent(prompt: Any) -> None:
    packed = pack_prompt(prompt)
    assert [*packed] == [*prompt] or [[*ids] for ids in packed] == prompt
    assert not (isinstance(packed, list) and packed and isinstance(packed[0], int))


def test_token_ids_are_packed() -> None:
    body = parse(CompletionRequest, {"prompt": [5] * 100_000})
    assert body.prompts == [array("i", [5] * 100_000)]
    assert parse(DetokenizeRequest, {"tokens": [1, 2]}).tokens == array("i", [1, 2])


def test_nothing_is_validated_that_is_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    def validate(*_: object, **__: object) -> None:
        raise AssertionError("pydantic has been asked")

    monkeypatch.setattr(BaseModel, "model_validate", validate)
    chat: list[dict[str, Any]] = [
        {"messages": [USER] * (MAX_MESSAGES + 1)},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}] * MAX_VALUES}]},
        {"messages": [USER], "chat_template_kwargs": {"a": [[[0] * MAX_VALUES]]}},
        {"messages": [USER], "stop": [1] * 100_000},
        {"messages": [USER], "stop": ["a" * 100] * 64},
        {"messages": [USER], "stop": "a" * (MAX_STOP_CHARS + 1)},
        {"messages": [USER], "stop_token_ids": [1] * 100_000},
        {"messages": [USER], "logit_bias": {str(n): 1 for n in range(2000)}},
        {"messages": [USER], "chat_template_kwargs": nested(500)},
    ]
    for data in chat:
        error = refused(ChatCompletionRequest, data)
        assert error.param == [*data][-1]
        assert "expected at most" in str(error)
    assert refused(CompletionRequest, {"prompt": ["a"] * 1000}).param == "prompt"
    assert refused(TokenizeRequest, {"messages": [USER] * 5000}).param == "messages"


def nested(levels: int) -> dict[str, Any]:
    value: dict[str, Any] = {}
    for _ in range(levels):
        value = {"a": value}
    return value


def test_one_fault_of_many_is_named() -> None:
    """Of lists within bounds too: a fault for each element would be most of the work."""
    error = refused(ChatCompletionRequest, {"messages": [{"role": 5}] * 1000})
    assert error.param == "messages.0.role"
    assert len(str(error)) < 100


# --- Words ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "data", "path", "words"),
    [
        (ChatCompletionRequest, {"messages": [USER] * 3 + [{"role": "user", "content": 5}]}, "messages.3.content", 5),
        (ChatCompletionRequest, {"messages": [{"content": "a"}]}, "messages.0.role", "required"),
        (ChatCompletionRequest, {"messages": ["a"]}, "messages.0", "an object, got 'a'"),
        (ChatCompletionRequest, {"messages": []}, "messages", "at least 1"),
        (ChatCompletionRequest, {"messages": [USER], "max_completion_tokens": 0}, "max_completion_tokens", "at least"),
        (CompletionRequest, {"prompt": "a", "max_tokens": "10"}, "max_tokens", "an integer, got '10'"),
        (CompletionRequest, {"prompt": "a", "max_tokens": 1.5}, "max_tokens", "an integer, got 1.5"),
        (CompletionRequest, {"prompt": "a", "logit_bias": {"5": "x"}}, "logit_bias.5", "a number"),
        (CompletionRequest, {"prompt": "a", "stream": "yes"}, "stream", "true or false"),
        (CompletionRequest, {"prompt": "a", "temperature": float("inf")}, "temperature", "a finite number"),
        (CompletionRequest, {"prompt": "a", "top_p": 2}, "top_p", "at most 1"),
        (CompletionRequest, {"prompt": "a", "stop": 5}, "stop", "a string or a list"),
        (CompletionRequest, {"prompt": "a", "stop": ["a", 5]}, "stop.1", "a string, got a number"),
        (CompletionRequest, {}, "prompt", "required"),
        (EnginesRequest, {"size": 2}, "size", "no such field; it takes data_parallel_size"),
        (ScaleRequest, {"workerz": 2}, "workerz", "no such field (did you mean workers?)"),
    ],
)
def test_faults_name_the_clients_fields(kind: type[Body], data: object, path: str, words: object) -> None:
    error = refused(kind, data)
    assert error.param == path
    assert str(error).startswith(f"{path}: ")
    assert str(words) in str(error)


VALUES: tuple[Any, ...] = (
    *(None, True, 5, -5, 1.5, 2**70, float("nan"), "", "x", "x" * 2000),
    *([], [5], ["x"], [None], [[5]], {}, {"x": 5}, {"type": 5}),
)


@pytest.mark.parametrize("kind", [kind for kind in vars(schema).values() if isinstance(kind, type)])
def test_pydantics_words_are_never_shown(kind: type) -> None:
    if not issubclass(kind, Body) or kind in (Body, schema.SamplingFields):
        return
    whole = {"prompt": "a", "messages": [USER], "tokens": [1]}
    required = {name: value for name, value in whole.items() if name in kind.model_fields}
    found: list[tuple[str, RequestError]] = []
    for field in kind.model_fields:
        for value in VALUES:
            try:
                parse(kind, {**required, field: value})
            except RequestError as error:
                found.append((field, error))
    assert found
    for field, error in found:
        assert not re.search("[Ii]nput|[Vv]alid|Field|pydantic|Value error|another value", str(error)), error
        assert (error.param or "").split(".")[0] in (*kind.model_fields,), (field, error)
