// Colours of loads, mixed by the browser from the style sheet's own, so that the theme decides.

const STEPS = 24; // on either side of the mean
const probe = document.createElement("span");
probe.hidden = true;
let scales = null;

export function colour(value) {
  if (!probe.isConnected) document.body.append(probe);
  probe.style.color = value;
  return getComputedStyle(probe).color;
}

export function forget() {
  scales = null;
}

function table() {
  const mix = (pole, share) => colour(`color-mix(in oklab, var(${pole}) ${share}%, var(--even))`);
  return Array.from({ length: 2 * STEPS + 1 }, (_, n) =>
    n < STEPS ? mix("--cool", (100 * (STEPS - n)) / STEPS) : mix("--warm", (100 * (n - STEPS)) / STEPS),
  );
}

/** The colour of a load relative to the mean: the warmest at `factor` times the mean, the coolest at its inverse. */
export function loadColour(ratio, factor) {
  scales ??= table();
  const share = ratio > 0 ? Math.log(ratio) / Math.log(factor) : -1;
  return scales[STEPS + Math.round(STEPS * Math.max(-1, Math.min(1, share)))];
}

export const EXPERT_FACTOR = 4;
export const WORKER_FACTOR = 1.5;
// larger for the workers of one layer, whose loads differ more than those over all layers
export const WORKER_LAYER_FACTOR = 2;
