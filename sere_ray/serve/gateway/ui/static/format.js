// Elements and numbers. Text becomes text nodes, never HTML: the audit log holds strings of users.

export const byId = (id) => document.getElementById(id);

/** An element; attributes that are false or null are left out. */
export function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== false && value !== null) made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children);
  return made;
}

/** Set text only where it differs, so that screen readers hear changes only. */
export function say(target, text) {
  if (target.textContent !== text) target.textContent = text;
}

/** Three significant digits; a dash for what is not known. */
export function number(value) {
  if (value === null || value === undefined || !Number.isFinite(value)) return "–";
  const digits = Math.abs(value) >= 100 ? 0 : Math.abs(value) >= 10 ? 1 : 2;
  return value.toLocaleString("en", { minimumFractionDigits: digits, maximumFractionDigits: digits });
}

export function percent(share) {
  if (share === null || !Number.isFinite(share)) return "–";
  const points = 100 * share;
  return `${points.toFixed(points > 0 && points < 9.95 ? 1 : 0)} %`;
}

/** Time of day of a time in seconds. */
export function clock(seconds) {
  return new Date(seconds * 1000).toLocaleTimeString("en-GB");
}

/** How a policy value is written: as JSON, strings without quotes. */
export function plain(value) {
  return typeof value === "string" ? value : JSON.stringify(value ?? null);
}

/** "a 1 → 2" for each key that differs. */
export function changes(before, after) {
  const names = new Set([...Object.keys(before), ...Object.keys(after)]);
  return [...names]
    .filter((name) => plain(before[name]) !== plain(after[name]))
    .map((name) => `${name} ${plain(before[name])} → ${plain(after[name])}`);
}

export const mean = (values) => values.reduce((sum, value) => sum + value, 0) / values.length;
export const sum = (values) => values.reduce((total, value) => total + value, 0);
