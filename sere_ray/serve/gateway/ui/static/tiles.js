// In five numbers: does it help, is quality at risk and what became of it, how fast, how full.

import { byId, element, mean, number, percent, say } from "./format.js";

const TILES = {
  saved: ["Experts read",
    "Different experts a decode step reads in a layer, before and after the rule; fewer is faster."],
  rerouted: ["Re-routed",
    "Share of the tokens' expert choices that the rule changed. 0 % is exact; the more, the more quality is at risk."],
  score: ["Score",
    "A sampled share of answers is scored by the exact model: how much likelier their tokens were as served, in nats a token. 0 is exact. Of the answers under this version of the policy."],
  time: ["Step time", "Mean forward pass of a decode step. Every token of every stream waits for one."],
  rows: ["Batch size", "Sequences that decode together in one step, over the ranks of a gang."],
};

export function makeTiles() {
  byId("tiles").replaceChildren(...Object.entries(TILES).map(([name, [title, term]]) =>
    element("section", { class: "card tile" },
      element("div", { class: "title" }, element("h2", {}, title),
        element("details", { class: "term", name: "term" },
          element("summary", { "aria-label": `What is ${title}?` }, "?"), element("p", {}, term))),
      element("p", { class: "value", id: `tile-${name}` }, "–"),
      element("p", { class: "note", id: `tile-${name}-note` }))));
}

/** Show an interval, and the scores of `stats`; `model` has `num_experts` and `top_k`, if it is known. */
export function showTiles(sample, stats, model) {
  const { policy } = stats;
  const total = sample?.total ?? null;
  show("saved", ...experts(total, policy.mode, model.num_experts));
  show("rerouted", ...rerouted(total, policy.mode, model.top_k));
  show("score", ...score(stats));
  show("time", total?.milliseconds == null ? "–" : `${number(total.milliseconds)} ms`, total && pace(sample));
  show("rows", number(total?.rows), total && "rows a step");
}

function pace({ start, end, total, mixedSteps }) {
  const untimed = total.milliseconds === null ? "not timed on a GPU; " : "";
  const perSecond = (steps) => number(steps / (end - start));
  const prompts = mixedSteps > 0 ? `, ${perSecond(mixedSteps)}/s with prompts` : "";
  return `${untimed}${perSecond(total.steps)} steps/s${prompts}`;
}

function experts(total, mode, numExperts) {
  if (!total?.before) return ["–", total && mode === "off" ? "not counted while off" : ""];
  const [before, after] = [mean(total.before), mean(total.after)];
  const saved = percent(1 - after / before);
  const difference = mode === "observe" ? `mode on would save ${saved}` : `${saved} fewer`;
  const layer = numExperts ? `; a layer has ${numExperts}` : "";
  return [`${number(before)} → ${number(after)}`, `${difference}${layer}`];
}

function rerouted(total, mode, topK) {
  if (total && mode === "off") return ["0 %", "exact"];
  if (total?.rerouted == null) return ["–", ""];
  const share = percent(total.rerouted);
  if (mode === "observe") return ["0 %", `exact; mode on would change ${share}`];
  return [share, `of the tokens' choices${topK ? `, ${topK} a layer` : ""}`];
}

function score({ scores, version }) {
  const one = scores.find((each) => each.version === version && each.tier === "default");
  if (one === undefined) return ["–", "no answer scored yet"];
  const error = one.standard_error === null ? "" : ` ± ${one.standard_error.toFixed(3)}`;
  const note = `nats a token, of ${one.answers} answers; same likeliest token ${percent(one.agreement)}`;
  return [`${one.nats.toFixed(3)}${error}`, note];
}

function show(name, value, note) {
  say(byId(`tile-${name}`), value);
  say(byId(`tile-${name}-note`), note ?? "");
}
