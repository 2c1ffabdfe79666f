"""The description of every call: bodies, answers and errors, for openapi.json and /docs."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from elastic_moe.deploy.bodies.base import Body

ERRORS = {
    400: "The request has a fault; `param` names the field.",
    401: "The key is missing or wrong.",
    403: "The caller, or the name in Host, is not allowed.",
    404: "There is no such model, operation or file.",
    408: "The operation is not done in time, and goes on.",
    409: "Another operation is under way.",
    413: "The body is too large.",
    415: "The body is not JSON.",
    500: "The server has failed; its log says more.",
    503: "The server cannot serve now; Retry-After says when to try again.",
}
ALWAYS = (401, 403, 500, 503)
"""Errors that every call may answer with."""
OF_BODIES = (400, 413, 415)
_REF = "#/components/schemas/{model}"
ERROR: dict[str, Any] = {
    "type": "object",
    "title": "Error",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}

EMPTY: dict[str, Any] = {"description": "Nothing."}
"""An answer without a body."""


def described(
    *,
    body: type[Body] | Mapping[str, Any] | None = None,
    optional: bool = False,
    answers: Mapping[int, Mapping[str, Any]] | None = None,
    errors: tuple[int, ...] = (),
) -> dict[str, Any]:
    """Arguments of a route's decorator.

    body: the model of the JSON body, or its schema; `optional` where it may be left out. answers: by status, what
    `json_answer` and the functions beside it return; 200 with any JSON if not given. errors: statuses besides those
    that every call may answer with.
    """
    statuses = sorted({*ALWAYS, *errors, *(OF_BODIES if body is not None else ())})
    responses: dict[int | str, dict[str, Any]] = {s: dict(answer) for s, answer in (answers or {}).items()}
    responses = {s: error_answer(s) for s in statuses} | responses
    extra: dict[str, Any] = {}
    if body is not None:
        schema = body if isinstance(body, Mapping) else _schema(body)
        extra["requestBody"] = {"required": not optional, "content": {"application/json": {"schema": schema}}}
    return {"responses": responses, "openapi_extra": extra}


@cache
def _schema(body: type[Body]) -> Mapping[str, Any]:
    return body.model_json_schema(ref_template=_REF)


def error_answer(status: int) -> dict[str, Any]:
    answer: dict[str, Any] = {
        "description": ERRORS[status],
        "content": {"application/json": {"schema": {"$ref": _REF.format(model="Error")}}},
    }
    if status == 503:
        answer["headers"] = {"Retry-After": {"schema": {"type": "string"}, "description": "Seconds."}}
    return answer


def json_answer(description: str, *required: str, kind: str = "object") -> dict[str, Any]:
    """An answer with a JSON object that has the fields `required`, or with JSON of another kind."""
    schema: dict[str, Any] = {"type": kind}
    if required:
        schema["required"] = list(required)
    return {"description": description, "content": {"application/json": {"schema": schema}}}


EVENTS: dict[str, Any] = {"schema": {"description": "Server-sent events."}}
"""Without a type: some tools hold the whole text against the schema, and others each event."""


def streamable_answer(description: str, *required: str) -> dict[str, Any]:
    """As `json_answer`, or as server-sent events where the body has `stream`."""
    answer = json_answer(description, *required)
    answer["content"]["text/event-stream"] = EVENTS
    return answer


def text_answer(description: str, kind: str) -> dict[str, Any]:
    schema = EVENTS if kind == "text/event-stream" else {"schema": {"type": "string"}}
    return {"description": description, "content": {kind: schema}}


def install_openapi(app: FastAPI, root_path: str) -> None:
    """Make `app.openapi()` return the whole description. `root_path` is the path under which a proxy serves it."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            servers = [{"url": root_path}] if root_path else None
            app.openapi_schema = _tidied(
                get_openapi(title=app.title, version=app.version, routes=app.routes, servers=servers)
            )
        return app.openapi_schema

    vars(app)["openapi"] = openapi


def _tidied(document: dict[str, Any]) -> dict[str, Any]:
    """The document with the bodies' definitions among its components, and without FastAPI's own errors."""
    schemas = document.setdefault("components", {}).setdefault("schemas", {})
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    schemas["Error"] = ERROR
    for operations in document["paths"].values():
        for operation in operations.values():
            operation["responses"].pop("422", None)
            for answer in operation["responses"].values():
                # FastAPI writes that every answer of 200 is JSON
                if answer["description"] == EMPTY["description"]:
                    answer.pop("content", None)
            content = operation.get("requestBody", {}).get("content", {}).get("application/json")
            if content is not None:
                schemas.update(content["schema"].get("$defs", {}))
                content["schema"] = {key: value for key, value in content["schema"].items() if key != "$defs"}
    return document
