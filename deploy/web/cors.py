"""What pages of other origins may do (CORS), by vLLM's flags."""

from __future__ import annotations

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

from elastic_moe.cluster.config import ServeConfig


def install_cors(app: FastAPI, config: ServeConfig) -> None:
    """Let pages of --allowed-origins read answers; without that flag, none may.

    Call it after every other middleware has been added: a refusal by the guard must be readable too, and a browser
    sends no key with the question whether it may ask.
    """
    origins = config.origins
    if not origins:
        return
    app.add_middleware(
        CORSMiddleware,
        allow_origins=origins,
        allow_credentials=config.allow_credentials,
        allow_methods=config.cors_methods,
        allow_headers=config.cors_headers,
        # a browser asks before a page of the internet may call a server on the user's own machine
        allow_private_network="*" not in origins,
        expose_headers=("Retry-After",),
    )
