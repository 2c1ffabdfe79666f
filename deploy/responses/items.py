"""The items of a conversation, and the messages that a chat template takes. Pure.

Items come from clients and from earlier responses: messages, function calls, their outputs, and reasoning.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from elastic_moe.cluster.errors import RequestError
from elastic_moe.deploy.bodies.json_text import type_name

Item = dict[str, Any]
Message = dict[str, Any]

ROLES = ("user", "assistant", "system", "developer")
TEXT_PARTS = ("input_text", "output_text", "text", "summary_text", "reasoning_text")
REASONING_KEY = "reasoning_content"
"""Where chat templates look for the reasoning of an earlier answer."""


def input_items(given: str | Sequence[Mapping[str, Any]], suffix: str) -> list[Item]:
    """The input of a request as items, each with an id that is made of `suffix`. Raises RequestError, which names the
    item."""
    if isinstance(given, str):
        given = [{"role": "user", "content": given}]
    return [_item(item, f"input.{number}", f"{suffix}{number:04x}") for number, item in enumerate(given)]


def messages(items: Sequence[Item], instructions: str | None) -> list[Message]:
    """The messages of a conversation. Raises RequestError for an output that belongs to no call."""
    made: list[Message] = [{"role": "system", "content": instructions}] if instructions else []
    thought: list[str] = []
    for number, item in enumerate(items):
        match item["type"]:
            case "reasoning":
                thought.append(_reasoning_text(item))
            case "function_call":
                _assistant(made, thought)["tool_calls"].append(_call(item))
            case "function_call_output":
                if item["call_id"] not in _open_calls(made):
                    raise RequestError(
                        f"input: the output of call {item['call_id'][:100]!r} does not follow its function_call",
                        param="input",
                        code="invalid_value",
                    )
                made.append({"role": "tool", "tool_call_id": item["call_id"], "content": _output_text(item["output"])})
            case _:
                assert item["type"] == "message", number
                message = {"role": item["role"], "content": text_of(item["content"])}
                if item["role"] == "assistant" and thought:
                    message[REASONING_KEY] = "\n".join(thought)
                made.append(message)
        if item["type"] != "reasoning":
            thought.clear()
    for message in made:
        if message.get("tool_calls") == []:
            del message["tool_calls"]
    return made


def text_of(content: str | Sequence[Mapping[str, Any]]) -> str:
    if isinstance(content, str):
        return content
    return "\n".join(part["text"] if part["type"] != "refusal" else part["refusal"] for part in content)


def _assistant(made: list[Message], thought: Sequence[str]) -> Message:
    """The assistant's turn that a call belongs to: the last message if it is one, or else a new one."""
    if made and made[-1]["role"] == "assistant" and not thought:
        last = made[-1]
    else:
        last = {"role": "assistant", "content": None}
        if thought:
            last[REASONING_KEY] = "\n".join(thought)
        made.append(last)
    last.setdefault("tool_calls", [])
    return last


def _open_calls(made: Sequence[Message]) -> list[str]:
    """The ids of the calls in the assistant's last turn, where nothing but outputs of calls follows it."""
    turn = next((message for message in reversed(made) if message["role"] != "tool"), {})
    return [call["id"] for call in turn.get("tool_calls", [])]


def _call(item: Item) -> dict[str, Any]:
    function = {"name": item["name"], "arguments": item["arguments"]}
    return {"id": item["call_id"], "type": "function", "function": function}


def _reasoning_text(item: Item) -> str:
    parts = item.get("content") or item.get("summary") or []
    return "\n".join(part["text"] for part in parts)


def _output_text(output: str | Sequence[Mapping[str, Any]]) -> str:
    return output if isinstance(output, str) else text_of(output)


# --- What clients send ----------------------------------------------------------------------------------------------


def _item(given: Mapping[str, Any], path: str, suffix: str) -> Item:
    kind = given.get("type", "message" if "role" in given else None)
    match kind:
        case "message":
            return _message(given, path, suffix)
        case "function_call":
            return {
                "id": _text(given, "id", path, f"fc_{suffix}"),
                "type": kind,
                "call_id": _text(given, "call_id", path),
                "name": _text(given, "name", path),
                "arguments": _text(given, "arguments", path),
                "status": "completed",
            }
        case "function_call_output":
            return {
                "id": _text(given, "id", path, f"fco_{suffix}"),
                "type": kind,
                "call_id": _text(given, "call_id", path),
                "output": _content(given.get("output"), f"{path}.output"),
                "status": "completed",
            }
        case "reasoning":
            return {
                "id": _text(given, "id", path, f"rs_{suffix}"),
                "type": kind,
                "summary": _content(given.get("summary") or [], f"{path}.summary"),
                "content": _content(given.get("content") or [], f"{path}.content"),
            }
        case str():
            raise _fault(f"{path}.type", f"items of the type {kind[:80]!r} are not supported", "unsupported_value")
    raise _fault(f"{path}.type", "this field is required", "missing_required_parameter")


def _message(given: Mapping[str, Any], path: str, suffix: str) -> Item:
    role = _text(given, "role", path)
    if role not in ROLES:
        raise _fault(f"{path}.role", f"expected one of {', '.join(ROLES)}, got {role[:80]!r}")
    content = _content(given.get("content"), f"{path}.content")
    if isinstance(content, str):
        content = [{"type": "output_text" if role == "assistant" else "input_text", "text": content}]
    if role == "assistant":
        # what OpenAI's clients require of an output
        content = [{**part, "annotations": []} if part["type"] == "output_text" else part for part in content]
    return {
        "id": _text(given, "id", path, f"msg_{suffix}"),
        "type": "message",
        "role": role,
        "content": content,
        "status": "completed",
    }


def _content(given: object, path: str) -> Any:
    if isinstance(given, str):
        return given
    if not isinstance(given, list):
        raise _fault(path, f"expected a string or a list of text parts, got {type_name(given)}")
    return [_part(part, f"{path}.{number}") for number, part in enumerate(given)]


def _part(given: object, path: str) -> dict[str, Any]:
    if not isinstance(given, dict):
        raise _fault(path, f"expected an object, got {type_name(given)}")
    kind = _text(given, "type", path)
    if kind == "refusal":
        return {"type": kind, "refusal": _text(given, "refusal", path)}
    if kind not in TEXT_PARTS:
        raise _fault(f"{path}.type", f"only text is supported, got {kind[:80]!r}", "unsupported_value")
    return {"type": kind, "text": _text(given, "text", path)}


def _text(given: Mapping[str, Any], name: str, path: str, default: str | None = None) -> str:
    value = given.get(name, default)
    if value is None:
        if default is not None:
            return default
        raise _fault(f"{path}.{name}", "this field is required", "missing_required_parameter")
    if not isinstance(value, str):
        raise _fault(f"{path}.{name}", f"expected a string, got {type_name(value)}")
    return value


def _fault(path: str, message: str, code: str = "invalid_value") -> RequestError:
    return RequestError(f"{path}: {message}", param=path, code=code)
