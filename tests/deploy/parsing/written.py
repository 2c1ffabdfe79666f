"""How families write reasoning and calls: the text that a model would write, for tests."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from elastic_moe.deploy.parsing.formats import AnswerForm, family_called

Call = tuple[str, Mapping[str, Any]]


def as_json(arguments: Mapping[str, Any]) -> str:
    return json.dumps(arguments, ensure_ascii=False)


def _tagged(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _hermes(calls: Sequence[Call]) -> str:
    return "\n".join(
        f'<tool_call>\n{{"name": "{name}", "arguments": {as_json(arguments)}}}\n</tool_call>'
        for name, arguments in calls
    )


def _qwen3_coder(calls: Sequence[Call]) -> str:
    return "\n".join(
        f"<tool_call>\n<function={name}>\n"
        + "".join(f"<parameter={key}>\n{_tagged(value)}\n</parameter>\n" for key, value in arguments.items())
        + "</function>\n</tool_call>"
        for name, arguments in calls
    )


def _glm45(calls: Sequence[Call]) -> str:
    return "\n".join(
        f"<tool_call>{name}\n"
        + "".join(
            f"<arg_key>{key}</arg_key>\n<arg_value>{_tagged(value)}</arg_value>\n" for key, value in arguments.items()
        )
        + "</tool_call>"
        for name, arguments in calls
    )


def _minimax_m2(calls: Sequence[Call]) -> str:
    invokes = "\n".join(
        f'<invoke name="{name}">\n'
        + "".join(f'<parameter name="{key}">{_tagged(value)}</parameter>\n' for key, value in arguments.items())
        + "</invoke>"
        for name, arguments in calls
    )
    return f"<minimax:tool_call>\n{invokes}\n</minimax:tool_call>"


def _deepseek_v3(calls: Sequence[Call]) -> str:
    each = "\n".join(
        f"<｜tool▁call▁begin｜>function<｜tool▁sep｜>{name}\n```json\n{as_json(arguments)}\n```<｜tool▁call▁end｜>"
        for name, arguments in calls
    )
    return f"<｜tool▁calls▁begin｜>{each}<｜tool▁calls▁end｜>"


def _deepseek_v31(calls: Sequence[Call]) -> str:
    each = "".join(
        f"<｜tool▁call▁begin｜>{name}<｜tool▁sep｜>{as_json(arguments)}<｜tool▁call▁end｜>" for name, arguments in calls
    )
    return f"<｜tool▁calls▁begin｜>{each}<｜tool▁calls▁end｜>"


def _kimi_k2(calls: Sequence[Call]) -> str:
    each = "".join(
        f"<|tool_call_begin|>functions.{name}:{number}<|tool_call_argument_begin|>{as_json(arguments)}<|tool_call_end|>"
        for number, (name, arguments) in enumerate(calls)
    )
    return f"<|tool_calls_section_begin|>{each}<|tool_calls_section_end|>"


def _openai(calls: Sequence[Call]) -> str:
    return "<|start|>assistant".join(
        f"<|channel|>commentary to=functions.{name} <|constrain|>json<|message|>{as_json(arguments)}<|call|>"
        for name, arguments in calls
    )


def _mistral(calls: Sequence[Call]) -> str:
    return "[TOOL_CALLS] [" + ", ".join(as_json({"name": name, "arguments": args}) for name, args in calls) + "]"


def _mistral_args(calls: Sequence[Call]) -> str:
    return "".join(f"[TOOL_CALLS]{name}[CALL_ID]abcdefgh1[ARGS]{as_json(arguments)}" for name, arguments in calls)


def _llama3_json(calls: Sequence[Call]) -> str:
    return "; ".join(as_json({"name": name, "parameters": arguments}) for name, arguments in calls)


def _json_list(calls: Sequence[Call]) -> str:
    return as_json([{"name": name, "arguments": arguments} for name, arguments in calls])  # type: ignore[arg-type]


def _gemma4(calls: Sequence[Call]) -> str:
    def value(given: Any) -> str:
        return f'<|"|>{given}<|"|>' if isinstance(given, str) else json.dumps(given)

    def pairs(arguments: Mapping[str, Any]) -> str:
        return ",".join(f"{key}:{value(given)}" for key, given in arguments.items())

    return "".join(f"<|tool_call>call:{name}{{{pairs(arguments)}}}<tool_call|>" for name, arguments in calls)


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """A family's way to write."""

    calls: Callable[[Sequence[Call]], str]
    reasoning: tuple[str, str] = ("<think>\n", "\n</think>\n\n")
    content: tuple[str, str] = ("", "")
    family_of_reasoning: str | None = "think"
    most_calls: int = 3
    before: bool = True
    """Whether content and reasoning may precede the calls."""


FAMILIES = {
    "hermes": Written(calls=_hermes),
    "qwen3_coder": Written(calls=_qwen3_coder),
    "glm45": Written(calls=_glm45),
    "minimax_m2": Written(calls=_minimax_m2),
    "deepseek_v3": Written(calls=_deepseek_v3),
    "deepseek_v31": Written(calls=_deepseek_v31),
    "kimi_k2": Written(calls=_kimi_k2),
    "openai": Written(
        calls=_openai,
        reasoning=("<|channel|>analysis<|message|>", "<|end|><|start|>assistant"),
        content=("<|channel|>commentary<|message|>", "<|end|><|start|>assistant"),
        family_of_reasoning="openai",
    ),
    "mistral": Written(calls=_mistral, family_of_reasoning=None),
    "mistral_args": Written(
        calls=_mistral_args, reasoning=("[THINK]", "[/THINK]"), family_of_reasoning="mistral_think"
    ),
    "llama3_json": Written(calls=_llama3_json, family_of_reasoning=None, most_calls=1, before=False),
    "json_list": Written(calls=_json_list, family_of_reasoning=None, before=False),
    "gemma4": Written(calls=_gemma4, reasoning=("<|channel>thought\n", "<channel|>"), family_of_reasoning="gemma4"),
}


def form_of(name: str) -> AnswerForm:
    """How a model of the family writes reasoning and calls."""
    reasoning = FAMILIES[name].family_of_reasoning
    return AnswerForm(tools=family_called(name), reasoning=family_called(reasoning) if reasoning else None)
