// What each rank does: rows, step time, slots re-routed.

import { byId, element, number, percent, say } from "./format.js";

/** Show the ranks of an interval, beside the newest version and its mode. */
export function showRanks(sample, newest, mode) {
  const gangs = [...new Set(sample.ranks.map((rank) => rank.gang))];
  const mostRows = Math.max(...sample.ranks.map((rank) => rank.means?.rows ?? 0), 1e-9);
  const slowest = slowestOf(sample.ranks);
  const rows = sample.ranks.map((rank) => {
    const name = gangs.length > 1 ? `${gangs.indexOf(rank.gang) + 1}.${rank.rank}` : `${rank.rank}`;
    const header = element("th", { scope: "row", title: `replica ${rank.replica} of gang ${rank.gang}` }, name);
    if (rank.counters === null) return element("tr", {}, header, element("td", { colspan: 4 }, "no answer"));
    return element("tr", {}, header,
      bar(rank.means?.rows ?? null, mostRows),
      element("td", { class: rank === slowest ? "slow" : null }, number(rank.means?.milliseconds)),
      element("td", {}, percent(rank.means?.rerouted ?? null)),
      element("td", { class: rank.version === newest ? null : "behind" }, String(rank.version)));
  });
  const names = ["rank", "rows / step", "ms / step", mode === "observe" ? "on would re-route" : "re-routed", "version"];
  const head = element("tr", {}, ...names.map((name) => element("th", { scope: "col" }, name)));
  byId("ranks").replaceChildren(element("thead", {}, head), element("tbody", {}, ...rows));
  const notes = [slowest && slowness(slowest), sample.total && betweenRanks(sample, mode)];
  say(byId("ranks-note"), notes.filter(Boolean).join(" "));
}

const slowness = (slowest) => `Rank ${slowest.rank} is ${percent(slowest.excess)} slower than the fastest of its gang.`;

/** What the busiest rank reads, and what ranks send each other. */
function betweenRanks({ ranks, total }, mode) {
  if (ranks.length < 2) return "";
  const parts = [];
  if (total.busiest) {
    const [before, after] = total.busiest.map(number);
    parts.push(`The busiest rank ${mode === "observe" ? "would read" : "reads"} ${before} → ${after} experts a layer.`);
  }
  if (total.bytes) {
    const [before, after] = total.bytes.map((bytes) => number(bytes / 1000));
    parts.push(before === after
      ? `Ranks send each other ${after} kB a step.`
      : `Ranks send each other ${before} → ${after} kB a step.`);
  }
  return parts.join(" ");
}

/** The rank whose steps take longest, if at least a tenth longer than the fastest of its gang. */
function slowestOf(ranks) {
  let slowest = null;
  for (const rank of ranks) {
    if (!rank.means?.milliseconds) continue;
    const siblings = ranks.filter((other) => other.gang === rank.gang && other.means?.milliseconds);
    const excess = rank.means.milliseconds / Math.min(...siblings.map((other) => other.means.milliseconds)) - 1;
    if (excess >= 0.1 && excess > (slowest?.excess ?? 0)) {
      rank.excess = excess;
      slowest = rank;
    }
  }
  return slowest;
}

function bar(value, most) {
  const cell = element("td", { class: "bar" }, number(value));
  cell.style.setProperty("--share", String((value ?? 0) / most));
  return cell;
}
