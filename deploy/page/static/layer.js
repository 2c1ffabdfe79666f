// One layer of the map, as text: every worker with its experts.

import { EXPERT_FACTOR, loadColour } from "./colours.js";
import { byId, h } from "./dom.js";
import { number, times } from "./format.js";

export class LayerDetail {
  #layer = null;
  #view = null;

  constructor(onclose, onlayer) {
    this.host = byId("layer");
    this.onclose = onclose;
    this.onlayer = onlayer;
  }

  open(layer) {
    this.#layer = layer;
    this.host.hidden = layer === null;
    this.#draw();
  }

  set(view) {
    this.#view = view;
    this.#draw();
  }

  #draw() {
    const [view, layer] = [this.#view, this.#layer];
    if (layer === null || !view || layer >= view.layers) return;
    const active = this.host.contains(document.activeElement) ? document.activeElement.dataset.go : null;
    const go = (by, text) =>
      h("button", { type: "button", "data-go": text, disabled: layer + by < 0 || layer + by >= view.layers, onclick: () => this.onlayer(layer + by) }, text);
    this.host.replaceChildren(
      h("div", { class: "head" }, h("h3", {}, `Layer ${number(layer)}`),
        h("p", { class: "muted" }, `busiest worker ${times(Math.max(...view.workers[layer]))} the mean`),
        h("div", { class: "row" }, go(-1, "Previous"), go(1, "Next"), h("button", { type: "button", "data-go": "Close", onclick: () => this.onclose() }, "Close"))),
      h("ul", { class: "holders" }, view.members.map((member, rank) => this.#worker(view, layer, member, rank))),
    );
    if (active) this.host.querySelector(`[data-go="${active}"]`)?.focus();
  }

  #worker(view, layer, member, rank) {
    const slots = Array.from({ length: member.slots }, (_, n) => member.first + n);
    return h("li", {},
      h("p", {}, h("b", {}, member.id), " ", h("span", { class: "muted" }, times(view.workers[layer][rank]))),
      h("ul", { class: "cells" }, slots.map((slot) => this.#cell(view, layer, slot))));
  }

  #cell(view, layer, slot) {
    const expert = view.rows[layer][slot];
    if (expert === -1) return h("li", { class: "cell hole", title: "an empty slot" }, h("span", { class: "hidden" }, "empty"));
    const load = view.slots[layer][slot];
    const copies = view.copies[layer][expert];
    const title = `expert ${number(expert)}: ${times(view.load[layer]?.[expert])} the mean of experts` + (copies > 1 ? `, ${number(copies)} copies` : "");
    return h("li", { class: "cell", title, style: { backgroundColor: loadColour(load, EXPERT_FACTOR) } },
      number(expert), copies > 1 ? h("sup", {}, `×${number(copies)}`) : null);
  }
}
