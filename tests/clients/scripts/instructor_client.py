"""instructor, which makes objects of answers."""

from typing import Literal

import instructor
from checks import MESSAGES, MODEL, TOKENS, URL, check_call, check_person, expect, run
from openai import OpenAI
from pydantic import BaseModel, ConfigDict, Field

client = instructor.from_openai(OpenAI(base_url=URL, api_key="none"), mode=instructor.Mode.TOOLS)
as_schema = instructor.from_openai(OpenAI(base_url=URL, api_key="none"), mode=instructor.Mode.JSON_SCHEMA)


class Person(BaseModel):
    model_config = ConfigDict(extra="forbid")

    name: Literal["Ada", "Bob"]
    age: int = Field(ge=10, le=99)


class get_weather(BaseModel):
    """Weather of a city."""

    model_config = ConfigDict(extra="forbid")

    city: Literal["Rome", "Oslo"]


HOW = {"model": MODEL, "messages": MESSAGES, "max_tokens": 100, "max_retries": 0}


def chat():
    answer = client.create(response_model=None, **{**HOW, "max_tokens": TOKENS})
    expect(answer.choices[0].message.content, answer)
    return True


def stream():
    *_, last = client.create_partial(response_model=Person, **HOW)
    check_person(last)
    return True


def structured():
    for each in (client, as_schema):
        check_person(each.create(response_model=Person, **HOW))
    return True


def tools():
    weather, answer = client.create_with_completion(response_model=get_weather, **HOW)
    check_call(answer.choices[0].message.tool_calls[0].function.name, vars(weather))
    return True


def logprobs():
    _, answer = client.create_with_completion(response_model=Person, logprobs=True, top_logprobs=2, **HOW)
    expect(answer.choices[0].logprobs.content, answer)
    return True


run(chat=chat, stream=stream, structured=structured, tools=tools, logprobs=logprobs)
