// The conversation: messages, the composer, and the answer that is coming.

import { speed, stream } from "./answer.js";
import { Conversations, titleOf } from "./conversations.js";
import { byId, choose, h, setText } from "./dom.js";
import { count, date, number, percent, seconds } from "./format.js";
import { render } from "./markdown.js";
import { Settings } from "./settings.js";

const REASONS = { length: "the most tokens were reached", stop: "it ended", stopped: "you stopped it" };

export class Chat {
  #conversations = new Conversations();
  #settings = new Settings();
  #running = null;
  maxModelLen = null;

  constructor() {
    this.list = byId("messages");
    this.prompt = byId("prompt");
    this.picker = byId("conversations");
    this.picker.onchange = () => this.#switch(() => this.#conversations.open(this.picker.value));
    byId("new").onclick = () => this.#switch(() => this.#conversations.add(this.#current.mode), true);
    byId("delete").onclick = () => this.#switch(() => this.#conversations.remove(this.#current));
    for (const button of document.querySelectorAll("[data-mode]")) button.onclick = () => this.#setMode(button.dataset.mode);
    byId("composer").onsubmit = (event) => {
      event.preventDefault();
      if (this.#running) this.#running.abort();
      else this.#send();
    };
    this.prompt.onkeydown = (event) => {
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      if (!this.#running) this.#send();
    };
    this.#draw();
  }

  get #current() {
    return this.#conversations.current;
  }

  #switch(change, focus = false) {
    this.#running?.abort();
    change();
    this.#draw();
    if (focus) this.prompt.focus();
  }

  #setMode(mode) {
    if (this.#current.messages.length && this.#current.mode !== mode) this.#conversations.add(mode);
    this.#current.mode = mode;
    this.#draw();
    this.prompt.focus();
  }

  #draw() {
    const current = this.#current;
    choose(document, "mode", current.mode);
    this.picker.replaceChildren(...this.#conversations.all.map((one) => h("option", { value: one.id, selected: one === current, title: date(one.at) }, titleOf(one))));
    this.prompt.placeholder = current.mode === "chat" ? "Say something" : "Begin a text; the model goes on";
    setText(byId("hint"), "Enter sends, Shift+Enter breaks the line");
    this.list.replaceChildren(...(current.messages.length ? current.messages.map((message) => new Bubble(message, current.mode).element) : [this.#empty()]));
    this.#scroll(true);
  }

  #empty() {
    return h("p", { class: "empty muted" }, this.#current.mode === "chat" ? "Ask something. The map shows which experts answer." : "Begin a text, and the model goes on with it. The map shows which experts write.");
  }

  async #send() {
    const text = this.prompt.value;
    if (!text.trim()) return;
    const conversation = this.#current;
    const { mode } = conversation;
    this.prompt.value = "";
    if (!conversation.messages.length) this.list.replaceChildren();
    const asked = { role: "user", content: text };
    const answer = { role: "assistant", content: "" };
    const before = conversation.messages.filter((m) => m.content && !m.error).map(({ role, content }) => ({ role, content }));
    conversation.messages.push(asked, answer);
    const bubble = new Bubble(answer, mode);
    this.list.append(new Bubble(asked, mode).element, bubble.element);
    this.#scroll(true);
    this.#begin();
    const system = this.#settings.system ? [{ role: "system", content: this.#settings.system }] : [];
    await stream(answer, {
      mode,
      messages: [...system, ...before, { role: "user", content: text }],
      prompt: text,
      fields: this.#settings.fields(mode, this.maxModelLen),
      signal: this.#running.signal,
      onchange: () => bubble.changed(() => this.#scroll()),
    });
    this.#end();
    bubble.finish();
    this.#scroll();
    this.#conversations.save();
    if (conversation === this.#current) this.picker.querySelector("option:checked").textContent = titleOf(conversation);
  }

  #begin() {
    this.#running = new AbortController();
    byId("send").textContent = "Stop";
  }

  #end() {
    this.#running = null;
    byId("send").textContent = "Send";
  }

  /** Scroll to the newest text, unless the reader has scrolled back. */
  #scroll(always = false) {
    const { list } = this;
    if (always || list.scrollHeight - list.scrollTop - list.clientHeight < 120) list.scrollTop = list.scrollHeight;
  }
}

class Bubble {
  #due = false;

  constructor(message, mode) {
    this.message = message;
    this.plain = message.role === "user" || mode === "completion";
    this.body = h("div", { class: this.plain ? "text plain-text" : "text" });
    this.reasoning = h("div", { class: "plain-text" });
    this.thoughts = h("details", { class: "muted", hidden: true }, h("summary", {}, "Reasoning"), this.reasoning);
    this.foot = h("p", { class: "foot" });
    this.element = h("article", { class: `message ${message.role}`, "aria-label": message.role === "user" ? "You" : "Model" }, this.thoughts, this.body, this.foot);
    this.finish();
  }

  /** Show the text that came since the last frame. */
  changed(then) {
    if (this.#due) return;
    this.#due = true;
    requestAnimationFrame(() => {
      this.#due = false;
      this.#show();
      then();
    });
  }

  finish() {
    this.#show();
    const { stats, error, reason, role } = this.message;
    if (role === "user" || !stats) return;
    const rate = speed(stats);
    const facts = [
      rate ? `${number(rate, 1)} tokens/s` : null,
      stats.first_s !== null ? `first token after ${seconds(stats.first_s)}` : null,
      stats.tokens !== null ? count(stats.tokens, "token") : null,
      reason ? (REASONS[reason] ?? reason) : null,
    ].filter(Boolean);
    this.foot.replaceChildren(...(error ? [h("span", { class: "bad" }, error), " "] : []), facts.join(" · "));
  }

  #show() {
    const { content, reasoning, tokens } = this.message;
    this.thoughts.hidden = !reasoning;
    setText(this.reasoning, reasoning ?? "");
    if (tokens?.length) this.#showTokens(tokens);
    else if (this.plain) setText(this.body, content);
    else render(this.body, content);
  }

  #showTokens(tokens) {
    this.body.className = "text plain-text tokens";
    for (const token of tokens.slice(this.body.children.length)) this.body.append(tokenNode(token));
  }
}

const LIKELY = [[0.8, "sure"], [0.4, "likely"], [0.1, "open"], [0, "unlikely"]];

function tokenNode(token) {
  const share = Math.exp(token.logprob);
  const name = LIKELY.find(([least]) => share >= least)[1];
  const element = h("span", { class: `token ${name}`, tabindex: "0" }, token.text);
  const show = () => tip(element, token);
  const hide = () => (byId("tip").hidden = true);
  element.onpointerenter = element.onfocus = show;
  element.onpointerleave = element.onblur = hide;
  element.onkeydown = (event) => {
    const next = { ArrowRight: element.nextElementSibling, ArrowLeft: element.previousElementSibling }[event.key];
    next?.focus();
  };
  return element;
}

function tip(element, token) {
  const box = byId("tip");
  const line = ([text, logprob]) => h("tr", {}, h("td", {}, JSON.stringify(text)), h("td", { class: "figure" }, percent(Math.exp(logprob), 1)));
  const rows = token.top.some(([text]) => text === token.text) ? token.top : [[token.text, token.logprob], ...token.top];
  box.replaceChildren(h("table", {}, h("tbody", {}, rows.map(line))));
  box.hidden = false;
  const at = element.getBoundingClientRect();
  box.style.left = `${Math.max(8, Math.min(at.left, innerWidth - box.offsetWidth - 8))}px`;
  box.style.top = `${at.bottom + 6 + box.offsetHeight > innerHeight ? at.top - box.offsetHeight - 6 : at.bottom + 6}px`;
}
