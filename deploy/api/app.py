"""The FastAPI application with all its routes, and the guard around it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import msgspec
from fastapi import APIRouter, FastAPI, Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from elastic_moe.cluster.errors import RequestError
from elastic_moe.deploy.api.admin import admin_router
from elastic_moe.deploy.api.chat import chat_router
from elastic_moe.deploy.api.completions import completions_router
from elastic_moe.deploy.api.elastic_ep import elastic_ep_router
from elastic_moe.deploy.api.events import events_router
from elastic_moe.deploy.api.guard import Guard
from elastic_moe.deploy.api.http_io import RETRY_AFTER_S, install_error_handlers
from elastic_moe.deploy.api.responses_route import responses_router
from elastic_moe.deploy.api.sampling import check_token_ids
from elastic_moe.deploy.api.service import Service, version
from elastic_moe.deploy.bodies.bounds import TokenIds
from elastic_moe.deploy.bodies.schema import DetokenizeRequest, TokenizeRequest
from elastic_moe.deploy.generation.metrics import CONTENT_TYPE
from elastic_moe.deploy.page.files import page_router
from elastic_moe.deploy.web.cors import install_cors
from elastic_moe.deploy.web.docs import docs_router
from elastic_moe.deploy.web.methods import Methods
from elastic_moe.deploy.web.openapi import EMPTY, described, install_openapi, json_answer, text_answer
from elastic_moe.deploy.web.running import Counted

TOKENS_AT_ONCE = 4096
"""Tokens of an answer of /tokenize that are written before other requests get their turn."""
MAX_DETOKENIZED = 2**18
"""Largest number of tokens that /detokenize takes."""


def create_app(service: Service) -> FastAPI:
    """Make the application, whose routes use `service`. The caller runs `service.begin()`."""
    app = FastAPI(
        title="Elastic MoE",
        version=version(),
        openapi_url=None,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    install_error_handlers(app)
    for router in (
        *(_status_router, _models_router, _tokenizer_router),
        *(completions_router, chat_router, responses_router, admin_router, elastic_ep_router, events_router),
    ):
        app.include_router(router(service))
    app.include_router(page_router())
    app.include_router(docs_router(app))
    install_openapi(app, service.config.root_path)
    app.add_middleware(Counted, running=service.requests)
    app.add_middleware(Methods, routes=app.router.routes)
    app.add_middleware(Guard, config=service.config)
    install_cors(app, service.config)
    return app


def _status_router(service: Service) -> APIRouter:
    router = APIRouter()
    ready = json_answer("Whether the server can serve, and why it cannot.", "ready", "reason", "error")

    @router.get("/health", **described(answers={200: EMPTY}))
    async def health() -> Response:
        return Response()

    @router.get("/ping", **described(answers={200: EMPTY}))
    async def ping() -> Response:
        return Response()

    # SageMaker posts
    @router.post("/ping", **described(answers={200: EMPTY}))
    async def ping_by_post() -> Response:
        return Response()

    @router.get("/load", **described(answers={200: json_answer("Running requests.", "server_load")}))
    async def load() -> dict[str, int]:
        return {"server_load": service.running}

    @router.get("/ready", **described(answers={200: ready, 503: ready}))
    async def readiness() -> Response:
        state = await service.readiness()
        body = {
            "ready": state.ready,
            "reason": state.reason,
            "error": state.error,
            "degraded": state.ready and state.resident < 1,
            "resident": state.resident,
        }
        headers = None if state.ready else {"Retry-After": str(RETRY_AFTER_S)}
        return JSONResponse(body, 200 if state.ready else 503, headers)

    @router.get("/version", **described(answers={200: json_answer("The version.", "version")}))
    async def versions() -> dict[str, str]:
        return {"version": version()}

    @router.get("/metrics", **described(answers={200: text_answer("Prometheus metrics.", "text/plain")}))
    async def metrics() -> Response:
        text = await service.metrics.scrape(service.backend)
        # without media_type, for which Response would add a second charset
        return Response(text, headers={"content-type": CONTENT_TYPE})

    return router


def _models_router(service: Service) -> APIRouter:
    router = APIRouter()

    async def card() -> dict[str, Any]:
        ready = (await service.readiness()).ready
        return {
            "id": service.model_name,
            "object": "model",
            "created": service.created,
            "owned_by": "emoe",
            "root": service.model_dir,
            "parent": None,
            "max_model_len": (await service.limits()).max_model_len if ready else None,
        }

    listed = {200: json_answer("The one model.", "object", "data")}

    @router.get("/v1/models", **described(answers=listed))
    @router.get("/v1/models/", include_in_schema=False)
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [await card()]}

    # a path, because names of models may contain slashes
    @router.get(
        "/v1/models/{model_id:path}",
        **described(answers={200: json_answer("The model.", "id", "object", "created", "owned_by")}, errors=(404,)),
    )
    async def model(model_id: str) -> dict[str, Any]:
        service.check_model(model_id)
        return await card()

    return router


def _tokenizer_router(service: Service) -> APIRouter:
    """/tokenize, /detokenize and /tokenizer_info, as vLLM has them."""
    router = APIRouter()
    tokens = json_answer("The tokens.", "count", "max_model_len", "tokens", "token_strs")

    @router.get("/tokenizer_info", **described(answers={200: json_answer("The tokenizer.", "tokenizer_class")}))
    async def info() -> Response:
        return Response(msgspec.json.encode(service.texts.tokenizer.info()), media_type="application/json")

    @router.post("/tokenize", **described(body=TokenizeRequest, answers={200: tokens}, errors=(404,)))
    async def tokenize(request: Request) -> Response:
        body = await service.bodies.read(request, TokenizeRequest)
        service.check_model(body.model)
        if (body.prompt is None) == (body.messages is None):
            raise RequestError("prompt: expected either prompt or messages", param="prompt")
        tokenizer = service.texts.tokenizer
        text, special, param = body.prompt or "", body.add_special_tokens is not False, "prompt"
        if body.messages is not None:
            text = await service.render_chat(body.messages, body)
            special, param = bool(body.add_special_tokens), "messages"
        ids = await service.texts.encode(text, add_special_tokens=special, param=param)
        longest = (await service.limits()).max_model_len
        name = tokenizer.token_string if body.return_token_strs else None
        return StreamingResponse(_token_json(ids, longest, name), media_type="application/json")

    @router.post(
        "/detokenize",
        **described(body=DetokenizeRequest, answers={200: json_answer("The text.", "prompt")}, errors=(404,)),
    )
    async def detokenize(request: Request) -> Response:
        body = await service.bodies.read(request, DetokenizeRequest)
        service.check_model(body.model)
        if len(body.tokens) > MAX_DETOKENIZED:
            raise RequestError(f"tokens: expected at most {MAX_DETOKENIZED}, got {len(body.tokens)}", param="tokens")
        check_token_ids(body.tokens, (await service.limits()).vocab_size, "tokens")
        text = await service.texts.decode(body.tokens)
        return Response(msgspec.json.encode({"prompt": text}), media_type="application/json")

    return router


async def _token_json(tokens: TokenIds, longest: int, name: Callable[[int], str] | None) -> AsyncIterator[bytes]:
    """The answer of /tokenize in parts, because millions of tokens in one part would hold up every stream."""
    yield b'{"count":%d,"max_model_len":%d,"tokens":[' % (len(tokens), longest)
    for begin in range(0, len(tokens), TOKENS_AT_ONCE):
        part = list(tokens[begin : begin + TOKENS_AT_ONCE])
        yield (b"," if begin else b"") + msgspec.json.encode(part)[1:-1]
        await asyncio.sleep(0)
    if name is None:
        yield b'],"token_strs":null}'
        return
    yield b'],"token_strs":['
    for begin in range(0, len(tokens), TOKENS_AT_ONCE):
        names = [name(token) for token in tokens[begin : begin + TOKENS_AT_ONCE]]
        yield (b"," if begin else b"") + msgspec.json.encode(names)[1:-1]
        await asyncio.sleep(0)
    yield b"]}"
