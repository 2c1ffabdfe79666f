// Conversations, kept in this browser.

import { store, stored } from "./dom.js";

const KEY = "emoe.conversations";
const MOST = 50;

export class Conversations {
  #all = stored(KEY, []).filter((one) => Array.isArray(one?.messages));
  current = null;

  constructor() {
    this.current = this.#all[0] ?? this.add("chat");
  }

  get all() {
    return this.#all;
  }

  /** Begin a new conversation, unless the newest one is still empty. */
  add(mode) {
    if (this.#all[0]?.messages.length === 0) this.current = this.#all[0];
    else {
      this.current = { id: crypto.randomUUID?.() ?? String(Math.random()), mode, at: Date.now(), messages: [] };
      this.#all = [this.current, ...this.#all].slice(0, MOST);
    }
    return this.current;
  }

  open(id) {
    this.current = this.#all.find((one) => one.id === id) ?? this.current;
  }

  remove(conversation) {
    this.#all = this.#all.filter((one) => one !== conversation);
    this.current = this.#all[0] ?? this.add(conversation.mode);
    this.save();
  }

  /** Save all. If the browser's storage is full, the oldest conversations are deleted. */
  save() {
    const kept = this.#all.filter((one) => one.messages.length);
    while (!store(KEY, kept.map(plain)) && kept.length > 1) kept.pop();
  }
}

/** A message without its token probabilities, which would fill the storage. */
function plain(conversation) {
  return { ...conversation, messages: conversation.messages.map(({ tokens: _, ...message }) => message) };
}

export function titleOf(conversation) {
  const first = conversation.messages[0]?.content.trim().replace(/\s+/g, " ") ?? "";
  return first.length > 48 ? `${first.slice(0, 47)}…` : first || "New conversation";
}
