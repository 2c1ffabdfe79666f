"""Puts a request's messages into the form that the model's chat template takes. Pure: it gets a function that renders,
and no tokenizer.

Templates differ in three ways that clients cannot know: whether content is a string or a list of parts, whether there
is a role `developer`, and that the arguments of a tool call are an object, where OpenAI's API has a string of JSON.

Many templates write whatever role they are given, or none. So a role that neither OpenAI's API nor the template knows
is refused here: it is a mistake that would otherwise only make the answer worse.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from elastic_moe.cluster.errors import RequestError
from elastic_moe.cluster.lines import meant

Message = dict[str, Any]
Render = Callable[[Sequence[Message]], str]
"""Raises whatever the template raises."""

MARK = "Zebra7"
"""A word that appears in a rendered prompt only if the template writes the content."""

ROLES = ("system", "developer", "user", "assistant", "tool", "function")
"""The roles of OpenAI's API."""
_WORD = re.compile(r"""'([^'\n]{1,64})'|"([^"\n]{1,64})\"""")

SEPARATOR = "\n"
"""What joins the parts of a content, for templates that take one string. The same as in vLLM."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TemplateForms:
    """The forms of messages that a chat template takes."""

    developer: bool
    """Whether the template knows the role `developer`; otherwise such a message becomes a system message."""
    in_parts: frozenset[str]
    """Roles whose content the template takes only as a list of parts."""
    thinking: bool = False
    """Whether the template calls the reasoning of a message `thinking`."""
    words: frozenset[str] = frozenset()
    """The strings in the template, among which are the roles that it compares with."""


def template_forms(source: str, render: Render, all_source: str = "") -> TemplateForms:
    """The forms that the template takes, found by trying each: with the right one, the content's words are rendered.

    all_source: the text of all templates, if there are several.
    """
    developer = "developer" in source
    in_parts: set[str] = set()

    def turn(role: str, text: str = "Hello") -> Message:
        return {"role": role, "content": _parts(text) if role in in_parts else text}

    def shows(*messages: Message) -> bool:
        try:
            return MARK in render(messages)
        except MemoryError:
            raise
        except Exception:  # noqa: BLE001 - templates raise what they like; a form that raises is not taken
            return False

    def learn(role: str, before: Callable[[], list[Message]], after: Callable[[], list[Message]]) -> None:
        for content in (MARK, _parts(MARK)):
            if shows(*before(), {**turn(role), "content": content}, *after()):
                if content is not MARK:
                    in_parts.add(role)
                return

    learn("user", list, list)
    for role in ("system", *(["developer"] if developer else [])):
        learn(role, list, lambda: [turn("user")])
    learn("assistant", lambda: [turn("user")], lambda: [turn("user")])
    call = {"id": "call00001", "type": "function", "function": {"name": "f", "arguments": {}}}
    calling = {"role": "assistant", "content": None, "tool_calls": [call]}
    learn("tool", lambda: [turn("user"), calling], list)
    thinking = "message.thinking" in source and "reasoning_content" not in source
    words = frozenset(one or other for one, other in _WORD.findall(all_source or source))
    return TemplateForms(developer=developer, in_parts=frozenset(in_parts), thinking=thinking, words=words)


def conversation(messages: Sequence[Mapping[str, Any]], forms: TemplateForms) -> list[Message]:
    """The messages for the template. Raises RequestError, which names the message, for malformed tool calls and for a
    role that is not known."""
    for number, message in enumerate(messages):
        _check_role(message["role"], forms, f"messages.{number}.role")
    return [_message(message, forms, f"messages.{number}") for number, message in enumerate(messages)]


def _check_role(role: str, forms: TemplateForms, where: str) -> None:
    if role not in ROLES and role not in forms.words:
        text = f"{where}: expected one of {', '.join(ROLES)}, got {role!r}{meant(role, ROLES)}"
        raise RequestError(text, param=where, code="invalid_value")


def text_of(content: str | Sequence[Mapping[str, Any]] | None) -> str:
    """A message's content as one string."""
    if content is None or isinstance(content, str):
        return content or ""
    return SEPARATOR.join(part["text"] for part in content)


def _message(message: Mapping[str, Any], forms: TemplateForms, where: str) -> Message:
    made = {key: value for key, value in message.items() if value is not None}
    # with an empty list, some templates take the turn for one of tool calls, and drop its content
    calls = made.pop("tool_calls", None)
    if calls:
        made["tool_calls"] = _tool_calls(calls, f"{where}.tool_calls")
    _name_reasoning(made, forms, calling=bool(calls))
    if made["role"] == "developer" and not forms.developer:
        made["role"] = "system"
    content = message.get("content")
    # beside tool calls, templates distinguish no content from an empty one
    if content is None and calls:
        return {**made, "content": None}
    if made["role"] in forms.in_parts:
        return {**made, "content": _parts(content or "") if isinstance(content, str | None) else list(content)}
    return {**made, "content": text_of(content)}


def _name_reasoning(made: Message, forms: TemplateForms, *, calling: bool) -> None:
    """Give the reasoning of an earlier answer the template's name for it, whichever name the client has given it."""
    reasoning = made.get("reasoning_content", made.get("reasoning"))
    if not isinstance(reasoning, str):
        return
    made["reasoning_content"] = reasoning
    # such templates refuse thinking and content in one message, and want the thinking only before a call
    if forms.thinking and calling and not made.get("content"):
        made.setdefault("thinking", reasoning)


def _parts(text: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text}]


def _tool_calls(calls: object, where: str) -> list[Message]:
    if not isinstance(calls, list):
        raise RequestError(f"{where}: expected a list", param=where, code="invalid_type")
    made = []
    for number, call in enumerate(calls):
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise RequestError(
                f"{where}.{number}.function: expected an object with a name and arguments",
                param=f"{where}.{number}.function",
                code="invalid_value",
            )
        made.append({**call, "function": {**function, "arguments": _arguments(function.get("arguments"))}})
    return made


def _arguments(given: object) -> object:
    """The arguments as an object. A string that is no JSON object, as a model may write it, stays a string."""
    if given is None:
        return {}
    if not isinstance(given, str):
        return given
    if not given.strip():
        return {}
    try:
        parsed = json.loads(given)
    except (ValueError, RecursionError):
        return given
    return {} if parsed is None else parsed if isinstance(parsed, dict) else given
