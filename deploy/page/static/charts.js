// Small curves of the last minutes, with one time axis, and marks where an operation began.

import { colour } from "./colours.js";
import { h, setText } from "./dom.js";
import { compact, none, number, percent, seconds, time, times } from "./format.js";

const SPAN_S = 300;
const HEIGHT = 64;
const MARKS = { recover: "--bad", scale: "--accent", rebalance: "--accent" };

const CHARTS = [
  { title: "Tokens per second", series: [["generation_tokens_per_s", "generated", "--text"], ["prompt_tokens_per_s", "prompt", "--second"]], say: compact },
  { title: "Requests", series: [["running", "running", "--text"], ["waiting", "waiting", "--second"]], say: (value) => number(value), least: 4 },
  { title: "Time to first token", series: [["ttft_s", "mean", "--text"]], say: seconds, dots: true },
  { title: "Time between tokens", series: [["itl_s", "mean", "--text"]], say: seconds },
  { title: "KV cache, fullest worker", series: [["kv", "in use", "--text"]], say: (value) => percent(value, value < 0.1 ? 1 : 0), most: 1 },
  { title: "Busiest worker over the mean", series: [["imbalance", "mean of layers", "--text"]], say: times, base: 1, least: 1.5 },
];

export class Charts {
  #points = [];

  constructor(host) {
    this.charts = CHARTS.map((chart) => new Chart(chart, (at) => this.#hover(at)));
    host.replaceChildren(...this.charts.map((chart) => chart.element));
    new ResizeObserver(() => this.draw()).observe(host);
  }

  set(points) {
    this.#points = points;
    this.draw();
  }

  draw(at = null) {
    cancelAnimationFrame(this.frame);
    this.frame = requestAnimationFrame(() => {
      for (const chart of this.charts) chart.draw(this.#points, at);
    });
  }

  #hover(at) {
    this.draw(at);
  }
}

class Chart {
  constructor(chart, onhover) {
    this.chart = chart;
    this.values = chart.series.map(([, label]) => h("span", { class: "value", "aria-label": label }, none));
    const names = chart.series.map(([, label, token], n) =>
      h("span", { class: "series" }, chart.series.length > 1 ? h("i", { class: "key", style: { backgroundColor: `var(${token})` } }) : null, this.values[n], " ", h("span", { class: "muted" }, label)));
    this.when = h("span", { class: "muted when" });
    this.canvas = h("canvas", { role: "img", "aria-label": `${chart.title}, the last five minutes` });
    this.element = h("figure", { class: "chart" }, h("figcaption", {}, h("span", { class: "name" }, chart.title), this.when, h("span", { class: "now" }, names)), this.canvas);
    this.canvas.addEventListener("pointermove", (event) => onhover(1 - event.offsetX / this.canvas.clientWidth));
    this.canvas.addEventListener("pointerleave", () => onhover(null));
  }

  draw(points, hovered) {
    const width = this.canvas.clientWidth;
    if (!width) return;
    const scale = devicePixelRatio || 1;
    this.canvas.width = Math.round(width * scale);
    this.canvas.height = HEIGHT * scale;
    const paint = this.canvas.getContext("2d");
    paint.scale(scale, scale);
    const end = points.at(-1)?.time_s ?? 0;
    const x = (point) => width * (1 - (end - point.time_s) / SPAN_S);
    const shown = points.filter((point) => end - point.time_s <= SPAN_S);
    const [low, high] = this.#range(shown);
    const y = (value) => HEIGHT - 3 - ((HEIGHT - 8) * (value - low)) / (high - low || 1);
    this.#axis(paint, width, y, low, high);
    for (const point of shown) for (const [kind, reason] of point.marks ?? []) this.#mark(paint, x(point), kind, reason);
    for (const [key, , token] of [...this.chart.series].reverse()) this.#line(paint, shown, key, token, x, y);
    const at = hovered === null ? null : nearest(shown, end - hovered * SPAN_S);
    if (at) {
      paint.fillStyle = colour("var(--muted)");
      paint.fillRect(x(at), 0, 1, HEIGHT);
    }
    setText(this.when, at ? time(at.time_s) : "");
    this.chart.series.forEach(([key], n) => setText(this.values[n], this.#say(at ? at[key] : latest(shown, key, end))));
  }

  #say(value) {
    return value === undefined ? none : this.chart.say(value);
  }

  #range(points) {
    const values = this.chart.series.flatMap(([key]) => points.map((point) => point[key]).filter((v) => v !== undefined));
    const low = this.chart.base ?? 0;
    return [low, this.chart.most ?? Math.max(this.chart.least ?? 0, ...values.map((v) => 1.1 * v))];
  }

  #axis(paint, width, y, low, high) {
    paint.fillStyle = colour("var(--line)");
    paint.fillRect(0, HEIGHT - 2.5, width, 1);
    if (!(high > low)) return;
    paint.fillRect(0, Math.round(y(high)) + 0.5, width, 0.5);
    paint.fillStyle = colour("var(--muted)");
    paint.font = "10px system-ui, sans-serif";
    paint.textBaseline = "top";
    paint.fillText(this.chart.say(high), 0, y(high) + 2);
  }

  #mark(paint, x, kind) {
    paint.fillStyle = colour(`var(${MARKS[kind] ?? "--muted"})`);
    paint.fillRect(Math.round(x), kind === "recover" ? 0 : HEIGHT - 14, kind === "recover" ? 2 : 1, HEIGHT);
  }

  #line(paint, points, key, token, x, y) {
    paint.strokeStyle = paint.fillStyle = colour(`var(${token})`);
    paint.lineWidth = 1.5;
    paint.lineJoin = "round";
    paint.beginPath();
    let last = null;
    for (const point of points) {
      if (point[key] === undefined) continue;
      const broken = last === null || point.time_s - last > 4;
      if (broken) paint.moveTo(x(point), y(point[key]));
      else paint.lineTo(x(point), y(point[key]));
      if (broken || this.chart.dots) paint.rect(x(point) - 0.75, y(point[key]) - 0.75, 1.5, 1.5);
      last = point.time_s;
    }
    paint.stroke();
  }
}

/** The newest value of `key`, unless it is older than five seconds. */
function latest(points, key, end) {
  const point = points.findLast((one) => one[key] !== undefined);
  return point && end - point.time_s < 5 ? point[key] : undefined;
}

function nearest(points, at) {
  let best = null;
  for (const point of points) {
    if (!best || Math.abs(point.time_s - at) < Math.abs(best.time_s - at)) best = point;
  }
  return best;
}
