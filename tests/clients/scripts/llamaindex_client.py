"""LlamaIndex's OpenAILike."""

from typing import Literal

from checks import MODEL, QUESTION, TOKENS, URL, check_call, check_person, expect, run
from llama_index.core.llms import ChatMessage
from llama_index.core.tools import FunctionTool
from llama_index.llms.openai_like import OpenAILike
from pydantic import BaseModel, ConfigDict, Field

HOW = {"model": MODEL, "api_base": URL, "api_key": "none", "context_window": 1024, "is_chat_model": True}
model = OpenAILike(**HOW, max_tokens=100, is_function_calling_model=True, should_use_structured_outputs=True)
asked = [ChatMessage(role="user", content=QUESTION)]


class Person(BaseModel):
    model_config = ConfigDict(extra="forbid")

    name: Literal["Ada", "Bob"]
    age: int = Field(ge=10, le=99)


def get_weather(city: Literal["Rome", "Oslo"]) -> str:
    """Weather of a city."""
    return "sunny"


def chat():
    expect(model.chat(asked, max_tokens=TOKENS).message.content, "no text")
    return True


def stream():
    expect("".join(part.delta or "" for part in model.stream_chat(asked, max_tokens=TOKENS)), "no text")
    return True


def structured():
    check_person(model.as_structured_llm(Person).chat(asked).raw)
    return True


def tools():
    tool = FunctionTool.from_defaults(get_weather)
    answer = model.chat_with_tools([tool], chat_history=asked, tool_required=True)
    (call, *_) = model.get_tool_calls_from_response(answer)
    check_call(call.tool_name, call.tool_kwargs)
    results = [
        ChatMessage(role="tool", content="sunny", additional_kwargs={"tool_call_id": each.tool_id})
        for each in model.get_tool_calls_from_response(answer)
    ]
    after = model.chat_with_tools([tool], chat_history=[*asked, answer.message, *results])
    expect(after.message.content, after)
    *_, last = model.stream_chat_with_tools([tool], chat_history=asked, tool_required=True)
    (call, *_) = model.get_tool_calls_from_response(last)
    check_call(call.tool_name, call.tool_kwargs)
    return True


def logprobs():
    answer = OpenAILike(**HOW, max_tokens=3, logprobs=True, top_logprobs=2).chat(asked)
    expect(len(answer.logprobs) == 3, answer)
    return True


run(chat=chat, stream=stream, structured=structured, tools=tools, logprobs=logprobs)
