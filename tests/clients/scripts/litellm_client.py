"""LiteLLM, which passes on what it gets from many services in OpenAI's form."""

import json

import litellm
from checks import MESSAGES, MODEL, PERSON, TOKENS, TOOL, URL, check_call, check_person, expect, run

HOW = {"model": f"hosted_vllm/{MODEL}", "api_base": URL, "api_key": "none"}


def chat():
    for how in (HOW, {**HOW, "model": f"openai/{MODEL}"}):
        answer = litellm.completion(messages=MESSAGES, max_tokens=TOKENS, **how)
        expect(answer.choices[0].message.content, answer)
    return True


def stream():
    chunks = list(litellm.completion(messages=MESSAGES, max_tokens=TOKENS, stream=True, **HOW))
    expect(litellm.stream_chunk_builder(chunks, messages=MESSAGES).choices[0].message.content, chunks)
    return True


def structured():
    form = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON, "strict": True}}
    answer = litellm.completion(messages=MESSAGES, response_format=form, max_tokens=100, **HOW)
    check_person(json.loads(answer.choices[0].message.content))
    return True


def tools():
    how = {**HOW, "tools": [TOOL], "max_tokens": 100}
    chunks = list(litellm.completion(messages=MESSAGES, tool_choice="required", stream=True, **how))
    message = litellm.stream_chunk_builder(chunks, messages=MESSAGES).choices[0].message
    call = message.tool_calls[0]
    check_call(call.function.name, call.function.arguments)
    message = litellm.completion(messages=MESSAGES, tool_choice="required", **how).choices[0].message
    results = [{"role": "tool", "tool_call_id": call.id, "content": "sunny"} for call in message.tool_calls]
    answer = litellm.completion(messages=[*MESSAGES, message.model_dump(), *results], **how)
    expect(answer.choices[0].message.content, answer)
    return True


def logprobs():
    answer = litellm.completion(messages=MESSAGES, max_tokens=3, logprobs=True, top_logprobs=2, **HOW)
    expect(len(answer.choices[0].logprobs.content) == 3, answer)
    return True


run(chat=chat, stream=stream, structured=structured, tools=tools, logprobs=logprobs)
