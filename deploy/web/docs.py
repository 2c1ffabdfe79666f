"""/openapi.json, and /docs, which shows it: a page without scripts, so that it works offline and behind any policy."""

from __future__ import annotations

import html
from collections.abc import Iterable
from typing import Any

from fastapi import APIRouter, FastAPI
from starlette.responses import JSONResponse, Response

from elastic_moe.deploy.web.openapi import described, json_answer, text_answer

METHODS = ("get", "post", "put", "delete")
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
html { color-scheme: light dark }
code, h2 { font-family: ui-monospace, monospace } h2 { font-size: 1rem; margin-top: 2rem }
table { border-collapse: collapse; width: 100% }
td, th { text-align: left; padding: .15rem .8rem .15rem 0; vertical-align: top }
"""
POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"


def docs_router(app: FastAPI) -> APIRouter:
    """The routes that describe `app`, themselves included."""
    router = APIRouter()

    @router.get("/openapi.json", **described(answers={200: json_answer("This description.", "openapi", "paths")}))
    async def openapi() -> Response:
        return JSONResponse(app.openapi())

    @router.get("/docs", **described(answers={200: text_answer("This description, to read.", "text/html")}))
    async def docs() -> Response:
        headers = {"content-security-policy": POLICY, "x-content-type-options": "nosniff"}
        return Response(page(app.openapi()), media_type="text/html", headers=headers)

    return router


def page(document: dict[str, Any]) -> str:
    """An OpenAPI document as HTML."""
    title = html.escape(f"{document['info']['title']} {document['info']['version']}")
    calls = [
        _call(document, method, path, operation)
        for path, operations in document["paths"].items()
        for method, operation in operations.items()
        if method in METHODS
    ]
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title><style>{STYLE}</style>'
        f'<h1>{title}</h1><p>The same for programs: <a href="openapi.json">openapi.json</a></p>{"".join(calls)}</html>'
    )


def _call(document: dict[str, Any], method: str, path: str, operation: dict[str, Any]) -> str:
    parts = [f"<h2>{method.upper()} {html.escape(path)}</h2>"]
    content = operation.get("requestBody", {}).get("content", {}).get("application/json")
    if content is not None:
        schema = _resolved(document, content["schema"])
        required = schema.get("required", ())
        rows = [
            (_code(name) + (" (required)" if name in required else ""), _kind(document, field), _text(field))
            for name, field in schema.get("properties", {}).items()
        ]
        parts.append(_table(("field", "value", ""), rows))
    answers = [
        (status, html.escape(answer["description"]), html.escape(", ".join(answer.get("content", ()))))
        for status, answer in sorted(operation["responses"].items())
    ]
    return "".join([*parts, _table(("status", "answer", ""), answers)])


def _resolved(document: dict[str, Any], schema: dict[str, Any]) -> dict[str, Any]:
    name = schema.get("$ref", "").rpartition("/")[2]
    found: dict[str, Any] = document["components"]["schemas"][name] if name else schema
    return found


def _kind(document: dict[str, Any], schema: dict[str, Any]) -> str:
    """The type of a field in a few words, with its bounds."""
    if "$ref" in schema:
        return html.escape(_resolved(document, schema).get("title", "object"))
    if forms := schema.get("anyOf"):
        return " or ".join(dict.fromkeys(_kind(document, form) for form in forms if form.get("type") != "null"))
    if "enum" in schema:
        return " or ".join(_code(str(value)) for value in schema["enum"])
    kind = str(schema.get("type", "any"))
    if kind == "array":
        return f"list of {_kind(document, schema.get('items', {}))}"
    bounds = [
        f"{word} {schema[key]:g}"
        for key, word in (("minimum", "from"), ("exclusiveMinimum", "above"), ("maximum", "to"))
        if key in schema
    ]
    return " ".join([kind, *bounds])


def _text(schema: dict[str, Any]) -> str:
    return html.escape(schema.get("description", ""))


def _code(text: str) -> str:
    return f"<code>{html.escape(text)}</code>"


def _table(head: Iterable[str], rows: Iterable[tuple[str, ...]]) -> str:
    lines = ["".join(f"<td>{cell}</td>" for cell in row) for row in rows]
    titles = "".join(f"<th>{title}</th>" for title in head)
    return f"<table><tr>{titles}</tr>" + "".join(f"<tr>{line}</tr>" for line in lines) + "</table>"
