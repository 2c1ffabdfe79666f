// The page: what is shown where, and the feed that moves it.

import { Actions } from "./actions.js";
import { Charts } from "./charts.js";
import { Chat } from "./chat.js";
import { ClusterMap } from "./clustermap.js";
import { EXPERT_FACTOR, WORKER_LAYER_FACTOR, forget, loadColour } from "./colours.js";
import { byId, choose, h, options, setText, store, stored } from "./dom.js";
import { Feed } from "./feed.js";
import { count, number, times } from "./format.js";
import { LayerDetail } from "./layer.js";
import { drawOperations, drawWorkers } from "./tables.js";
import { arrivals, imbalanceOf, viewOf } from "./view.js";

const THEMES = ["system", "light", "dark"];
const NO_MOVES = [];
const MAX_NAMED_MOVES = 6;

class Page {
  #view = null;

  constructor() {
    this.feed = new Feed();
    this.chat = new Chat();
    this.charts = new Charts(byId("charts"));
    this.map = new ClusterMap(byId("map"), { onlayer: (layer) => this.#openLayer(layer) });
    this.layer = new LayerDetail(() => this.#openLayer(null), (layer) => this.#openLayer(layer));
    this.actions = new Actions();
    this.#controls();
    this.feed.addEventListener("state", (event) => this.#state(event.detail));
    this.feed.addEventListener("points", () => this.charts.set(this.feed.points));
    this.feed.addEventListener("connection", (event) => this.#connection(event.detail));
    this.feed.run();
  }

  #controls() {
    for (const button of document.querySelectorAll("[data-show]")) button.onclick = () => this.#show(button.dataset.show);
    this.#show(stored("emoe.view", "both"));
    for (const button of document.querySelectorAll("[data-detail]")) {
      button.onclick = () => {
        this.map.detail = button.dataset.detail;
        choose(document, "detail", button.dataset.detail);
        requestAnimationFrame(() => requestAnimationFrame(() => this.#legend()));
      };
    }
    choose(document, "detail", "auto");
    byId("engine").onchange = (event) => this.#follow(Number(event.target.value));
    byId("theme").onclick = () => this.#theme(THEMES[(THEMES.indexOf(stored("emoe.theme", "system")) + 1) % THEMES.length]);
    this.#theme(stored("emoe.theme", "system"));
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.#repaint());
    addEventListener("resize", () => this.#legend());
  }

  #show(view) {
    document.body.dataset.view = view;
    choose(document, "show", view);
    store("emoe.view", view);
    this.charts.draw();
    this.map.draw();
  }

  #theme(theme) {
    const name = THEMES.includes(theme) ? theme : "system";
    if (name === "system") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = name;
    setText(byId("theme"), { system: "Auto", light: "Light", dark: "Dark" }[name]);
    byId("theme").setAttribute("aria-label", `Theme: ${name}. Change it`);
    store("emoe.theme", name);
    this.#repaint();
  }

  /** Show, and change, another group of workers. */
  #follow(engine) {
    this.#view = null;
    this.#openLayer(null);
    this.actions.clear();
    this.feed.follow(engine);
  }

  #engines({ count: groups, number: chosen }) {
    byId("engines").hidden = groups < 2;
    options(byId("engine"), Array.from({ length: groups }, (_, n) => String(n)), (n) => `Group ${n} of ${groups}`);
    byId("engine").value = String(chosen);
  }

  #repaint() {
    forget();
    this.charts.draw();
    this.map.draw();
    this.layer.set(this.#view);
    this.#legend();
  }

  #openLayer(layer) {
    this.map.select(layer);
    this.layer.open(layer);
  }

  #connection({ connected, problem }) {
    byId("stale").hidden = connected;
    if (!connected) {
      setText(byId("stale"), `Not up to date: ${problem}. Trying again.`);
      this.#status("lost", "no connection");
    }
  }

  #status(kind, text) {
    byId("status").dataset.kind = kind;
    setText(byId("status-text"), text);
  }

  #state({ before, state }) {
    const { status, placement, model } = state;
    setText(byId("model"), model.name);
    this.#engines(state.engines ?? { count: 1, number: 0 });
    this.chat.maxModelLen = model.max_model_len ?? null;
    document.title = `${model.name} · Elastic MoE`;
    const share = status.resident === undefined ? "" : ` with ${Math.floor(100 * status.resident)} % of the experts in memory`;
    const serving = `serving${share}, epoch ${number(placement?.epoch ?? 0)}`;
    this.#status(status.ready ? "ready" : "waiting", status.ready ? serving : status.reason);
    const changed = ["map", "members", "load"].some((name) => before[name] !== state[name]);
    const arrived = before.map && before.map !== state.map ? [this.#view, viewOf(state)] : null;
    if (changed || !this.#view) {
      this.#view = viewOf(state);
      this.layer.set(this.#view);
    }
    this.#drawMap(state, arrived ? arrivals(...arrived) : []);
    if (["workers", "load", "members"].some((name) => before[name] !== state[name])) drawWorkers(state, this.#view, (worker) => this.actions.retire(worker));
    if (before.operations !== state.operations || before.counters !== state.counters) drawOperations(state);
    this.actions.set(state, this.#view);
  }

  #drawMap(state, arrived) {
    const view = this.#view;
    if (!view) return;
    const moves = state.moves?.list ?? NO_MOVES;
    const states = Object.fromEntries(Object.values(state.workers ?? {}).map((worker) => [worker.id, worker.state]));
    this.map.set(view, { moves, states, arrived });
    setText(byId("map-caption"), `${count(view.layers, "layer")} of ${count(view.experts, "expert")} on ${count(view.members.length, "worker")}, busiest ${times(imbalanceOf(view))} the mean, ${count(state.window?.tokens ?? 0, "token")} in ${number(state.window?.window_s ?? 0)} s`);
    this.map.canvas.setAttribute("aria-label", `Map of experts: ${byId("map-caption").textContent}. Arrow keys move, Enter opens a layer.`);
    setText(byId("moving"), movesInWords(moves, state.moves?.count ?? 0, arrived.length));
    if (!byId("legend").childElementCount) this.#legend();
  }

  #legend() {
    const factor = this.map.aggregated ? WORKER_LAYER_FACTOR : EXPERT_FACTOR;
    const steps = Array.from({ length: 9 }, (_, n) => factor ** ((n - 4) / 4));
    byId("legend").replaceChildren(
      h("span", {}, `${times(1 / factor)} or less`),
      h("span", { class: "ramp", "aria-hidden": "true" }, steps.map((ratio) => h("i", { style: { backgroundColor: loadColour(ratio, factor) } }))),
      h("span", {}, `${times(factor)} or more`),
      h("span", { class: "muted" }, this.map.aggregated ? "load of a worker in a layer, over the workers' mean; a click opens the layer" : "load of an expert's copy over the experts' mean; a dot marks copies; a click opens the layer"));
  }
}

/** What moves now, from where to where; or what has just arrived. */
function movesInWords(moves, total, arrived) {
  if (!moves.length) return arrived ? `${count(arrived, "expert")} arrived.` : "";
  const pairs = new Map();
  for (const [, , source, target] of moves) pairs.set(`${source} → ${target}`, (pairs.get(`${source} → ${target}`) ?? 0) + 1);
  const named = [...pairs].sort((a, b) => b[1] - a[1]).slice(0, MAX_NAMED_MOVES).map(([pair, n]) => `${pair}: ${number(n)}`);
  return `${count(total, "expert")} on the move. ${named.join(", ")}${pairs.size > MAX_NAMED_MOVES ? ", …" : ""}`;
}

new Page();
