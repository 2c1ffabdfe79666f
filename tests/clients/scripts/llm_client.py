"""llm, the command line tool, by its library. It leaves it to the model whether a tool is called."""

import json
import os
import pathlib
import tempfile

from checks import MODEL, PERSON, QUESTION, TOKENS, URL, check_person, expect, run

home = pathlib.Path(tempfile.mkdtemp())
os.environ["LLM_USER_PATH"] = str(home)
settings = [
    {"model_id": "served", "model_name": MODEL, "api_base": URL, "supports_schema": True, "supports_tools": True}
]
(home / "extra-openai-models.yaml").write_text(json.dumps(settings))

import llm  # noqa: E402 - it reads its settings when it is imported

model = llm.get_model("served")
model.key = "none"


def get_weather(city: str) -> str:
    """Weather of a city."""
    return "sunny"


def chat():
    expect(model.prompt(QUESTION, stream=False, max_tokens=TOKENS).text(), "no text")
    return True


def stream():
    expect("".join(model.prompt(QUESTION, stream=True, max_tokens=TOKENS)), "no text")
    return True


def structured():
    check_person(json.loads(model.prompt(QUESTION, schema=PERSON, max_tokens=100).text()))
    return True


def tools():
    expect(model.chain(QUESTION, tools=[get_weather], options={"max_tokens": TOKENS}).text(), "no text")
    return True


run(chat=chat, stream=stream, structured=structured, tools=tools, logprobs=lambda: None)
