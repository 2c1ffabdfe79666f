"""OpenAI's own client."""

import json

from checks import MESSAGES, MODEL, PERSON, TOKENS, TOOL, URL, check_call, check_person, expect, run
from openai import OpenAI

client = OpenAI(base_url=URL, api_key="none")
chats = client.chat.completions


def chat():
    answer = chats.create(model=MODEL, messages=MESSAGES, max_tokens=TOKENS)
    expect(answer.choices[0].message.content and answer.usage.completion_tokens <= TOKENS, answer)
    return True


def stream():
    how = {"max_tokens": TOKENS, "stream": True, "stream_options": {"include_usage": True}}
    *chunks, last = chats.create(model=MODEL, messages=MESSAGES, **how)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    expect(text and not last.choices and last.usage.completion_tokens <= TOKENS, text)
    return True


def structured():
    form = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON, "strict": True}}
    answer = chats.create(model=MODEL, messages=MESSAGES, response_format=form, max_tokens=100)
    check_person(json.loads(answer.choices[0].message.content))
    return True


def tools():
    how = {"model": MODEL, "tools": [TOOL], "max_tokens": 100}
    with chats.stream(messages=MESSAGES, tool_choice="required", parallel_tool_calls=False, **how) as events:
        done = [event for event in events if event.type == "tool_calls.function.arguments.done"]
    check_call(done[0].name, done[0].arguments)
    named = {"type": "function", "function": {"name": "get_weather"}}
    message = chats.create(messages=MESSAGES, tool_choice=named, **how).choices[0].message
    call = message.tool_calls[0]
    check_call(call.function.name, call.function.arguments)
    result = {"role": "tool", "tool_call_id": call.id, "content": "sunny"}
    answer = chats.create(messages=[*MESSAGES, message, result], **how)
    expect(answer.choices[0].message.content, answer)
    return True


def logprobs():
    answer = chats.create(model=MODEL, messages=MESSAGES, max_tokens=3, logprobs=True, top_logprobs=2)
    tokens = answer.choices[0].logprobs.content
    expect(len(tokens) == 3 and all(len(token.top_logprobs) == 2 and token.logprob <= 0 for token in tokens), tokens)
    return True


run(chat=chat, stream=stream, structured=structured, tools=tools, logprobs=logprobs)
