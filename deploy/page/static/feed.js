// The state of the cluster, kept from GET /admin/events: a snapshot, then changes.

import { call, chooseEngine, chosenEngine } from "./keys.js";
import { eventsOf } from "./sse.js";

export const KEPT = 300;
const FIRST_RETRY_MS = 500;
const LAST_RETRY_MS = 8000;

/** A change has the keys that are new or different, and null for those that are gone. Sections are made anew, so
 *  that `before.map !== after.map` tells whether the map has changed. */
export function applied(state, changes) {
  const result = { ...state };
  for (const [name, keys] of Object.entries(changes)) {
    const section = { ...result[name] };
    for (const [key, value] of Object.entries(keys)) {
      if (value === null) delete section[key];
      else section[key] = value;
    }
    result[name] = section;
  }
  return result;
}

/** Events: "state" ({before, state}), "points", and "connection" (connected, or why not). */
export class Feed extends EventTarget {
  state = {};
  points = [];
  connected = false;
  #stop = new AbortController();
  #again = () => {};

  /** Follow another group of workers. What is known of the one before is forgotten. */
  follow(engine) {
    chooseEngine(engine);
    this.state = {};
    this.points = [];
    this.#stop.abort();
    this.#again();
  }

  async run() {
    let wait = FIRST_RETRY_MS;
    for (;;) {
      let problem = "the connection ended";
      this.#stop = new AbortController();
      const { signal } = this.#stop;
      try {
        const response = await call("admin/events", { signal });
        for await (const { event, data } of eventsOf(response)) {
          if (signal.aborted) break;
          this.#take(event, JSON.parse(data));
          wait = FIRST_RETRY_MS;
        }
      } catch (error) {
        problem = error instanceof TypeError ? "the server does not answer" : error.message;
        if (error.status === 401 || error.status === 403) wait = LAST_RETRY_MS;
        // there are fewer groups than before
        if (error.status === 400 && chosenEngine() !== 0) chooseEngine(0);
      }
      if (signal.aborted) {
        wait = FIRST_RETRY_MS;
        continue;
      }
      this.#connection(false, problem);
      await new Promise((resolve) => {
        this.#again = resolve;
        setTimeout(resolve, wait);
      });
      wait = Math.min(LAST_RETRY_MS, 2 * wait);
    }
  }

  #take(event, data) {
    const before = this.state;
    if (event === "snapshot") {
      this.state = data.state;
      this.points = data.history;
    } else if (event === "change") {
      this.state = applied(before, data.state);
      if (data.point) this.points = [...this.points, data.point].slice(-KEPT);
    } else {
      throw new Error(data.error?.message ?? "the stream ended with an error");
    }
    if (!this.connected) this.#connection(true, "");
    this.dispatchEvent(new CustomEvent("state", { detail: { before, state: this.state } }));
    this.dispatchEvent(new CustomEvent("points"));
  }

  #connection(connected, problem) {
    this.connected = connected;
    this.dispatchEvent(new CustomEvent("connection", { detail: { connected, problem } }));
  }
}
