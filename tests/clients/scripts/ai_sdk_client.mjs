// The AI SDK of Vercel, with its provider for servers of OpenAI's API.
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateText, jsonSchema, Output, streamText, tool } from "ai";
import { checkCall, checkPerson, expect, model as name, person, question, run, tokens, url, weather } from "./checks.mjs";

const provider = createOpenAICompatible({ name: "served", baseURL: url, apiKey: "none", supportsStructuredOutputs: true });
const model = provider(name);
const tools = { get_weather: tool({ description: "Weather of a city", inputSchema: jsonSchema(weather) }) };

await run({
  async chat() {
    const { text } = await generateText({ model, prompt: question, maxOutputTokens: tokens });
    expect(text, text);
  },
  async stream() {
    let text = "";
    for await (const part of streamText({ model, prompt: question, maxOutputTokens: tokens }).textStream) text += part;
    expect(text, text);
  },
  async structured() {
    const output = Output.object({ schema: jsonSchema(person) });
    checkPerson((await generateText({ model, prompt: question, output, maxOutputTokens: 100 })).output);
  },
  async tools() {
    const how = { model, tools, maxOutputTokens: 100 };
    const streamed = await streamText({ ...how, prompt: question, toolChoice: "required" }).toolCalls;
    checkCall(streamed[0].toolName, streamed[0].input);
    const first = await generateText({ ...how, prompt: question, toolChoice: { type: "tool", toolName: "get_weather" } });
    const [call] = first.toolCalls;
    checkCall(call.toolName, call.input);
    const result = { toolCallId: call.toolCallId, toolName: call.toolName, output: { type: "text", value: "sunny" } };
    const asked = [{ role: "user", content: question }, ...first.response.messages];
    const history = [...asked, { role: "tool", content: [{ type: "tool-result", ...result }] }];
    const answer = await generateText({ ...how, messages: history });
    expect(answer.text, answer.text);
  },
  // this provider has no log probabilities
  async logprobs() {
    return null;
  },
});
