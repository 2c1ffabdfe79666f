"""Bodies: what is accepted, what is refused, and which field the refusal names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from elastic_moe.cluster.errors import RequestError
from elastic_moe.deploy.api.sampling import Limits, SamplingDefaults, sampling_params, seed_of_choice, truncated
from elastic_moe.deploy.bodies.schema import ChatCompletionRequest, CompletionRequest, parse

USER = [{"role": "user", "content": "hi"}]
LIMITS = Limits(max_model_len=100, vocab_size=50)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("prompt", 5),
        ("prompt", [[1, 2], "x"]),
        ("prompt", {"a": 1}),
        ("prompt", [1, True]),
        ("temperature", "1"),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("top_p", 0),
        ("top_p", 1.5),
        ("top_k", 1.5),
        ("min_p", 2),
        ("max_tokens", -1),
        ("max_tokens", 2.5),
        ("max_tokens", 1.5),
        ("max_tokens", "10"),
        ("max_tokens", True),
        ("n", 0),
        ("n", 1000),
        ("seed", 2**70),
        ("stop", 5),
        ("stop", [""]),
        ("stop", ["a", 1]),
        ("stop_token_ids", ["a"]),
        ("logprobs", True),
        ("logprobs", 1000),
        ("logit_bias", {"5": "x"}),
        ("logit_bias", [1]),
        ("presence_penalty", 3),
        ("repetition_penalty", 0),
        ("stream", "yes"),
        ("stream_options", {"include_usage": True}),
        ("best_of", 3),
        ("suffix", "x"),
        ("use_beam_search", True),
        ("prompt_logprobs", 21),
        ("response_format", {"type": "yaml"}),
        ("guided_regex", ["a*"]),
        ("guided_choice", []),
        ("structured_outputs", {"regex": 5}),
        ("truncate_prompt_tokens", 0),
        ("truncate_prompt_tokens", -2),
        ("truncation_side", "middle"),
        ("allowed_token_ids", []),
        ("allowed_token_ids", ["5"]),
        ("bad_words", [""]),
        ("bad_words", "word"),
        ("bad_words", ["x"] * 1000),
        ("request_id", "a b"),
        ("request_id", ""),
        ("logprob_token_ids", [1]),
        ("length_penalty", 0.5),
        ("early_stopping", True),
        ("priority", 2**63),
        ("watermarking", True),
        ("max_repetition_pattern_size", 4),
        ("ec_transfer_params", {"a": 1}),
        ("thinking_token_budget", 5),
        ("repetition_detection", {"max_pattern_size": 4}),
        ("return_token_ids", 1),
    ],
)
def test_refused_fields_of_completions(field: str, value: Any) -> None:
    with pytest.raises(RequestError) as caught:
        parse(CompletionRequest, {"prompt": "a", field: value})
    assert caught.value.param is not None
    assert caught.value.param.split(".")[0] == field
    assert str(caught.value).startswith(field)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("messages", []),
        ("messages", "hi"),
        ("messages", [{"content": "hi"}]),
        ("messages", [{"role": "user", "content": 5}]),
        ("messages", [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]),
        ("tools", {"type": "function"}),
        ("tools", [{"type": "function", "function": {"description": "no name"}}]),
        ("tools", [{"type": "function", "function": {"name": "a b"}}]),
        ("tools", [{"type": "retrieval", "function": {"name": "f"}}]),
        ("tools", [{"type": "function", "function": {"name": "f", "parameters": "x"}}]),
        ("functions", [{"name": "f"}]),
        ("tool_choice", "required"),
        ("tool_choice", "some"),
        ("tool_choice", 5),
        ("tool_choice", {"type": "function"}),
        ("tool_choice", {"type": "custom", "function": {"name": "f"}}),
        ("parallel_tool_calls", 1),
        ("response_format", {"type": "json_schema", "json_schema": {}}),
        ("top_logprobs", 3),
        ("max_completion_tokens", 0),
        ("logprobs", 1),
        ("modalities", ["audio"]),
        ("reasoning_effort", 5),
        ("include_reasoning", "no"),
        ("verbosity", "high"),
        ("chat_template", "{{ messages }}"),
    ],
)
def test_refused_fields_of_chat(field: str, value: Any) -> None:
    with pytest.raises(RequestError) as caught:
        parse(ChatCompletionRequest, {"messages": USER, field: value})
    assert caught.value.param is not None
    assert caught.value.param.split(".")[0] == field


def test_tools_that_may_not_be_called_are_plain_chat() -> None:
    tools = [{"type": "function", "function": {"name": "f"}}]
    assert parse(ChatCompletionRequest, {"messages": USER, "tools": tools, "tool_choice": "none"}).callable_tools == []
    parse(ChatCompletionRequest, {"messages": USER, "functions": tools, "function_call": "none"})
    for choice in ({}, {"tool_choice": "auto"}, {"tool_choice": None}, {"function_call": "none"}):
        assert parse(ChatCompletionRequest, {"messages": USER, "tools": tools, **choice}).callable_tools == tools


def test_a_tool_to_call_must_be_there() -> None:
    tools = [{"type": "function", "function": {"name": "f", "extra": 1}, "more": 2}]
    named = {"type": "function", "function": {"name": "g"}}
    for more in ({"tool_choice": named}, {"tool_choice": "required"}, {"tools": tools, "tool_choice": named}):
        with pytest.raises(RequestError, match=r"tool_choice: tools ") as caught:
            parse(ChatCompletionRequest, {"messages": USER, **more})
        assert caught.value.param == "tool_choice"
    body = parse(ChatCompletionRequest, {"messages": USER, "tools": tools, "tool_choice": {"function": {"name": "f"}}})
    assert (body.named_tool, body.must_call, body.callable_tools) == ("f", True, tools)


CALLING = {"role": "assistant", "tool_calls": [{"id": "c1", "function": {"name": "f", "arguments": "{}"}}]}


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ([{"role": "tool", "content": "x", "tool_call_id": "c1"}], "messages.0.role"),
        ([*USER, {"role": "tool", "content": "x", "tool_call_id": "c1"}], "messages.1.role"),
        ([CALLING, *USER, {"role": "tool", "content": "x", "tool_call_id": "c1"}], "messages.2.role"),
        ([CALLING, {"role": "tool", "content": "x"}], "messages.1.tool_call_id"),
        ([CALLING, {"role": "tool", "content": "x", "tool_call_id": "c2"}], "messages.1.tool_call_id"),
        ([CALLING, {"role": "tool", "content": "x", "tool_call_id": ["c1"]}], "messages.1.tool_call_id"),
        ([{**CALLING, "tool_calls": [5, {"id": []}]}, {"role": "tool", "tool_call_id": "x"}], "messages.1.role"),
    ],
)
def test_a_tool_message_answers_a_call(messages: list[Any], param: str) -> None:
    with pytest.raises(RequestError) as caught:
        parse(ChatCompletionRequest, {"messages": messages})
    assert caught.value.param == param
    assert str(caught.value).startswith(param)
    answer = {"role": "tool", "content": "x", "tool_call_id": "c1"}
    parse(ChatCompletionRequest, {"messages": [CALLING, answer, answer, *USER]})


def test_special_tokens_without_spaces_between_them_are_not_shown() -> None:
    fields = {"prompt": "a", "spaces_between_special_tokens": False}
    parse(CompletionRequest, fields)
    with pytest.raises(RequestError, match="spaces_between_special_tokens"):
        parse(CompletionRequest, {**fields, "skip_special_tokens": False})


def test_whole_numbers_may_be_written_as_floats() -> None:
    """JavaScript and some JSON libraries do so, and other servers take them."""
    fields = {"max_tokens": 2.0, "n": 1.0, "top_k": 5.0, "seed": 7.0, "logprobs": 3.0, "min_tokens": 0.0}
    body = parse(CompletionRequest, {"prompt": "a", **fields})
    for name, value in fields.items():
        assert getattr(body, name) == value
        assert type(getattr(body, name)) is int
    assert parse(ChatCompletionRequest, {"messages": USER, "max_completion_tokens": 2.0}).token_limit == 2


def test_harmless_and_unknown_fields_are_accepted() -> None:
    body = {"messages": USER, "user": "u", "metadata": {"a": "b"}, "store": True, "service_tier": "auto", "xyz": 1}
    body |= {"tools": [], "tool_choice": "none", "response_format": {"type": "text"}, "parallel_tool_calls": True}
    body |= {"modalities": ["text"], "best_of": 1, "temperature": None, "stop": None, "length_penalty": 1.0}
    assert parse(ChatCompletionRequest, body).messages[0].content == "hi"


@pytest.mark.parametrize("data", [[], "x", 5, None, True])
def test_a_body_must_be_an_object(data: Any) -> None:
    with pytest.raises(RequestError, match="JSON object"):
        parse(CompletionRequest, data)


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [("a", ["a"]), (["a", "b"], ["a", "b"]), ([1, 2], [[1, 2]]), ([[1], [2, 3]], [[1], [2, 3]]), ([], [])],
)
def test_forms_of_prompts(prompt: Any, prompts: list[Any]) -> None:
    found = parse(CompletionRequest, {"prompt": prompt}).prompts
    assert [one if isinstance(one, str) else list(one) for one in found] == prompts


def params(prompt_tokens: int = 10, defaults: SamplingDefaults | None = None, **fields: Any) -> Any:
    return sampling_params(
        parse(CompletionRequest, {"prompt": "a", **fields}),
        defaults=defaults or SamplingDefaults(),
        limits=LIMITS,
        prompt_tokens=prompt_tokens,
        logprobs=None,
        fallback_max_tokens=16,
    )


def test_the_models_defaults(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text(
        json.dumps({"temperature": 0.6, "top_p": 0.9, "top_k": 20, "max_new_tokens": 7, "eos_token_id": 1})
    )
    defaults = SamplingDefaults.read(str(tmp_path))
    chosen = params(defaults=defaults)
    assert (chosen.temperature, chosen.top_p, chosen.top_k, chosen.max_tokens) == (0.6, 0.9, 20, 7)
    assert params(defaults=defaults, temperature=0, top_k=-1, max_tokens=9).max_tokens == 9
    assert params(defaults=defaults, top_k=-1).top_k == 0
    assert SamplingDefaults.read(str(tmp_path / "nothing")) == SamplingDefaults()


def test_room_for_the_answer() -> None:
    assert params().max_tokens == 16
    assert params(prompt_tokens=95).max_tokens == 5
    with pytest.raises(RequestError, match="maximum context length"):
        params(prompt_tokens=100)
    with pytest.raises(RequestError, match="max_tokens"):
        params(prompt_tokens=95, max_tokens=6)
    with pytest.raises(RequestError, match="min_tokens"):
        params(min_tokens=17)


@pytest.mark.parametrize("key", ["x", "-1", "50", " 5", "1_0", "٣", "999999999999999"])
def test_biases_are_of_tokens_that_exist(key: str) -> None:
    with pytest.raises(RequestError) as caught:
        params(logit_bias={key: 1.0})
    assert caught.value.param == "logit_bias"


def test_seeds() -> None:
    assert params(seed=5).seed == seed_of_choice(5, 0) == 5
    assert 0 <= params(seed=-5).seed < 2**63
    assert len({seed_of_choice(5, n) for n in range(100)}) == 100
    assert params().seed != params().seed
    assert params(seed=-1).seed != params(seed=-1).seed, "as in vLLM, -1 is no seed"
    assert params(seed=-2).seed == params(seed=-2).seed


def test_allowed_tokens_must_leave_one_to_choose() -> None:
    assert params(allowed_token_ids=[7, 3, 7]).allowed_token_ids == (3, 7)
    assert params().allowed_token_ids is None
    limits = Limits(max_model_len=100, vocab_size=50, eos_token_ids=(3,))
    cases: list[tuple[dict[str, Any], tuple[tuple[int, ...], ...]]] = [
        ({"allowed_token_ids": [50]}, ()),
        ({"allowed_token_ids": [3, 7], "min_tokens": 1, "stop_token_ids": [7]}, ()),
        ({"allowed_token_ids": [3, 7]}, ((3,), (7,))),
    ]
    for fields, words in cases:
        body = parse(CompletionRequest, {"prompt": "a", **fields})
        with pytest.raises(RequestError) as caught:
            sampling_params(
                body, defaults=SamplingDefaults(), limits=limits, prompt_tokens=1, logprobs=None, bad_words=words
            )
        assert caught.value.param == "allowed_token_ids"


@pytest.mark.parametrize(
    ("fields", "kept"),
    [
        ({}, range(200)),
        ({"truncate_prompt_tokens": 3}, range(197, 200)),
        ({"truncate_prompt_tokens": 3, "truncation_side": "left"}, range(197, 200)),
        ({"truncate_prompt_tokens": 3, "truncation_side": "right"}, range(3)),
        ({"truncate_prompt_tokens": 500}, range(200)),
        ({"truncate_prompt_tokens": -1}, range(200 - 84, 200)),
        ({"truncate_prompt_tokens": -1, "max_tokens": 99}, range(199, 200)),
        ({"truncate_prompt_tokens": -1, "max_tokens": 40, "truncation_side": "right"}, range(60)),
    ],
)
def test_prompts_are_cut(fields: dict[str, Any], kept: range) -> None:
    body = parse(CompletionRequest, {"prompt": "a", **fields})
    cut = truncated(list(range(200)), body, defaults=SamplingDefaults(), limits=LIMITS, fallback_max_tokens=16)
    assert cut == list(kept)


def test_variables_of_the_template() -> None:
    body = parse(
        ChatCompletionRequest,
        {
            "messages": USER,
            "reasoning_effort": "low",
            "enable_thinking": False,
            "chat_template_kwargs": {"reasoning_effort": "high", "x": 1},
        },
    )
    assert body.template_kwargs == {"reasoning_effort": "low", "enable_thinking": False, "x": 1}
    assert parse(ChatCompletionRequest, {"messages": USER}).template_kwargs == {}
