"""The messages of a chat, and the checks of what they say: their contents, and the calls of tools in the history.

Whether the chat template takes their roles is found where it is rendered (deploy/text/conversation.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field

from elastic_moe.cluster.errors import RequestError
from elastic_moe.deploy.bodies.base import Body

SPOKEN = ("system", "developer", "user")
"""The roles whose messages need a content."""


class TextPart(Body):
    type: Literal["text"]
    text: str


class Message(Body):
    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)

    role: Annotated[str, Field(min_length=1, max_length=64)]
    content: str | list[TextPart] | None = None

    def to_template(self) -> dict[str, Any]:
        """The message as plain values. Further keys (name, tool_calls, ...) stay as they came."""
        content = self.content
        parts = [{"type": part.type, "text": part.text} for part in content] if isinstance(content, list) else content
        return {**(self.model_extra or {}), "role": self.role, "content": parts}


def check_contents(messages: Sequence[Any]) -> None:
    """Raises RequestError for a message that says nothing. One of the assistant's may have calls or reasoning instead,
    and the result of a tool may be none."""
    for number, message in enumerate(messages):
        if message.content is not None:
            continue
        given = "content" in message.model_fields_set
        where = f"messages.{number}.content"
        if given and message.role in SPOKEN:
            text = f"{where}: expected a string or a list of text parts, got null"
            raise RequestError(text, param=where, code="invalid_value")
        if not given and (message.role in SPOKEN or (message.role == "assistant" and not message.model_extra)):
            text = f"{where}: this field is required"
            raise RequestError(text, param=where, code="missing_required_parameter")


def check_history(messages: Sequence[Any]) -> None:
    """Raises RequestError for a tool message that answers no call of the assistant's message before it."""
    asked: set[str] = set()
    for number, message in enumerate(messages):
        more = message.model_extra or {}
        if message.role != "tool":
            calls = more.get("tool_calls")
            asked = _ids(calls) if isinstance(calls, list) else set()
            continue
        where = f"messages.{number}"
        if not asked:
            raise RequestError(
                f"{where}.role: a message with the role 'tool' must follow an assistant message with tool_calls",
                param=f"{where}.role",
                code="invalid_value",
            )
        call_id = more.get("tool_call_id")
        if call_id is None:
            raise RequestError(
                f"{where}.tool_call_id: this field is required",
                param=f"{where}.tool_call_id",
                code="missing_required_parameter",
            )
        if not isinstance(call_id, str) or call_id not in asked:
            raise RequestError(
                f"{where}.tool_call_id: the message before it has no call {str(call_id)[:100]!r}",
                param=f"{where}.tool_call_id",
                code="invalid_value",
            )


def _ids(calls: Sequence[Any]) -> set[str]:
    return {call["id"] for call in calls if isinstance(call, dict) and isinstance(call.get("id"), str)}
