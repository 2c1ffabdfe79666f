"""The fields of a chat that say which tools the model may call."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, field_validator

from elastic_moe.cluster.errors import RequestError
from elastic_moe.deploy.bodies.base import Body

ToolName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.:/-]{1,128}$")]
"""OpenAI allows fewer characters and 64 of them; servers of tools have longer names with dots, which vLLM takes."""

CHOICES = ("none", "auto", "required")
FORM_OF_CHOICE = 'none, auto, required, or {"type": "function", "function": {"name": ...}}'


class Function(Body):
    """Further keys stay as they came, for the chat template."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)

    name: ToolName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    """A JSON schema."""
    strict: bool | None = None


class Tool(Body):
    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)

    type: Literal["function"]
    function: Function


class ToolFields(Body):
    tools: list[Tool] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None

    @field_validator("tool_choice")
    @classmethod
    def _check_choice(cls, choice: str | dict[str, Any] | None) -> str | dict[str, Any] | None:
        if choice is None or (isinstance(choice, str) and choice in CHOICES):
            return choice
        if isinstance(choice, dict) and choice.get("type", "function") == "function" and named_function(choice):
            return choice
        raise ValueError(f"expected {FORM_OF_CHOICE}")

    @property
    def callable_tools(self) -> list[dict[str, Any]]:
        """The tools that the model may call, as they came. With the choice "none" there are none."""
        if self.tool_choice == "none":
            return []
        return [tool.model_dump(exclude_unset=True) for tool in self.tools or ()]

    @property
    def named_tool(self) -> str | None:
        """The tool that must be called, where the request names one."""
        return named_function(self.tool_choice) if isinstance(self.tool_choice, dict) else None

    @property
    def must_call(self) -> bool:
        return self.tool_choice == "required" or self.named_tool is not None


def named_function(choice: Mapping[str, Any]) -> str | None:
    function = choice.get("function")
    name = function.get("name") if isinstance(function, dict) else None
    return name if isinstance(name, str) and name else None


def check_choice(body: ToolFields) -> None:
    """Raises RequestError where the request asks for a call of a tool that it does not have."""
    names = {tool.function.name for tool in body.tools or ()}
    if body.must_call and not names:
        raise RequestError(
            "tool_choice: tools must be given with it", param="tool_choice", code="missing_required_parameter"
        )
    if body.named_tool is not None and body.named_tool not in names:
        raise RequestError(
            f"tool_choice: tools has no function {body.named_tool[:100]!r}", param="tool_choice", code="invalid_value"
        )
