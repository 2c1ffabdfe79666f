// OpenAI's own client for JavaScript.
import OpenAI from "openai";
import { checkCall, checkPerson, expect, messages, model, person, run, tokens, tool, url } from "./checks.mjs";

const chats = new OpenAI({ baseURL: url, apiKey: "none" }).chat.completions;

await run({
  async chat() {
    const answer = await chats.create({ model, messages, max_tokens: tokens });
    expect(answer.choices[0].message.content, answer);
  },
  async stream() {
    const stream = chats.stream({ model, messages, max_tokens: tokens });
    let text = "";
    stream.on("content", (delta) => { text += delta; });
    expect((await stream.finalContent()) === text, text);
  },
  async structured() {
    const response_format = { type: "json_schema", json_schema: { name: "person", schema: person, strict: true } };
    const answer = await chats.create({ model, messages, response_format, max_tokens: 100 });
    checkPerson(JSON.parse(answer.choices[0].message.content));
  },
  async tools() {
    const how = { model, tools: [tool], max_tokens: 100 };
    const streamed = await chats.stream({ ...how, messages, tool_choice: "required", parallel_tool_calls: false }).finalMessage();
    checkCall(streamed.tool_calls[0].function.name, streamed.tool_calls[0].function.arguments);
    const named = { type: "function", function: { name: "get_weather" } };
    const { message } = (await chats.create({ ...how, messages, tool_choice: named })).choices[0];
    const [call] = message.tool_calls;
    checkCall(call.function.name, call.function.arguments);
    const result = { role: "tool", tool_call_id: call.id, content: "sunny" };
    const answer = await chats.create({ ...how, messages: [...messages, message, result] });
    expect(answer.choices[0].message.content, answer);
  },
  async logprobs() {
    const answer = await chats.create({ model, messages, max_tokens: 3, logprobs: true, top_logprobs: 2 });
    expect(answer.choices[0].logprobs.content.length === 3, answer);
  },
});
