"""The clients that are tried, and what their environments hold."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Client:
    name: str
    packages: tuple[str, ...]
    script: str

    @property
    def in_python(self) -> bool:
        return self.script.endswith(".py")


CLIENTS = (
    Client(name="openai", packages=("openai",), script="openai_client.py"),
    Client(name="litellm", packages=("litellm",), script="litellm_client.py"),
    Client(name="langchain", packages=("langchain-openai",), script="langchain_client.py"),
    Client(name="llama-index", packages=("llama-index-llms-openai-like",), script="llamaindex_client.py"),
    Client(name="pydantic-ai", packages=("pydantic-ai-slim[openai]",), script="pydantic_ai_client.py"),
    Client(name="instructor", packages=("instructor",), script="instructor_client.py"),
    Client(name="dspy", packages=("dspy",), script="dspy_client.py"),
    Client(name="llm", packages=("llm",), script="llm_client.py"),
    Client(name="openai-js", packages=("openai",), script="openai_client.mjs"),
    Client(name="ai-sdk", packages=("ai", "@ai-sdk/openai-compatible"), script="ai_sdk_client.mjs"),
)
