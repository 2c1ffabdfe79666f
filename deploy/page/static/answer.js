// One streamed request: its text, its speed, and the probability of each token.

import { call } from "./keys.js";
import { eventsOf } from "./sse.js";

/** Ask, and call onchange(message) whenever `message` has grown. message: {content, reasoning, tokens, stats, error, reason}. */
export async function stream(message, { mode, messages, prompt, fields, signal, onchange }) {
  const path = mode === "chat" ? "v1/chat/completions" : "v1/completions";
  const json = { ...fields, stream: true, stream_options: { include_usage: true }, ...(mode === "chat" ? { messages } : { prompt }) };
  const began = performance.now();
  const stats = { first_s: null, total_s: null, tokens: null };
  message.stats = stats;
  try {
    const response = await call(path, { method: "POST", json, signal });
    for await (const { data } of eventsOf(response)) {
      if (data === "[DONE]") break;
      const event = JSON.parse(data);
      if (event.error) throw new Error(event.error.message);
      take(message, event, mode, (performance.now() - began) / 1000);
      onchange(message);
    }
  } catch (error) {
    if (error.name === "AbortError") message.reason = "stopped";
    else message.error = error instanceof TypeError ? "the connection to the server is lost" : error.message;
  }
  stats.total_s = (performance.now() - began) / 1000;
  onchange(message);
}

function take(message, event, mode, elapsed_s) {
  const { stats } = message;
  if (event.usage) stats.tokens = event.usage.completion_tokens;
  const choice = event.choices?.[0];
  if (!choice) return;
  const text = mode === "chat" ? (choice.delta?.content ?? "") : choice.text;
  const reasoning = choice.delta?.reasoning ?? "";
  const tokens = scored(choice.logprobs, mode);
  if (text || reasoning || tokens.length) {
    stats.first_s ??= elapsed_s;
    stats.events = (stats.events ?? 0) + 1;
    stats.last_s = elapsed_s;
  }
  message.content += text;
  if (reasoning) message.reasoning = (message.reasoning ?? "") + reasoning;
  if (tokens.length) message.tokens = [...(message.tokens ?? []), ...tokens];
  if (choice.finish_reason) message.reason = choice.finish_reason;
}

/** [{text, logprob, top: [[text, logprob]]}] from the form of either API. */
function scored(logprobs, mode) {
  if (!logprobs) return [];
  if (mode === "chat") {
    return (logprobs.content ?? []).map((t) => ({ text: t.token, logprob: t.logprob, top: t.top_logprobs.map((o) => [o.token, o.logprob]) }));
  }
  return logprobs.tokens.map((text, n) => ({ text, logprob: logprobs.token_logprobs[n], top: Object.entries(logprobs.top_logprobs?.[n] ?? {}) }));
}

/** Tokens per second after the first. */
export function speed(stats) {
  const tokens = stats.tokens ?? stats.events;
  const spent_s = (stats.last_s ?? 0) - (stats.first_s ?? 0);
  return tokens > 1 && spent_s > 0 ? (tokens - 1) / spent_s : null;
}
