// Loads of slots and workers, computed from the state, and the differences of two placements. No DOM here.

const LOAD_STEPS = 16; // deploy/feed.py
const EMPTY = -1;

const decode = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0));

/** Loads are relative: 1 is the mean of the layer's experts, or of its workers.
 *  {layers, experts, members: [{id, slots, first}], rows: [[expert per slot]], load: [[per expert]],
 *   slots: [[per slot]], copies: [[per expert]], workers: [[per member]], mean: [per member]} */
export function viewOf(state) {
  if (!state.members || !state.map) return null;
  const rows = Object.keys(state.map).sort((a, b) => a - b).map((key) => state.map[key]);
  const loads = rows.map((_, layer) => {
    const text = state.load?.[layer];
    return text ? Float32Array.from(decode(text), (step) => step / LOAD_STEPS) : null;
  });
  return derive(rows, loads, state.members.list, state.members.experts);
}

/** The same cluster with the placement of a dry run. */
export function withPlacement(view, placement) {
  return derive(placement.physical_to_logical_map, view.load, placement.workers, view.experts);
}

function derive(rows, load, list, experts) {
  let first = 0;
  const members = list.map((member) => {
    const placed = { ...member, first };
    first += member.slots;
    return placed;
  });
  const view = { layers: rows.length, experts, members, rows, load, total: first, slots: [], copies: [], workers: [] };
  rows.forEach((row, layer) => {
    const copies = new Uint8Array(experts);
    for (const expert of row) if (expert !== EMPTY) copies[expert] += 1;
    const slots = Float32Array.from(row, (expert) => (expert === EMPTY ? NaN : (load[layer]?.[expert] ?? 0) / copies[expert]));
    const sums = members.map((member) => {
      let sum = 0;
      for (let slot = member.first; slot < member.first + member.slots; slot += 1) sum += slots[slot] || 0;
      return sum;
    });
    const mean = sums.reduce((a, b) => a + b, 0) / (sums.length || 1);
    view.copies.push(copies);
    view.slots.push(slots);
    view.workers.push(sums.map((sum) => (mean > 0 ? sum / mean : NaN)));
  });
  view.mean = members.map((_, rank) => average(view.workers.map((row) => row[rank])));
  return view;
}

function average(values) {
  const seen = values.filter((value) => !Number.isNaN(value));
  return seen.length ? seen.reduce((a, b) => a + b, 0) / seen.length : NaN;
}

/** The mean over layers of the busiest worker's load. */
export const imbalanceOf = (view) => average(view.workers.map((row) => Math.max(...row)));

/** Slots "layer:slot" of `after` whose worker did not hold that expert in `before`. */
export function arrivals(before, after) {
  const found = [];
  if (!before || before.layers !== after.layers) return found;
  const ranks = new Map(before.members.map((member) => [member.id, member]));
  after.rows.forEach((row, layer) => {
    for (const member of after.members) {
      const old = ranks.get(member.id);
      const held = old ? before.rows[layer].slice(old.first, old.first + old.slots) : [];
      for (let slot = member.first; slot < member.first + member.slots; slot += 1) {
        if (row[slot] !== EMPTY && !held.includes(row[slot])) found.push([layer, slot]);
      }
    }
  });
  return found;
}

export const memberAt = (view, slot) => view.members.findIndex((m) => slot >= m.first && slot < m.first + m.slots);

export function holders(view, layer, expert) {
  return view.members
    .filter((m) => view.rows[layer].slice(m.first, m.first + m.slots).includes(expert))
    .map((m) => m.id);
}
