// Numbers and dates in the browser's language.

const language = navigator.languages?.length ? [...navigator.languages] : undefined;
const formats = new Map();

function format(options) {
  const key = JSON.stringify(options);
  if (!formats.has(key)) formats.set(key, new Intl.NumberFormat(language, options));
  return formats.get(key);
}

export const none = "–";
const known = (value) => typeof value === "number" && Number.isFinite(value);

export function number(value, digits = 0) {
  return known(value) ? format({ minimumFractionDigits: digits, maximumFractionDigits: digits }).format(value) : none;
}

export const compact = (value) => (known(value) ? format({ notation: "compact", maximumSignificantDigits: 3 }).format(value) : none);

export const percent = (share, digits = 0) =>
  known(share) ? format({ style: "percent", minimumFractionDigits: digits, maximumFractionDigits: digits }).format(share) : none;

export const times = (ratio) => (known(ratio) ? `${number(ratio, 2)}×` : none);

export function seconds(value) {
  if (!known(value)) return none;
  if (value < 1) return format({ style: "unit", unit: "millisecond", maximumSignificantDigits: 3 }).format(value * 1000);
  return format({ style: "unit", unit: "second", maximumSignificantDigits: 3 }).format(value);
}

export function bytes(value) {
  if (!known(value)) return none;
  if (value < 1000) return count(value, "byte");
  const units = ["byte", "kilobyte", "megabyte", "gigabyte", "terabyte"];
  let step = 0;
  while (value >= 1000 && step < units.length - 1) [value, step] = [value / 1000, step + 1];
  return format({ style: "unit", unit: units[step], unitDisplay: "short", maximumSignificantDigits: 3 }).format(value);
}

const clock = new Intl.DateTimeFormat(language, { hour: "2-digit", minute: "2-digit", second: "2-digit" });
const stamp = new Intl.DateTimeFormat(language, { dateStyle: "medium", timeStyle: "short" });
export const time = (unixSeconds) => clock.format(new Date(unixSeconds * 1000));
export const date = (unixMilliseconds) => stamp.format(new Date(unixMilliseconds));

const rules = new Intl.PluralRules("en");
export const count = (n, one, many = `${one}s`) => `${number(n)} ${rules.select(n) === "one" ? one : many}`;
