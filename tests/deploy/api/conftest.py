"""OpenAI's client and the server that it asks: one for each file of tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from tests.deploy.fakes import FakeBackend
from tests.deploy.listening import Server


@pytest.fixture(scope="module")
def server(model_dir: Path) -> Iterator[Server]:
    with Server(FakeBackend(delay_s=0.002), model_dir) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="key", max_retries=0) as made:
        yield made
