"""LangChain's ChatOpenAI."""

from checks import MODEL, PERSON, QUESTION, TOKENS, TOOL, URL, check_call, check_person, expect, run
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_openai import ChatOpenAI

model = ChatOpenAI(model=MODEL, base_url=URL, api_key="none", max_tokens=100)


def chat():
    answer = model.invoke(QUESTION, max_tokens=TOKENS)
    expect(answer.content and answer.usage_metadata["output_tokens"], answer)
    return True


def stream():
    expect("".join(chunk.content for chunk in model.stream(QUESTION, max_tokens=TOKENS)), "no text")
    return True


def structured():
    schema = {"title": "person", "description": "a person", **PERSON}
    for method in ("json_schema", "function_calling"):
        check_person(model.with_structured_output(schema, method=method).invoke(QUESTION))
    return True


def tools():
    bound = model.bind_tools([TOOL], tool_choice="required", parallel_tool_calls=False)
    whole = None
    for chunk in bound.stream(QUESTION):
        whole = chunk if whole is None else whole + chunk
    check_call(whole.tool_calls[0]["name"], whole.tool_calls[0]["args"])
    message = bound.invoke(QUESTION)
    (call,) = message.tool_calls
    check_call(call["name"], call["args"])
    history = [HumanMessage(QUESTION), message, ToolMessage("sunny", tool_call_id=call["id"])]
    expect(model.bind_tools([TOOL]).invoke(history).content, "no answer")
    return True


def logprobs():
    answer = model.bind(logprobs=True, top_logprobs=2).invoke(QUESTION, max_tokens=3)
    expect(len(answer.response_metadata["logprobs"]["content"]) == 3, answer)
    return True


run(chat=chat, stream=stream, structured=structured, tools=tools, logprobs=logprobs)
