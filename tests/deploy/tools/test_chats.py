"""Tools and reasoning of chats, over a fake backend that writes what a model of the family would."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken
from tokenizers import Tokenizer as RustTokenizer

from elastic_moe.cluster.messages.grammars import GrammarKind
from elastic_moe.deploy.parsing.formats import AnswerForm, family_called
from tests.deploy.conftest import client_of
from tests.deploy.fakes import TEMPLATE, FakeBackend, make_tokenizer
from tests.deploy.parsing.written import FAMILIES

HERMES = (
    "{% if tools %}<tools>{% for t in tools %}{{ t.function.name }} {% endfor %}<tool_call></tools>{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.content %}{{ m.content }}{% endif %}"
    "{% for c in m.tool_calls or [] %}{{ c.function.name }}"
    "{% for k, v in c.function.arguments | items %} {{ k }}={{ v }}{% endfor %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% if enable_thinking %}<think>\n{% endif %}{% endif %}"
)
TOOLS = [
    {
        "type": "function",
        "function": {"name": "get_weather", "parameters": {"properties": {"city": {"type": "string"}}}},
    },
    {"type": "function", "function": {"name": "stop"}},
]
ASKED: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}], "tools": TOOLS, "max_tokens": 400}
ROME = ("get_weather", {"city": "Rome"})
HOW = {"vocab_size": 360, "max_model_len": 2048}


@dataclass
class Model:
    directory: Path
    tokenizer: RustTokenizer

    def ask(self, answer: str, *, chunk: int = 1, cut: int = 0, **body: Any) -> tuple[dict[str, Any], FakeBackend]:
        """The response to a chat that the model answers with this text; an error as its body. A stream is put together
        again, as OpenAI's clients do. `cut`: leave out so many tokens at the end."""
        tokens = self.tokenizer.encode(answer, add_special_tokens=False).ids
        backend = FakeBackend(script=lambda _: tokens[: len(tokens) - cut], chunk=chunk, **HOW)
        return asyncio.run(self._ask({**ASKED, **body}, backend)), backend

    async def _ask(self, body: dict[str, Any], backend: FakeBackend) -> dict[str, Any]:
        async with client_of(backend, self.directory) as client:
            response = await client.post("/v1/chat/completions", json=body)
        if not body.get("stream"):
            return dict(response.json())
        lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
        assert lines.pop() == "[DONE]"
        return put_together([json.loads(line) for line in lines])


def put_together(chunks: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    message: dict[str, Any] = {"content": "", "tool_calls": []}
    finish = None
    for chunk in chunks:
        for choice in chunk["choices"]:
            delta = choice["delta"]
            finish = choice["finish_reason"] or finish
            for name in ("content", "reasoning", "reasoning_content"):
                if delta.get(name):
                    message[name] = message.get(name, "") + delta[name]
            for call in delta.get("tool_calls", ()):
                if "id" in call:
                    assert call["index"] == len(message["tool_calls"])
                    assert call["type"] == "function"
                    message["tool_calls"].append({**call, "function": dict(call["function"])})
                else:
                    assert set(call) == {"index", "function"}
                    function = message["tool_calls"][call["index"]]["function"]
                    function["arguments"] += call["function"]["arguments"]
    return {"choices": [{"message": message, "finish_reason": finish}], "chunks": chunks}


def calls_of(response: Mapping[str, Any]) -> list[tuple[str, Any]]:
    calls = response["choices"][0]["message"].get("tool_calls", [])
    return [(call["function"]["name"], json.loads(call["function"]["arguments"])) for call in calls]


def model(directory: Path, *, template: str = HERMES, special: Sequence[str] = ()) -> Model:
    tokenizer = make_tokenizer(directory, chat_template=template)
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in ("<|im_end|>", *special)])
    tokenizer.save(str(directory / "tokenizer.json"))
    return Model(directory, tokenizer)


@pytest.fixture(scope="module")
def hermes(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return model(tmp_path_factory.mktemp("hermes"), template=HERMES + "{# <think> #}")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """A model that knows no calls, as the built-in one."""
    return model(tmp_path_factory.mktemp("plain"), template=TEMPLATE)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("chunk", [1, 7, 500])
def test_calls(hermes: Model, stream: bool, chunk: int) -> None:
    text = "Let me see.\n" + FAMILIES["hermes"].calls([ROME, ("stop", {})])
    response, backend = hermes.ask(text, chunk=chunk, stream=stream)
    (choice,) = response["choices"]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] == "Let me see."
    assert calls_of(response) == [ROME, ("stop", {})]
    ids = [call["id"] for call in choice["message"]["tool_calls"]]
    assert len(set(ids)) == 2
    assert all(call_id.startswith("call_") for call_id in ids)
    prompt = hermes.tokenizer.decode(backend.requests[0].prompt_token_ids, skip_special_tokens=False)
    assert "<tools>get_weather stop" in prompt
    assert backend.requests[0].params.grammar is None


def test_a_call_alone_has_no_content(hermes: Model) -> None:
    response, _ = hermes.ask(FAMILIES["hermes"].calls([ROME]))
    message = response["choices"][0]["message"]
    assert message["content"] is None
    assert message["tool_calls"][0].keys() == {"id", "type", "function"}
    response, _ = hermes.ask(FAMILIES["hermes"].calls([ROME]), stream=True)
    deltas = [choice["delta"] for chunk in response["chunks"] for choice in chunk["choices"]]
    assert deltas[0] == {"role": "assistant", "content": ""}
    first = deltas[1]["tool_calls"][0]
    assert (first["index"], first["type"], first["function"]["name"]) == (0, "function", "get_weather")
    assert len(deltas) > 5


def test_plain_chat(hermes: Model) -> None:
    text = FAMILIES["hermes"].calls([ROME])
    for body in ({"tool_choice": "none"}, {"tools": None}, {"tools": []}):
        response, backend = hermes.ask(text, **body)
        (choice,) = response["choices"]
        assert (choice["finish_reason"], choice["message"]["content"]) == ("stop", text)
        prompt = hermes.tokenizer.decode(backend.requests[0].prompt_token_ids, skip_special_tokens=False)
        assert "<tools>" not in prompt


def test_results_of_calls_are_in_the_history(hermes: Model) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Rome"}'}}
    messages = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "sunny"},
    ]
    response, backend = hermes.ask("It is sunny.", messages=messages)
    assert response["choices"][0]["message"]["content"] == "It is sunny."
    prompt = hermes.tokenizer.decode(backend.requests[0].prompt_token_ids, skip_special_tokens=False)
    assert "get_weather city=Rome" in prompt
    assert "tool\nsunny" in prompt


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("named", [False, True])
def test_a_model_that_knows_no_calls_is_made_to_call(plain: Model, named: bool, stream: bool) -> None:
    choice: Any = {"type": "function", "function": {"name": "get_weather"}} if named else "required"
    text = FAMILIES["json_list"].calls([ROME])
    response, backend = plain.ask(text, tool_choice=choice, stream=stream)
    assert calls_of(response) == [ROME]
    # as in OpenAI's API, a client that has named the tool gets "stop"
    assert response["choices"][0]["finish_reason"] == ("stop" if named else "tool_calls")
    grammar = backend.requests[0].params.grammar
    assert grammar is not None
    assert grammar.kind is GrammarKind.EBNF
    assert ('"stop"' in grammar.text.replace("\\", "")) == (not named)
    response, backend = plain.ask(text)
    assert response["choices"][0]["message"]["content"] == text
    assert backend.requests[0].params.grammar is None


def test_a_schema_that_cannot_be_a_grammar(plain: Model) -> None:
    tool = {
        "type": "function",
        "function": {"name": "f", "parameters": {"type": "object", "properties": {"a": {"type": "x"}}}},
    }
    response, _ = plain.ask("", tools=[TOOLS[1], tool], tool_choice={"type": "function", "function": {"name": "f"}})
    assert response["error"]["param"] == "tools.1.function.parameters"
    response, _ = plain.ask("", tools=[TOOLS[1], tool], tool_choice="required")
    assert response["error"]["param"] == "tools.1.function.parameters"
    assert "start:" not in response["error"]["message"]


def test_one_call_where_the_client_wants_no_more(hermes: Model) -> None:
    text = FAMILIES["hermes"].calls([ROME, ("stop", {})])
    for stream in (False, True):
        response, backend = hermes.ask(text, parallel_tool_calls=False, stream=stream)
        assert calls_of(response) == [ROME]
        assert response["choices"][0]["finish_reason"] == "tool_calls"
        assert len(backend.aborted) == 1


@pytest.mark.parametrize("stream", [False, True])
def test_a_call_that_is_cut_off(hermes: Model, stream: bool) -> None:
    text = FAMILIES["hermes"].calls([ROME])
    response, _ = hermes.ask(text, max_tokens=len(hermes.tokenizer.encode(text).ids) - 20, stream=stream)
    (choice,) = response["choices"]
    assert choice["finish_reason"] == "length"
    assert '{"city": "Rome"}'.startswith(choice["message"]["tool_calls"][0]["function"]["arguments"])
    response, _ = hermes.ask(text, stop=["Ro"], stream=stream)
    (choice,) = response["choices"]
    assert choice["finish_reason"] == "stop"
    assert choice["message"]["tool_calls"][0]["function"]["arguments"] == '{"city": "'


def test_what_is_no_call_is_content(hermes: Model) -> None:
    for text in ("<tool_call>\n{'name': 'f'}\n</tool_call>", "<tool_call>", "a <tool_call>{}</tool_call> b"):
        response, _ = hermes.ask(text)
        assert response["choices"][0]["finish_reason"] == "stop"
        assert response["choices"][0]["message"]["content"] == text


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("begun", [False, True])
def test_reasoning(hermes: Model, begun: bool, stream: bool) -> None:
    text = ("" if begun else "<think>\n") + "why so\n</think>\n\nbecause"
    body = {"chat_template_kwargs": {"enable_thinking": begun}, "tools": None, "logprobs": True}
    response, backend = hermes.ask(text, stream=stream, **body)
    message = response["choices"][0]["message"]
    assert (message["reasoning"], message["reasoning_content"], message["content"]) == ("why so",) * 2 + ("because",)
    if not stream:
        reasoning = response["usage"]["completion_tokens_details"]["reasoning_tokens"]
        counted = len(hermes.tokenizer.encode("why so\n", add_special_tokens=False).ids)
        assert abs(reasoning - counted) <= 2
    prompt = hermes.tokenizer.decode(backend.requests[0].prompt_token_ids, skip_special_tokens=False)
    assert prompt.endswith("<think>\n") == begun
    hidden, _ = hermes.ask(text, stream=stream, include_reasoning=False, return_token_ids=True, **body)
    message = hidden["choices"][0]["message"]
    assert message["content"] == "because"
    assert "reasoning" not in message
    choices = [choice for chunk in hidden.get("chunks", [hidden]) for choice in chunk["choices"]]
    assert all(choice.get("logprobs") is None and "token_ids" not in choice for choice in choices)


def test_structured_output_begins_after_the_reasoning(hermes: Model, tmp_path: Path) -> None:
    schema = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}}}
    body: dict[str, Any] = {"tools": None, "response_format": schema}
    _, backend = hermes.ask('{"a": 1}', **body)
    grammar = backend.requests[0].params.grammar
    assert grammar is not None
    assert (grammar.kind, "think" in grammar.text) == (GrammarKind.EBNF, True)
    marked = model(tmp_path, special=["<think>", "</think>"], template=HERMES)
    response, backend = marked.ask('why</think>\n{"a": 1}', enable_thinking=True, **body)
    params = backend.requests[0].params
    assert params.grammar is not None
    assert params.grammar.kind is GrammarKind.JSON_SCHEMA
    assert params.grammar_after == (marked.tokenizer.token_to_id("</think>"),)
    message = response["choices"][0]["message"]
    assert (message["reasoning_content"], message["content"]) == ("why", '{"a": 1}')
    _, backend = marked.ask('{"a": 1}', **{**body, "tools": TOOLS})
    grammar = backend.requests[0].params.grammar
    assert grammar is not None
    assert "tool_call" in grammar.text


@pytest.mark.parametrize("show", [None, False])
def test_special_tokens_reach_the_parser_and_nobody_else(tmp_path: Path, show: bool | None) -> None:
    form = AnswerForm(tools=family_called("kimi_k2"))
    marks = [
        "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>", "<|tool_call_begin|>", "<|tool_call_end|>",
        "<|tool_call_argument_begin|>", "<|other|>",
    ]  # fmt: skip
    special = dict(enumerate(marks))
    assert set(special.values()) - set(form.markers(special, tools=True).values()) == {"<|other|>"}
    assert form.markers(special, tools=False) == {}
    kimi = model(tmp_path, special=marks, template=TEMPLATE + "{# <|tool_calls_section_begin|> #}")
    text = "Well,<|other|> " + FAMILIES["kimi_k2"].calls([ROME])
    response, _ = kimi.ask(text, skip_special_tokens=show)
    message = response["choices"][0]["message"]
    assert calls_of(response) == [ROME]
    assert message["tool_calls"][0]["id"] == "functions.get_weather:0"
    assert message["content"] == ("Well," if show is None else "Well,<|other|>")
    response, _ = kimi.ask(text, tools=None)
    assert "Well," in response["choices"][0]["message"]["content"]
    assert "<|" not in response["choices"][0]["message"]["content"]
