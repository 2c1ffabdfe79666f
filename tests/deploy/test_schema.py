"""Bodies: what is accepted, what is refused, and which field the refusal names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cluster.errors import RequestError
from deploy.sampling import Limits, SamplingDefaults, sampling_params, seed_of_choice
from deploy.schema import ChatCompletionRequest, CompletionRequest, parse

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
        ("max_tokens", 0),
        ("max_tokens", -1),
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
        ("prompt_logprobs", 1),
        ("response_format", {"type": "json_object"}),
        ("guided_regex", "a*"),
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
        ("tools", [{"type": "function", "function": {"name": "f"}}]),
        ("tool_choice", "required"),
        ("response_format", {"type": "json_schema", "json_schema": {}}),
        ("top_logprobs", 3),
        ("max_completion_tokens", 0),
        ("logprobs", 1),
        ("modalities", ["audio"]),
    ],
)
def test_refused_fields_of_chat(field: str, value: Any) -> None:
    with pytest.raises(RequestError) as caught:
        parse(ChatCompletionRequest, {"messages": USER, field: value})
    assert caught.value.param is not None
    assert caught.value.param.split(".")[0] == field


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
