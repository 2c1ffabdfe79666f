// The map: layers are rows, workers are columns, and a worker's experts are cells. Above it, each worker's load.
// If cells would be too narrow to see, a worker's experts of a layer become one cell with their sum.

import { EXPERT_FACTOR, WORKER_FACTOR, WORKER_LAYER_FACTOR, colour, loadColour } from "./colours.js";
import { h } from "./dom.js";
import { count, number, times } from "./format.js";
import { holders, memberAt } from "./view.js";

const NARROWEST = 5;
const LABELS = 40;
const BARS = 44;
const NAMES = 18;
const FLASH_MS = 4000;
const MAX_ARROWS = 80;
const reduced = matchMedia("(prefers-reduced-motion: reduce)");

export class ClusterMap {
  #view = null;
  #moves = [];
  #states = {};
  #shownStates = "";
  #flashes = [];
  #flashedAt = 0;
  #detail = "auto";
  #selected = null;
  #cursor = null;
  #frame = 0;
  #base = document.createElement("canvas");
  #box = null;

  /** onlayer(layer): a layer was chosen. compact: a small map of the dry run, without bars, that takes no input. */
  constructor(host, { onlayer = () => {}, compact = false, label = "Map of experts" } = {}) {
    this.onlayer = onlayer;
    this.compact = compact;
    this.tip = document.getElementById("tip");
    this.canvas = h("canvas", { role: "img", "aria-label": label });
    this.readout = h("p", { class: "hidden", "aria-live": "polite" });
    host.replaceChildren(this.canvas, this.readout);
    if (!compact) this.#listen();
    new ResizeObserver(() => this.draw()).observe(host);
  }

  set(view, { moves = [], states = {}, arrived = [] } = {}) {
    const shown = JSON.stringify(states);
    if (view === this.#view && moves === this.#moves && shown === this.#shownStates && !arrived.length) return;
    [this.#view, this.#moves, this.#states, this.#shownStates] = [view, moves, states, shown];
    if (arrived.length) [this.#flashes, this.#flashedAt] = [arrived, performance.now()];
    this.draw();
  }

  set detail(value) {
    this.#detail = value;
    this.draw();
  }

  select(layer) {
    this.#selected = layer;
    this.draw();
  }

  draw() {
    cancelAnimationFrame(this.#frame);
    this.#frame = requestAnimationFrame(() => this.#render());
  }

  get aggregated() {
    return this.#box?.aggregated ?? false;
  }

  #measure() {
    const view = this.#view;
    const width = this.canvas.parentElement.clientWidth;
    const left = this.compact ? 0 : LABELS;
    const members = view.members.length;
    const gap = members > 32 ? 1 : members > 12 ? 2 : 6;
    const inner = width - left - gap * (members - 1);
    const fits = inner / view.total >= NARROWEST;
    const aggregated = this.#detail === "workers" || (this.#detail === "auto" && !fits);
    const cell = inner / view.total;
    const tallest = this.compact ? 220 : Math.max(260, Math.min(640, innerHeight * 0.55));
    const row = Math.max(5, Math.min(this.compact ? 16 : 28, Math.floor(tallest / view.layers)));
    const top = this.compact ? 0 : BARS + NAMES;
    const starts = view.members.map((member, rank) => left + member.first * cell + rank * gap);
    const box = { width, left, gap, aggregated, cell, row, top, starts, height: top + row * view.layers + 1 };
    this.#box = box;
    return box;
  }

  #render() {
    if (!this.#view || !this.canvas.isConnected || !this.canvas.parentElement.clientWidth) return;
    const box = this.#measure();
    const scale = devicePixelRatio || 1;
    for (const canvas of [this.canvas, this.#base]) {
      canvas.width = Math.round(box.width * scale);
      canvas.height = Math.round(box.height * scale);
    }
    this.canvas.style.height = `${box.height}px`;
    const paint = this.#base.getContext("2d");
    paint.setTransform(scale, 0, 0, scale, 0, 0);
    this.#paintCells(paint, box);
    if (!this.compact) {
      this.#paintLayers(paint, box);
      this.#paintBars(paint, box);
    }
    this.#compose();
  }

  /** Copy the painted map, and draw on it what changes from frame to frame. */
  #compose() {
    const box = this.#box;
    const scale = devicePixelRatio || 1;
    const paint = this.canvas.getContext("2d");
    paint.setTransform(1, 0, 0, 1, 0, 0);
    paint.clearRect(0, 0, this.canvas.width, this.canvas.height);
    paint.drawImage(this.#base, 0, 0);
    paint.setTransform(scale, 0, 0, scale, 0, 0);
    const age = (performance.now() - this.#flashedAt) / FLASH_MS;
    if (age < 1 && this.#flashes.length) {
      paint.globalAlpha = reduced.matches ? 1 : 1 - age * age;
      this.#paintFlashes(paint, box);
      paint.globalAlpha = 1;
      this.#frame = requestAnimationFrame(() => this.#compose());
    } else {
      this.#flashes = [];
    }
    this.#paintMoves(paint, box);
    if (this.#cursor) this.#paintCursor(paint, box);
  }

  #rect(layer, slot) {
    const { starts, cell, row, top, aggregated } = this.#box;
    const rank = memberAt(this.#view, slot);
    const member = this.#view.members[rank];
    if (aggregated) return [starts[rank], top + layer * row, member.slots * cell, row];
    return [starts[rank] + (slot - member.first) * cell, top + layer * row, cell, row];
  }

  #workerRect(layer, rank) {
    const { starts, cell, row, top } = this.#box;
    return [starts[rank], top + layer * row, this.#view.members[rank].slots * cell, row];
  }

  #paintCells(paint, box) {
    const view = this.#view;
    const line = box.row > 8 ? 1 : 0.5;
    const side = box.cell > 4 ? 1 : 0.25;
    const idle = colour("var(--hole)");
    const mark = colour("var(--text)");
    for (let layer = 0; layer < view.layers; layer += 1) {
      const y = box.top + layer * box.row;
      view.members.forEach((member, rank) => {
        if (box.aggregated) {
          const ratio = view.workers[layer][rank];
          paint.fillStyle = Number.isNaN(ratio) ? idle : loadColour(ratio, WORKER_LAYER_FACTOR);
          paint.fillRect(box.starts[rank], y, member.slots * box.cell - (box.gap > 1 ? 0 : 0.5), box.row - line);
          return;
        }
        for (let n = 0; n < member.slots; n += 1) {
          const expert = view.rows[layer][member.first + n];
          const x = box.starts[rank] + n * box.cell;
          const empty = expert === -1 || !view.load[layer];
          paint.fillStyle = empty ? idle : loadColour(view.slots[layer][member.first + n], EXPERT_FACTOR);
          paint.fillRect(x, y, box.cell - side, box.row - line);
          if (!empty && view.copies[layer][expert] > 1 && box.cell >= 4) {
            paint.fillStyle = mark;
            paint.fillRect(x + box.cell / 2 - 1.5, y + box.row / 2 - 2, 2.5, 2.5);
          }
        }
      });
    }
  }

  #paintLayers(paint, box) {
    paint.font = "11px system-ui, sans-serif";
    paint.textBaseline = "middle";
    paint.textAlign = "right";
    const every = Math.ceil(13 / box.row);
    for (let layer = 0; layer < this.#view.layers; layer += 1) {
      const y = box.top + layer * box.row + box.row / 2;
      const chosen = layer === this.#selected;
      paint.fillStyle = colour(chosen ? "var(--accent)" : "var(--muted)");
      if (chosen) paint.fillRect(LABELS - 6, y - box.row / 2, 3, box.row - 1);
      if (layer % every === 0 || chosen) paint.fillText(number(layer), LABELS - 10, y);
    }
  }

  #paintBars(paint, box) {
    const view = this.#view;
    const means = view.mean.filter((value) => !Number.isNaN(value));
    const top = Math.max(1.25, ...means);
    const floor = BARS - 2;
    const height = (ratio) => ((floor - 6) * ratio) / top;
    paint.font = "11px system-ui, sans-serif";
    let labelled = -Infinity;
    view.members.forEach((member, rank) => {
      const width = member.slots * box.cell - (box.gap > 1 ? 0 : 0.5);
      const ratio = view.mean[rank];
      const dead = this.#states[member.id] === "dead";
      paint.fillStyle = Number.isNaN(ratio) ? colour("var(--hole)") : loadColour(ratio, WORKER_FACTOR);
      const tall = Number.isNaN(ratio) ? 2 : height(ratio);
      paint.fillRect(box.starts[rank], floor - tall, width, tall);
      if (box.starts[rank] < labelled) return;
      const serving = (this.#states[member.id] ?? "serving") === "serving";
      paint.fillStyle = colour(dead ? "var(--bad)" : serving ? "var(--muted)" : "var(--accent)");
      paint.textAlign = width < 30 ? "left" : "center";
      const text = serving || width < 70 ? member.id : `${member.id} ${this.#states[member.id]}`;
      paint.fillText(text, width < 30 ? box.starts[rank] : box.starts[rank] + width / 2, BARS + NAMES / 2);
      labelled = box.starts[rank] + paint.measureText(text).width + 6;
    });
    if (!means.length) return;
    paint.fillStyle = colour("var(--muted)");
    const y = Math.round(floor - height(1)) + 0.5;
    for (let x = box.left; x < box.width; x += 6) paint.fillRect(x, y - 0.5, 3, 1);
    paint.textAlign = "right";
    paint.fillText("mean", LABELS - 6, y);
  }

  #paintFlashes(paint) {
    paint.strokeStyle = colour("var(--accent)");
    paint.lineWidth = 2;
    for (const [layer, slot] of this.#flashes) {
      if (layer >= this.#view.layers || slot >= this.#view.total) continue;
      const [x, y, width, height] = this.#rect(layer, slot);
      paint.strokeRect(x + 0.5, y + 0.5, Math.max(2, width - 2), Math.max(2, height - 2));
    }
  }

  #paintMoves(paint, box) {
    const ranks = new Map(this.#view.members.map((member, rank) => [member.id, rank]));
    paint.strokeStyle = paint.fillStyle = colour("var(--accent)");
    paint.lineWidth = 1.25;
    for (const [layer, , source, target] of this.#moves.slice(0, MAX_ARROWS)) {
      const [from, to] = [ranks.get(source), ranks.get(target)];
      if (from === undefined || to === undefined || layer >= this.#view.layers) continue;
      const [x0, y0, w0, height] = this.#workerRect(layer, from);
      const [x1, , w1] = this.#workerRect(layer, to);
      const [a, b, y] = [x0 + w0 / 2, x1 + w1 / 2, y0 + height / 2];
      paint.beginPath();
      paint.moveTo(a, y);
      paint.quadraticCurveTo((a + b) / 2, y - Math.min(18, box.row), b, y);
      paint.stroke();
      paint.beginPath();
      paint.arc(b, y, 2.5, 0, 2 * Math.PI);
      paint.fill();
    }
  }

  #paintCursor(paint) {
    const [x, y, width, height] = this.#rect(...this.#cursor);
    paint.strokeStyle = colour("var(--text)");
    paint.lineWidth = 1.5;
    paint.strokeRect(x - 0.5, y - 0.5, width, height);
  }

  #listen() {
    const canvas = this.canvas;
    canvas.tabIndex = 0;
    canvas.addEventListener("pointermove", (event) => this.#point(event));
    canvas.addEventListener("pointerleave", () => this.#leave());
    canvas.addEventListener("click", (event) => {
      const at = this.#at(event);
      if (at) this.onlayer(at[0]);
    });
    canvas.addEventListener("blur", () => this.#leave());
    canvas.addEventListener("keydown", (event) => this.#key(event));
  }

  #at(event) {
    if (!this.#view || !this.#box) return null;
    const { top, row, starts, cell } = this.#box;
    const layer = Math.floor((event.offsetY - top) / row);
    const rank = starts.findLastIndex((start) => event.offsetX >= start);
    if (layer < 0 || layer >= this.#view.layers || rank < 0) return null;
    const member = this.#view.members[rank];
    const slot = Math.min(member.slots - 1, Math.floor((event.offsetX - starts[rank]) / cell));
    return slot < 0 ? null : [layer, member.first + slot];
  }

  #point(event) {
    this.#cursor = this.#at(event);
    this.#compose();
    if (!this.#cursor) return this.#hide();
    this.#show(event.clientX, event.clientY);
  }

  #leave() {
    this.#cursor = null;
    this.#hide();
    if (this.#box) this.#compose();
  }

  #hide() {
    this.tip.hidden = true;
  }

  #show(x, y) {
    this.tip.textContent = this.describe(...this.#cursor);
    this.tip.hidden = false;
    this.tip.style.left = `${Math.min(x + 14, innerWidth - this.tip.offsetWidth - 8)}px`;
    this.tip.style.top = `${Math.min(y + 16, innerHeight - this.tip.offsetHeight - 8)}px`;
  }

  #key(event) {
    const steps = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
    if (event.key === "Enter" && this.#cursor) this.onlayer(this.#cursor[0]);
    else if (event.key === "Escape") this.#leave();
    else if (steps && this.#view) this.#step(...steps);
    else return;
    event.preventDefault();
  }

  #step(down, right) {
    const view = this.#view;
    if (!this.#cursor) [down, right] = [0, 0];
    let [layer, slot] = this.#cursor ?? [0, 0];
    layer = Math.max(0, Math.min(view.layers - 1, layer + down));
    if (right && this.aggregated) {
      const rank = Math.max(0, Math.min(view.members.length - 1, memberAt(view, slot) + right));
      slot = view.members[rank].first;
    } else slot = Math.max(0, Math.min(view.total - 1, slot + right));
    this.#cursor = [layer, slot];
    this.#compose();
    const [x, y, width] = this.#rect(layer, slot);
    const box = this.canvas.getBoundingClientRect();
    this.#show(box.left + x + width, box.top + y);
    this.readout.textContent = this.describe(layer, slot);
  }

  /** The description of a cell in words. */
  describe(layer, slot) {
    const view = this.#view;
    const rank = memberAt(view, slot);
    const worker = `${view.members[rank].id}, layer ${number(layer)}`;
    const sum = `the worker has ${times(view.workers[layer][rank])} the mean of workers`;
    if (this.aggregated) return `${worker}: ${count(view.members[rank].slots, "slot")}; ${sum}`;
    const expert = view.rows[layer][slot];
    if (expert === -1) return `${worker}: an empty slot; ${sum}`;
    const where = holders(view, layer, expert);
    const copies = where.length > 1 ? `, one of ${number(where.length)} copies (${where.join(", ")})` : "";
    return `expert ${number(expert)} on ${worker}: ${times(view.load[layer]?.[expert])} the mean of experts${copies}; ${sum}`;
  }
}
