// Numbers and times in words. Knows nothing of the page.

export const known = (value) => typeof value === "number" && Number.isFinite(value);

export function figure(value, digits = 3) {
  if (!known(value)) return "–";
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size >= 1000) return Math.round(value).toLocaleString("en");
  return size >= 1e-3 ? String(Number(value.toPrecision(digits))) : value.toExponential(1);
}

export function seconds(value) {
  if (!known(value)) return "–";
  const size = Math.abs(value);
  if (size >= 1 || value === 0) return `${figure(value)} s`;
  return size >= 1e-3 ? `${figure(1e3 * value)} ms` : `${figure(1e6 * value)} µs`;
}

const UNITS = [[1e12, "TB"], [1e9, "GB"], [1e6, "MB"], [1e3, "kB"], [1, "B"]];

export function bytes(value) {
  if (!known(value)) return "–";
  const [scale, unit] = UNITS.find(([least]) => Math.abs(value) >= least) ?? [1, "B"];
  return `${figure(value / scale)} ${unit}`;
}

export const rate = (value) => (known(value) ? `${bytes(value)}/s` : "–");

export const share = (value) => (known(value) ? `${(100 * value).toFixed(value < 0.1 ? 1 : 0)}%` : "–");

export const clock = (time) => String(time ?? "").slice(0, 19).replace("T", " ");

export const many = (count, one, more = `${one}s`) => `${count.toLocaleString("en")} ${count === 1 ? one : more}`;
