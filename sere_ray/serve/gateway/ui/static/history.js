// Counters only grow; what happened between two looks at them is their difference.

import { mean, sum } from "./format.js";

const KEEP_SECONDS = 600;
const EXPERTS = ["before", "after", "critical", "rerouted", "reroutedPerStep", "busiest", "bytes"];

/** What was counted between two reports; the later one where an engine restarted meanwhile. */
export function difference(now, before) {
  if (now.steps < before.steps) return now;
  const minus = (value, earlier) => {
    if (Array.isArray(value)) return value.map((part, layer) => part - (earlier?.[layer] ?? 0));
    return typeof value === "number" ? value - (earlier ?? 0) : null;
  };
  return Object.fromEntries(Object.entries(now).map(([name, value]) => [name, minus(value, before[name])]));
}

/** Means per step of a difference; null where nothing was counted. `topK` choices a row and layer. */
export function means(counted, topK) {
  const { steps, steps_counted: stepsCounted } = counted;
  if (steps === 0) return null;
  const share = (part, whole) => (part === null || !whole ? null : part / whole);
  const byLayer = (name) =>
    (counted[name] === null || stepsCounted === 0 ? null : counted[name].map((value) => value / stepsCounted));
  const pair = (name, change) => {
    if (counted[`${name}_before`] === null || stepsCounted === 0) return null;
    return [change(`${name}_before`), change(`${name}_after`)];
  };
  const layers = counted.slots_rerouted.length;
  return {
    steps,
    rows: counted.rows / steps,
    milliseconds: share(counted.forward_seconds === null ? null : 1000 * counted.forward_seconds, steps),
    before: byLayer("experts_before"),
    after: byLayer("experts_after"),
    critical: byLayer("critical_kept"),
    reroutedPerStep: byLayer("slots_rerouted"),
    rerouted: stepsCounted === 0 ? null : share(sum(counted.slots_rerouted), counted.decode_rows * topK * layers),
    busiest: pair("experts_max_rank", (name) => mean(byLayer(name))), // experts of a layer
    bytes: pair("bytes_dispatched", (name) => sum(counted[name]) / steps), // of a step
  };
}

/** The last minutes, as intervals between answers of GET /sere/stats. */
export class History {
  samples = [];
  marks = []; // {time, version}: where a new version was first seen
  #last = null;
  #lastTime = 0;

  add(time, stats) {
    const last = this.#last;
    if (last !== null) {
      this.samples.push(interval(this.#lastTime, last, time, stats));
      if (stats.version !== last.version) this.marks.push({ time, version: stats.version });
    }
    [this.#last, this.#lastTime] = [stats, time];
    this.samples = this.samples.filter((sample) => sample.end > time - KEEP_SECONDS);
    this.marks = this.marks.filter((mark) => mark.time > time - KEEP_SECONDS);
  }

  get latest() {
    return this.samples.at(-1) ?? null;
  }
}

function interval(start, before, end, now) {
  const sample = { start, end, layers: now.total.layers, total: null, mixedSteps: 0, known: false };
  sample.ranks = now.per_replica.map((rank) => ({ ...rank, means: rankMeans(rank, before) }));
  // Totals of other ranks are no difference of these: a rank came, went, or did not answer.
  if (answered(before) !== answered(now) || answered(now) === "") return sample;
  const topK = now.per_replica.find((rank) => rank.counters).counters.top_k;
  sample.known = true;
  sample.mixedSteps = difference(now.total.mixed, before.total.mixed).steps;
  sample.total = means(difference(now.total.decode_only, before.total.decode_only), topK);
  if (sample.total !== null && (before.version !== now.version || before.replicas_settled < before.replicas)) {
    for (const name of EXPERTS) sample.total[name] = null; // of two policies: a mean of neither
  }
  return sample;
}

function rankMeans({ replica, counters }, before) {
  const earlier = before.per_replica.find((other) => other.replica === replica)?.counters;
  if (!counters || !earlier) return null;
  return means(difference(counters.decode_only, earlier.decode_only), counters.top_k);
}

function answered(stats) {
  return stats.per_replica.filter((rank) => rank.counters).map((rank) => rank.replica).join(" ");
}
