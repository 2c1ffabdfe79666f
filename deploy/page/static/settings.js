// The sampling settings that people change. An empty field is left out of the request, so that the model's own holds.

import { byId, h, store, stored } from "./dom.js";

const KEY = "emoe.settings";
const FIELDS = [
  ["temperature", "Temperature", { min: 0, max: 2, step: 0.05, placeholder: "model's" }],
  ["top_p", "Top p", { min: 0.01, max: 1, step: 0.01, placeholder: "model's" }],
  ["top_k", "Top k", { min: -1, step: 1, placeholder: "model's" }],
  ["min_p", "Min p", { min: 0, max: 1, step: 0.01, placeholder: "0" }],
  ["max_tokens", "Most tokens", { min: 1, step: 1, placeholder: "server's" }],
  ["seed", "Seed", { step: 1, placeholder: "random" }],
  ["repetition_penalty", "Repetition penalty", { min: 0.01, step: 0.05, placeholder: "1" }],
  ["presence_penalty", "Presence penalty", { min: -2, max: 2, step: 0.1, placeholder: "0" }],
  ["frequency_penalty", "Frequency penalty", { min: -2, max: 2, step: 0.1, placeholder: "0" }],
];
const MOST_TOKENS = 256;

export class Settings {
  #values = stored(KEY, {});

  constructor() {
    const form = byId("settings");
    const input = (name, props) => h("input", { id: `set-${name}`, type: "number", inputMode: "decimal", value: this.#values[name] ?? "", ...props, onchange: (event) => this.#keep(name, event.target.value) });
    const check = (name, label) => h("label", { class: "check" }, h("input", { id: `set-${name}`, type: "checkbox", checked: Boolean(this.#values[name]), onchange: (event) => this.#keep(name, event.target.checked) }), label);
    const text = (name, label, rows) => h("label", { class: "wide" }, label, h("textarea", { id: `set-${name}`, rows, value: this.#values[name] ?? "", onchange: (event) => this.#keep(name, event.target.value) }));
    form.replaceChildren(
      ...FIELDS.map(([name, label, props]) => h("label", {}, label, input(name, { ...props, step: props.step }))),
      text("system", "System message (chat)", 2),
      text("stop", "Stop at (one string a line)", 2),
      check("logprobs", "Probabilities of tokens"),
      check("ignore_eos", "Go on after the end"));
    form.onsubmit = (event) => event.preventDefault();
    const opener = byId("settings-open");
    opener.onclick = () => {
      form.hidden = !form.hidden;
      opener.setAttribute("aria-expanded", String(!form.hidden));
    };
  }

  #keep(name, value) {
    if (value === "" || value === false) delete this.#values[name];
    else this.#values[name] = value;
    store(KEY, this.#values);
  }

  get system() {
    return this.#values.system ?? "";
  }

  /** The fields of a request. */
  fields(mode, maxModelLen) {
    // the server's default: for a chat as many as the model has room for, for a completion 16
    const fields = mode === "chat" ? {} : { max_tokens: Math.min(MOST_TOKENS, Math.floor((maxModelLen ?? 2 * MOST_TOKENS) / 2)) };
    for (const [name] of FIELDS) {
      const value = Number.parseFloat(this.#values[name]);
      if (Number.isFinite(value)) fields[name] = value;
    }
    const stop = (this.#values.stop ?? "").split("\n").filter(Boolean);
    if (stop.length) fields.stop = stop;
    if (this.#values.ignore_eos) fields.ignore_eos = true;
    if (this.#values.logprobs) Object.assign(fields, mode === "chat" ? { logprobs: true, top_logprobs: 5 } : { logprobs: 5 });
    return fields;
  }
}
