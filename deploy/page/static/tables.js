// Workers and operations as text.

import { WORKER_FACTOR, loadColour } from "./colours.js";
import { byId, h, setText } from "./dom.js";
import { bytes, count, number, percent, times } from "./format.js";

const PHASES = ["preparing", "committing", "completed"];
const SHOWN_OPERATIONS = 12;

export function drawWorkers(state, view, onretire) {
  const workers = Object.values(state.workers ?? {}).sort((a, b) => rank(a) - rank(b) || a.id.localeCompare(b.id, undefined, { numeric: true }));
  const loads = new Map(view?.members.map((member, n) => [member.id, view.mean[n]]) ?? []);
  const table = byId("workers");
  const open = new Set([...table.querySelectorAll("details[open]")].map((element) => element.dataset.worker));
  const focused = table.contains(document.activeElement) ? document.activeElement.dataset.focus : null;
  const columns = ["Worker", "State", "Load", "Requests", "KV cache", "Where", "Served by", ""];
  table.replaceChildren(
    h("thead", {}, h("tr", {}, columns.map((name) => h(name ? "th" : "td", name ? { scope: "col" } : {}, name)))),
    h("tbody", {}, workers.map((worker) => workerRow(worker, loads.get(worker.id), open.has(worker.id), onretire))),
  );
  if (focused) table.querySelector(`[data-focus="${focused}"]`)?.focus();
  const serving = workers.filter((worker) => worker.state === "serving").length;
  const present = workers.filter((worker) => !["dead", "stopped"].includes(worker.state)).length;
  setText(byId("workers-caption"), `${number(serving)} of ${number(present)} serve`);
}

const rank = (worker) => (worker.rank < 0 ? 1e6 : worker.rank);

function workerRow(worker, load, open, onretire) {
  const serves = worker.state === "serving";
  const retire = h("button", { type: "button", class: "quiet", "data-focus": `retire ${worker.id}`, "aria-label": `Retire ${worker.id}`, onclick: () => onretire(worker.id) }, "Retire");
  return h("tr", { "data-worker": worker.id, "data-state": worker.state },
    h("th", { scope: "row" }, worker.id),
    h("td", {}, h("span", { class: `state ${worker.state}` }, worker.state)),
    h("td", { class: "load" }, load === undefined || Number.isNaN(load) ? "–" : [bar(load), times(load)]),
    h("td", { class: "figure" }, number(worker.running_requests)),
    h("td", { class: "figure" }, percent(worker.kv_usage, worker.kv_usage < 0.1 ? 1 : 0)),
    h("td", { class: "muted" }, [worker.device, worker.node].filter(Boolean).join(" · ")),
    h("td", {}, fit(worker, open)),
    h("td", {}, serves ? retire : null));
}

function bar(load) {
  const width = `${Math.min(100, 50 * load)}%`;
  return h("span", { class: "load-bar", "aria-hidden": "true" }, h("span", { style: { width, backgroundColor: loadColour(load, WORKER_FACTOR) } }));
}

/** Which code serves the experts, and on opening every part with the reason why no faster code does. */
function fit(worker, open) {
  if (!worker.fit) return h("span", { class: "muted" }, "–");
  const experts = worker.fit.find((row) => row.part === "experts") ?? worker.fit[0];
  return h("details", { open, "data-worker": worker.id },
    h("summary", { "data-focus": `fit ${worker.id}` }, `${experts.part}: ${experts.path}`),
    h("ul", { class: "plain" }, worker.fit.map((row) =>
      h("li", {}, `${row.part}: ${row.path}, ${number(row.count)} ${row.modules}`, row.reason ? h("span", { class: "muted" }, ` (${row.reason})`) : null))));
}

export function operationsOf(state) {
  return (state.order?.operations ?? []).map((id) => state.operations?.[id]).filter(Boolean);
}

export function drawOperations(state) {
  const rows = operationsOf(state).slice(0, SHOWN_OPERATIONS);
  byId("operations").replaceChildren(...(rows.length ? rows.map(operationRow) : [h("li", { class: "muted" }, "Nothing yet.")]));
  const c = state.counters;
  setText(byId("counters"), c ? [count(c.recoveries, "recovery", "recoveries"), `${count(c.experts_moved, "expert")} moved (${bytes(c.bytes_moved)})`].join(", ") : "");
}

/** An operation with its phases, until it ends. */
export function operationRow(operation) {
  const failed = operation.phase === "failed";
  const at = PHASES.indexOf(operation.phase);
  const phases = failed ? [...PHASES.slice(0, 2), "failed"] : PHASES;
  return h("li", { class: "operation", "data-operation": operation.operation_id, "data-phase": operation.phase },
    h("p", { class: "what" }, h("b", {}, operation.kind), " ", h("span", { class: "muted" }, operation.operation_id)),
    h("ol", { class: "phases", "aria-label": `Phase: ${operation.phase}` },
      phases.map((phase, n) => h("li", { class: phase === operation.phase ? `now ${phase}` : n < at ? "past" : "", "aria-current": phase === operation.phase ? "step" : null }, phase))),
    h("p", { class: "why" }, operation.reason, operation.error ? h("span", { class: "bad" }, ` ${operation.error}`) : null,
      operation.safe_to_terminate ? h("span", { class: "muted" }, ` ${operation.retiring.join(", ")} may go.`) : null));
}
