"""DSPy's language model and its modules."""

import json
from typing import Literal

import dspy
from checks import MODEL, PERSON, QUESTION, TOKENS, TOOL, URL, check_call, check_person, expect, run

lm = dspy.LM(f"hosted_vllm/{MODEL}", api_base=URL, api_key="none", max_tokens=100, cache=False)
dspy.configure(lm=lm)

FORM = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON, "strict": True}}


def text_of(output):
    return output["text"] if isinstance(output, dict) else output


def chat():
    expect(text_of(lm(QUESTION, max_tokens=TOKENS)[0]), "no text")
    return True


def stream():
    class Person(dspy.Signature):
        """Tell of a person."""

        question: str = dspy.InputField()
        name: Literal["Ada", "Bob"] = dspy.OutputField()
        age: int = dspy.OutputField()

    with dspy.context(adapter=dspy.JSONAdapter()):
        program = dspy.streamify(dspy.Predict(Person), async_streaming=False)
        *_, last = program(question=QUESTION, config={"response_format": FORM})
    check_person({"name": last.name, "age": last.age})
    return True


def structured():
    check_person(json.loads(text_of(lm(QUESTION, response_format=FORM)[0])))
    return True


def tools():
    messages = [{"role": "user", "content": QUESTION}]
    (output,) = lm(messages=messages, tools=[TOOL], tool_choice="required", parallel_tool_calls=False)
    (call,) = output["tool_calls"]
    check_call(call.function.name, call.function.arguments)
    messages.append({"role": "assistant", "content": None, "tool_calls": [call.model_dump()]})
    messages.append({"role": "tool", "tool_call_id": call.id, "content": "sunny"})
    expect(text_of(lm(messages=messages, tools=[TOOL], max_tokens=TOKENS)[0]), "no text")
    return True


def logprobs():
    (output,) = lm(QUESTION, max_tokens=3, logprobs=True, top_logprobs=2)
    expect(len(output["logprobs"].content) == 3, output)
    return True


run(chat=chat, stream=stream, structured=structured, tools=tools, logprobs=logprobs)
