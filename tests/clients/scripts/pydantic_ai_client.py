"""pydantic-ai: agents for text and structured output, and its direct calls for tools."""

from typing import Literal

from checks import MODEL, QUESTION, TOKENS, TOOL, URL, WEATHER, check_call, check_person, expect, run
from pydantic import BaseModel, ConfigDict, Field
from pydantic_ai import Agent, ModelRequest, NativeOutput, ToolDefinition, ToolOutput, ToolReturnPart
from pydantic_ai.direct import model_request_sync
from pydantic_ai.messages import ToolCallPart
from pydantic_ai.models import ModelRequestParameters
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider

model = OpenAIChatModel(MODEL, provider=OpenAIProvider(base_url=URL, api_key="none"))


class Person(BaseModel):
    model_config = ConfigDict(extra="forbid")

    name: Literal["Ada", "Bob"]
    age: int = Field(ge=10, le=99)


def chat():
    expect(Agent(model, model_settings={"max_tokens": TOKENS}).run_sync(QUESTION).output, "no text")
    return True


def stream():
    result = Agent(model, model_settings={"max_tokens": TOKENS}).run_stream_sync(QUESTION)
    expect("".join(result.stream_text(delta=True)), "no text")
    return True


def structured():
    for form in (NativeOutput(Person), ToolOutput(Person)):
        check_person(Agent(model, output_type=form, model_settings={"max_tokens": 100}).run_sync(QUESTION).output)
    return True


def tools():
    tool = ToolDefinition(name="get_weather", description="Weather of a city", parameters_json_schema=WEATHER)
    request = ModelRequest.user_text_prompt(QUESTION)
    forced = ModelRequestParameters(function_tools=[tool], allow_text_output=False)
    answer = model_request_sync(model, [request], model_request_parameters=forced, model_settings={"max_tokens": 100})
    calls = [part for part in answer.parts if isinstance(part, ToolCallPart)]
    check_call(calls[0].tool_name, calls[0].args_as_dict())
    parts = [ToolReturnPart(call.tool_name, "sunny", call.tool_call_id) for call in calls]
    after = model_request_sync(
        model,
        [request, answer, ModelRequest(parts=parts)],
        model_request_parameters=ModelRequestParameters(function_tools=[tool]),
        model_settings={"max_tokens": TOKENS},
    )
    expect(after.text, after)
    return TOOL


def logprobs():
    agent = Agent(model, model_settings={"max_tokens": 3, "openai_logprobs": True, "openai_top_logprobs": 2})
    *_, last = agent.run_sync(QUESTION).all_messages()
    expect(len(last.provider_details["logprobs"]) == 3, last)
    return True


run(chat=chat, stream=stream, structured=structured, tools=tools, logprobs=logprobs)
