"""`/` and `/page/*`: the page's files, read once, with the headers that keep strangers' text from becoming code."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from fastapi import APIRouter, Request
from starlette.responses import Response

from elastic_moe.cluster.errors import RequestError
from elastic_moe.deploy.web.openapi import described, text_answer

FOLDER = Path(__file__).parent / "static"
TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
POLICY = "; ".join(
    [
        *("default-src 'none'", "script-src 'self'", "style-src 'self'", "img-src 'self'", "connect-src 'self'"),
        *("base-uri 'none'", "form-action 'none'", "frame-ancestors 'none'"),
        *("require-trusted-types-for 'script'", "trusted-types 'none'"),
    ]
)
FILE = {"description": "A file of the page.", "content": {kind.split(";")[0]: {} for kind in TYPES.values()}}
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    # the browser asks each time, and is told 304: an update of the server is an update of the page
    "cache-control": "no-cache",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class File:
    body: bytes
    kind: str
    etag: str


def read_files(folder: Path = FOLDER) -> dict[str, File]:
    """Every file of the page by its name."""
    files: dict[str, File] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix in TYPES:
            body = path.read_bytes()
            digest = hashlib.blake2b(body, digest_size=10).hexdigest()
            files[path.name] = File(body=body, kind=TYPES[path.suffix], etag=f'"{digest}"')
    return files


def page_router() -> APIRouter:
    router = APIRouter()
    files = read_files()

    def answer(request: Request, name: str) -> Response:
        file = files.get(name)
        if file is None:
            raise RequestError("no such file of the page", code="not_found", status=404)
        headers = {**HEADERS, "content-type": file.kind, "etag": file.etag}
        if request.headers.get("if-none-match") == file.etag:
            return Response(status_code=304, headers=headers)
        return Response(file.body, headers=headers)

    @router.get("/", **described(answers={200: text_answer("The page.", "text/html")}))
    async def index(request: Request) -> Response:
        return answer(request, "index.html")

    @router.get("/page/{name}", **described(answers={200: FILE}, errors=(404,)))
    async def file(request: Request, name: str) -> Response:
        return answer(request, name)

    return router
