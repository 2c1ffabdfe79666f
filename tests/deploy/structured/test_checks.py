"""A grammar reaches the engine with its request; what cannot be compiled is a 400 that names the field."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncGenerator, Callable
from typing import Any

import httpx
import pytest

from elastic_moe.cluster.errors import RequestError
from elastic_moe.cluster.messages.grammars import Grammar, GrammarKind
from elastic_moe.cluster.messages.requests import FinishReason, GenerateRequest, TokenOutput
from elastic_moe.deploy.structured import checks
from elastic_moe.deploy.structured.checks import GrammarChecks
from tests.deploy.fakes import FakeBackend

Call = Callable[..., httpx.Response]
BODIES = {
    "/v1/completions": {"prompt": "hello", "max_tokens": 3},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 3},
}


@pytest.mark.parametrize("path", BODIES)
def test_grammars_reach_the_engine(call: Call, path: str) -> None:
    backend = FakeBackend()
    for extra in ({"guided_regex": "a+"}, {"response_format": {"type": "text"}}):
        assert call("POST", path, json={**BODIES[path], "n": 2, **extra}, backend=backend).status_code == 200
    asked = [request.params.grammar for request in backend.requests]
    assert asked == [Grammar(kind=GrammarKind.REGEX, text="a+")] * 2 + [None] * 2


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize(
    ("extra", "param"),
    [
        ({"guided_regex": "("}, "guided_regex"),
        ({"structured_outputs": {"json": {"type": "text"}}}, "structured_outputs.json"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {"$ref": "#"}}}},
            "response_format.json_schema.schema",
        ),
        ({"structured_outputs": {"structural_tag": "5"}}, "structured_outputs.structural_tag"),
    ],
)
def test_what_cannot_be_compiled_is_refused(call: Call, path: str, extra: dict[str, Any], param: str) -> None:
    backend = FakeBackend()
    response = call("POST", path, json={**BODIES[path], **extra}, backend=backend)
    error = response.json()["error"]
    assert (response.status_code, error["param"], error["code"]) == (400, param, "invalid_value")
    assert error["message"].startswith(param)
    assert not backend.requests


class Stuck(FakeBackend):
    """The grammar turns out to be too complex after the first token."""

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[TokenOutput, None]:
        yield self._output(request, 0, (65,), None)
        end = self._output(request, 1, (), FinishReason.ERROR, "the grammar is too complex")
        yield dataclasses.replace(end, refused=True)


@pytest.mark.parametrize("path", BODIES)
def test_a_grammar_that_cannot_go_on_is_the_clients_error(call: Call, path: str) -> None:
    body = {**BODIES[path], "guided_regex": "a+"}
    response = call("POST", path, json=body, backend=Stuck())
    assert (response.status_code, response.json()["error"]["code"]) == (400, "grammar_failed")
    events = call("POST", path, json={**body, "stream": True}, backend=Stuck()).text.split("\n\n")
    assert "the grammar is too complex" in events[-3]


def test_a_verdict_is_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    class Prompts:
        async def fault_of_grammar(self, grammar: Grammar) -> str | None:
            asked.append(grammar.text)
            return "too long" if len(grammar.text) > 1 else None

    async def work() -> None:
        known, prompts = GrammarChecks(), Prompts()
        for text in ("a", "bb", "a", "bb", "c", "a"):
            one = Grammar(kind=GrammarKind.REGEX, text=text)
            if len(text) == 1:
                await known.check(prompts, one, param="p")  # type: ignore[arg-type]
                continue
            with pytest.raises(RequestError, match="p: too long"):
                await known.check(prompts, one, param="p")  # type: ignore[arg-type]

    asyncio.run(work())
    assert asked == ["a", "bb", "c"]
    monkeypatch.setattr(checks, "MAX_CHECKED", 2)
    asked.clear()
    asyncio.run(work())
    assert asked == ["a", "bb", "c", "a"]
