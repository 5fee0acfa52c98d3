// The page: asks for a token, polls the counters, shows them.

import { Api } from "./api.js";
import { showAudit } from "./audit.js";
import { lineChart, timeRange } from "./charts.js";
import { byId, clock, element, mean, number, percent, say } from "./format.js";
import { heatMap } from "./heatmap.js";
import { History } from "./history.js";
import { PolicyForm } from "./policy.js";
import { showRanks } from "./ranks.js";
import { makeTiles, showTiles } from "./tiles.js";

const POLL_MS = 2000;
const AUDIT_SECONDS = 10;
const TOKEN = "sere-token"; // in this tab's sessionStorage

const history = new History();
let session = 0; // counts connections: answers of an older one are dropped
let api = null;
let form = null;
let model = null; // metadata of the artifact: num_experts, top_k, model_id; empty without files
let stats = null;
let lastAnswer = null; // time of it, in seconds
let auditTime = 0;
let puts = 0;
let charts = [];
let heat = null;

// --- connection ---------------------------------------------------------------------------------

async function connect(token) {
  const mine = ++session;
  try {
    api = new Api(token);
    await api.get("policy");
  } catch (error) {
    if (mine === session) failed(error);
    if (isRefusal(error)) return;
  }
  if (mine !== session) return;
  sessionStorage.setItem(TOKEN, token);
  byId("connect").hidden = true;
  byId("token").value = "";
  byId("forget").hidden = token === "";
  while (mine === session) {
    await poll(mine);
    await new Promise((resolve) => setTimeout(resolve, POLL_MS));
  }
}

async function poll(mine) {
  const putsBefore = puts;
  try {
    const now = await api.get("stats");
    const time = Date.now() / 1000;
    form ??= new PolicyForm(await policySchema(), put);
    const isNew = stats === null || now.version !== stats.version;
    if (isNew) await readArtifact();
    if (isNew || time - auditTime > AUDIT_SECONDS) await readAudit(time);
    if (mine !== session) return;
    history.add(time, now);
    [stats, lastAnswer] = [now, time];
    if (puts === putsBefore) form.show(now);
    byId("trouble").hidden = true;
    show();
  } catch (error) {
    if (mine === session) failed(error);
  }
}

async function policySchema() {
  const document = await api.get("openapi.json");
  return document.paths["/policy"].put.requestBody.content["application/json"].schema;
}

async function readArtifact() {
  const artifact = await api.get("artifact");
  model = artifact.metadata;
  say(byId("model"), lastPart(model.model_id ?? ""));
  const files = [
    artifact.name && `Artifact ${named(artifact)}, metric ${model.metric}, ${model.date}`,
    artifact.masks && `Masks ${named(artifact.masks)}, ${artifact.masks.levels.length} levels`,
    model.num_experts && `${model.num_experts} experts, top ${model.top_k}.`,
  ];
  say(byId("artifact"), files.filter(Boolean).join("; "));
}

const named = ({ name, sha256 }) => `${lastPart(name)}, sha256 ${sha256.slice(0, 12)}…`;

/** A name without the folders of the server. */
const lastPart = (path) => path.split("/").at(-1);

async function readAudit(time) {
  showAudit((await api.get("audit")).entries, (policy) => {
    form.fill(policy);
    byId("policy").scrollIntoView({ behavior: "smooth", block: "nearest" });
  });
  auditTime = time;
}

async function put(change) {
  try {
    return await api.put("policy", change);
  } finally {
    puts += 1;
    auditTime = 0;
  }
}

const isRefusal = (error) => error.status === 401 || error.status === 403;

/** Say what went wrong; the last picture stays. */
function failed(error) {
  document.body.classList.add("stale");
  if (isRefusal(error)) {
    session += 1; // stops polling
    askForToken(error.message);
    return;
  }
  if (error.status === undefined) console.error(error); // a mistake of this page
  const since = lastAnswer === null ? "" : ` Shown is what came until ${clock(lastAnswer)}.`;
  byId("trouble").hidden = false;
  say(byId("trouble"), `No answer from the server: ${error.message}.${since}`.replace("..", "."));
  pill("no answer", "bad");
}

function askForToken(message) {
  const first = sessionStorage.getItem(TOKEN) === null && byId("token").value === "";
  sessionStorage.removeItem(TOKEN);
  byId("connect").hidden = false;
  say(byId("token-error"), first ? "" : message);
  byId("token").setAttribute("aria-invalid", String(!first));
  byId("token").focus();
  pill("token needed", "bad");
}

function pill(text, kind) {
  byId("connection").className = `pill ${kind}`;
  say(byId("connection"), text);
}

// --- picture ------------------------------------------------------------------------------------

function show() {
  document.body.classList.remove("stale");
  byId("picture").hidden = false;
  pill("live", "good");
  byId("connection").title = `last answer ${clock(lastAnswer)}`;
  if (heat === null) makeCharts();
  const sample = history.latest;
  notice(sample);
  showTiles(sample, stats, model);
  if (sample !== null) showRanks(sample, stats.version, stats.policy.mode);
  showLayers(sample);
  drawCharts();
}

/** What is not as usual: nobody asks, a rank is silent, the mode changes nothing. */
function notice(sample) {
  const silent = stats.per_replica.filter((rank) => rank.counters === null).length;
  const parts = [];
  if (silent > 0) parts.push(`${silent} of ${stats.replicas} ranks did not answer; the totals leave them out.`);
  if (stats.replicas === 0) parts.push("No rank follows the policy actor: engines are starting, or gone.");
  else if (sample?.known && sample.total === null) {
    parts.push(sample.mixedSteps > 0
      ? "No pure decode step in the last seconds: every step had prompt rows."
      : "No traffic: no decode step in the last seconds.");
  }
  if (stats.auto) parts.push(autoText(stats.auto));
  if (stats.policy.mode === "observe") {
    parts.push("Mode observe: answers are exact; “after” is what mode on would read.");
  }
  if (stats.policy.mode === "off") parts.push("Off: answers are exact and experts are not counted.");
  byId("notice").hidden = parts.length === 0;
  say(byId("notice"), parts.join(" "));
}

/** Where mode auto is, and what it saw in its last interval. */
function autoText({ level, levels, tpot_ms: time, load, rerouted_share: share, score }) {
  const timeText = time === null ? "–" : `${number(time)} ms`;
  const seen = load === null ? "" : `: p90 of the time per output token ${timeText}, ` +
    `${number(load)} rows a step, ${percent(share)} re-routed` +
    (score === null ? "" : `, score ${score.toFixed(3)} nats`);
  return `Mode auto at level ${level} of ${levels - 1} (0 = exact)${seen}.`;
}

function makeCharts() {
  for (const chart of charts) chart.destroy();
  heat?.destroy();
  const make = (id, empty, ...series) => lineChart(byId(id), { series, empty });
  charts = [
    make("experts-chart", "Nothing counted yet.",
      { label: "before", colour: "--before", value: ({ total }) => total.before && mean(total.before) },
      { label: "after", colour: "--after", value: ({ total }) => total.after && mean(total.after) }),
    make("time-chart", "Not timed yet.",
      { label: "ms", colour: "--after", value: ({ total }) => total.milliseconds }),
    make("batch-chart", "No decode step yet.",
      { label: "rows", colour: "--after", value: ({ total }) => total.rows }),
  ];
  heat = heatMap(byId("heat-chart"));
}

function drawCharts() {
  const range = timeRange(history.samples, lastAnswer);
  for (const chart of charts) chart.draw(history.samples, range, history.marks);
  const view = document.querySelector("#heat-view input:checked").value;
  heat.draw(history.samples, range, history.marks, view, model.num_experts);
}

function showLayers(sample) {
  const columns = {
    before: "read before", after: "read after", reroutedPerStep: "slots re-routed", critical: "critical kept",
  };
  const head = ["layer", ...Object.values(columns).map((name) => `${name} / step`)];
  const rows = (sample?.layers ?? []).map((layer, row) => element("tr", {},
    element("th", { scope: "row" }, String(layer)),
    ...Object.keys(columns).map((name) => element("td", {}, number(sample.total?.[name]?.[row])))));
  byId("layers").replaceChildren(
    element("thead", {}, element("tr", {}, ...head.map((name) => element("th", { scope: "col" }, name)))),
    element("tbody", {}, ...rows));
}

// --- start --------------------------------------------------------------------------------------

makeTiles();
byId("connect").addEventListener("submit", (event) => {
  event.preventDefault();
  connect(byId("token").value.trim());
});
byId("forget").addEventListener("click", () => {
  sessionStorage.removeItem(TOKEN);
  location.reload();
});
byId("heat-view").addEventListener("input", () => heat && drawCharts());
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
  if (heat === null) return;
  makeCharts();
  drawCharts();
});
connect(sessionStorage.getItem(TOKEN) ?? "");
