// Changes of the cluster: dry run and re-placement, more or fewer workers, pins. Each shows its operation until it ends.

import { ClusterMap } from "./clustermap.js";
import { byId, h, options, setText } from "./dom.js";
import { bytes, count, number, seconds, times } from "./format.js";
import { call } from "./keys.js";
import { operationRow } from "./tables.js";
import { arrivals, imbalanceOf, withPlacement } from "./view.js";

export class Actions {
  #state = {};
  #view = null;
  #followed = null;
  #busy = false;
  #target = null;

  constructor() {
    this.outcome = byId("outcome");
    this.planner = h("select", { id: "planner" });
    this.worker = h("select", { id: "retire-which" });
    this.count = h("input", { id: "how-many", type: "number", min: 1, inputMode: "numeric", required: true });
    const button = (id, text, onclick, props = {}) => h("button", { type: "button", id, onclick, ...props }, text);
    this.pin = button("pin", "Pin", () => this.#pin());
    this.add = button("add", "Add a worker", () => this.#scaleTo(this.#wanted + 1));
    byId("actions").replaceChildren(
      h("div", { class: "action" }, h("label", { htmlFor: "planner" }, "Planner"), this.planner,
        button("dry-run", "Dry run", () => this.#dryRun()), button("rebalance", "Re-place now", () => this.#rebalance())),
      h("div", { class: "action" }, h("label", { htmlFor: "retire-which" }, "Worker"), this.worker,
        button("retire", "Retire", () => this.retire(this.worker.value)), this.add),
      h("form", { class: "action", onsubmit: (event) => this.#scale(event) }, h("label", { htmlFor: "how-many" }, "How many"), this.count,
        h("button", { id: "set-count" }, "Scale")),
      h("div", { class: "action" }, h("span", { class: "label" }, "Placement"), this.pin));
    this.buttons = [...byId("actions").querySelectorAll("button")];
  }

  set(state, view) {
    this.#state = state;
    this.#view = view;
    const pinned = Boolean(state.placement?.pinned);
    // an operation under way pins the placement that it brings
    const by = pinned ? null : state.placement?.pinned_by;
    setText(this.pin, pinned ? "Unpin" : by ? "Do not pin" : "Pin");
    this.pin.title = pinned ? "Periodic re-placement may change it again" : by ? `${by} goes on, and the placement that it brings is not pinned` : "Periodic re-placement leaves it alone";
    options(this.planner, state.planners?.list ?? []);
    options(this.worker, Object.values(state.workers ?? {}).filter((worker) => worker.state === "serving").map((worker) => worker.id));
    const s = state.scale;
    setText(this.add, s?.next_worker ? `Add ${s.next_worker}` : "Add a worker");
    this.count.min = s?.min_workers ?? 1;
    this.count.max = s?.max_workers ?? "";
    if (s && s.target !== this.#target && document.activeElement !== this.count) {
      this.#target = s.target;
      this.count.value = s.target;
    }
    setText(byId("scale"), s ? `${number(s.serving)} serve, ${number(s.target)} wanted, ${number(s.min_workers)} to ${number(s.max_workers)} possible` + (s.autoscaler ? `; ${s.autoscaler}` : "") + (pinned ? "; the placement is pinned" : by ? `; ${by} brings a placement that will be pinned` : "") : "");
    this.#follow();
  }

  /** Forget what was shown of another group. */
  clear() {
    this.#target = null;
    this.#say("");
  }

  retire(worker) {
    return this.#begin("admin/scale", "POST", { retire: [worker] });
  }

  get #wanted() {
    return this.#state.scale?.target ?? this.#view?.members.length ?? 0;
  }

  #scale(event) {
    event.preventDefault();
    return this.#scaleTo(this.count.valueAsNumber);
  }

  #scaleTo(workers) {
    return this.#begin("admin/scale", "POST", { workers });
  }

  #rebalance() {
    return this.#begin("admin/rebalance", "POST", { planner: this.planner.value });
  }

  async #pin() {
    const { pinned, pinned_by: by } = this.#state.placement ?? {};
    if (pinned || by) {
      await this.#do(async () => {
        await call("admin/placement/pin", { method: "DELETE" });
        this.#say(pinned ? "Unpinned." : `${by} goes on, and pins nothing.`);
      });
      return;
    }
    await this.#do(async () => {
      const placement = await (await call("admin/placement")).json();
      this.#show(await (await call("admin/placement?pinned=true", { method: "PUT", json: placement })).json());
    });
  }

  async #dryRun() {
    await this.#do(async () => {
      this.#say("Planning …");
      const response = await call("admin/rebalance", { method: "POST", json: { planner: this.planner.value, dry_run: true } });
      this.#compare(await response.json());
    });
  }

  /** Show the placements before and after side by side, with a button that applies exactly this one. */
  #compare(preview) {
    if (!this.#view || !preview.placement) return this.#say(preview.reason);
    const after = withPlacement(this.#view, preview.placement);
    const [left, right] = [h("div", { class: "canvas" }), h("div", { class: "canvas" })];
    const side = (title, host, view, imbalance, cost) =>
      h("figure", {}, h("figcaption", {}, h("b", {}, title), ` busiest ${times(imbalance)} the mean, ${seconds(cost)} a step predicted`), host);
    this.#followed = null;
    this.outcome.replaceChildren(
      h("p", {}, h("b", {}, preview.worthwhile ? "Worthwhile" : "Not worthwhile"), `: ${preview.reason}`),
      h("div", { class: "sides" },
        side("Before", left, this.#view, preview.load_imbalance_before, preview.cost_before),
        side("After", right, after, preview.load_imbalance_after, preview.cost_after)),
      h("p", { class: "muted" }, `${count(preview.moves, "move")} (${bytes(preview.bytes)}), by ${preview.planner} in ${seconds(preview.seconds)}; now ${times(imbalanceOf(this.#view))}, then ${times(imbalanceOf(after))} over the window shown above.`),
      h("div", { class: "row" },
        h("button", { type: "button", class: "primary", id: "do-it", onclick: () => this.#begin("admin/placement", "PUT", preview.placement) }, "Do it"),
        h("button", { type: "button", onclick: () => this.#say("") }, "Leave it")));
    new ClusterMap(left, { compact: true, label: `Before: busiest worker ${times(preview.load_imbalance_before)} the mean` }).set(this.#view);
    new ClusterMap(right, { compact: true, label: `After: busiest worker ${times(preview.load_imbalance_after)} the mean` }).set(after, { arrived: arrivals(this.#view, after) });
    this.outcome.scrollIntoView({ block: "nearest" });
  }

  #begin(path, method, json) {
    return this.#do(async () => this.#show(await (await call(path, { method, json })).json()));
  }

  async #do(work) {
    if (this.#busy) return;
    this.#busy = true;
    for (const button of this.buttons) button.disabled = true;
    try {
      await work();
    } catch (error) {
      this.#followed = null;
      this.outcome.replaceChildren(h("p", { class: "bad" }, error.message));
    } finally {
      this.#busy = false;
      for (const button of this.buttons) button.disabled = false;
    }
  }

  #show(operation) {
    this.#followed = operation.operation_id;
    this.#draw(operation);
    this.outcome.scrollIntoView({ block: "nearest" });
  }

  #follow() {
    const operation = this.#followed && this.#state.operations?.[this.#followed];
    if (operation) this.#draw(operation);
  }

  #draw(operation) {
    this.outcome.replaceChildren(h("ol", { class: "operations followed" }, operationRow(operation)));
  }

  #say(text) {
    this.#followed = null;
    this.outcome.replaceChildren(...(text ? [h("p", { class: "muted" }, text)] : []));
  }
}
