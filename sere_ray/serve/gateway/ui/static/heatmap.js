// Experts read: a row for each layer, a column for each interval, as wide as it was long.

import { colour, drawMarks, options, resizing } from "./charts.js";
import { byId, clock, element, number, say } from "./format.js";

const { uPlot } = globalThis;
// Six steps of viridis: even in lightness, also for the colour-blind.
const STOPS = [[68, 1, 84], [65, 68, 135], [42, 120, 142], [34, 168, 132], [122, 209, 81], [253, 231, 37]];

/** Colour of a share of the scale, 0..1. */
function shade(share) {
  const place = Math.min(Math.max(share, 0), 1) * (STOPS.length - 1);
  const low = Math.min(Math.floor(place), STOPS.length - 2);
  const mix = STOPS[low].map((from, i) => Math.round(from + (place - low) * (STOPS[low + 1][i] - from)));
  return `rgb(${mix.join(" ")})`;
}

export function heatMap(root) {
  let samples = [], marks = [], view = "after", most = 1, layers = [], numExperts = null;
  const height = 290;
  const plot = new uPlot(
    options(root, height, {
      axes: [{}, { values: (_, ticks) => ticks.map(layerName), incrs: [1, 2, 5, 10, 20, 50], grid: { show: false } }],
      scales: {
        x: { time: true },
        y: { dir: -1, range: () => [-0.5, Math.max(layers.length, 1) - 0.5] }, // first layer on top
      },
      series: [{}, { label: "layer", paths: () => null, points: { show: false } }],
      legend: { show: false },
      cursor: { y: true, points: { show: false } },
      hooks: { draw: [paint], setCursor: [describe] },
    }),
    [[], []],
    root,
  );
  drawScale();
  const destroy = resizing(root, height, plot);
  return { draw, destroy };

  function draw(newSamples, range, newMarks, newView, experts) {
    [samples, marks, view, numExperts] = [newSamples, newMarks, newView, experts];
    layers = samples.at(-1)?.layers ?? layers;
    // Both views share the scale of the larger one.
    most = Math.max(1, ...samples.flatMap((sample) => sample.total?.before ?? []));
    say(byId("heat-most"), `${number(most)} experts${numExperts ? ` of ${numExperts}` : ""}`);
    plot.setData([samples.map((s) => s.end), samples.map(() => 0)], false);
    plot.setScale("x", { min: range[0], max: range[1] });
    describe(plot);
  }

  function layerName(tick) {
    return Number.isInteger(tick) ? String(layers[tick] ?? "") : "";
  }

  function paint(self) {
    const { ctx, bbox } = self;
    ctx.save();
    ctx.beginPath();
    ctx.rect(bbox.left, bbox.top, bbox.width, bbox.height);
    ctx.clip();
    ctx.fillStyle = hatching(ctx);
    const to = (value, axis) => Math.round(self.valToPos(value, axis, true));
    if (samples.length > 0) {
      const from = to(samples[0].start, "x");
      ctx.fillRect(from, bbox.top, to(samples.at(-1).end, "x") - from, bbox.height);
    }
    for (const { start, end, total } of samples) {
      const values = total?.[view] ?? [];
      const [left, right] = [to(start, "x"), to(end, "x")];
      values.forEach((value, row) => {
        const [top, bottom] = [to(row - 0.5, "y"), to(row + 0.5, "y")];
        ctx.fillStyle = shade(value / most);
        ctx.fillRect(left, top, right - left, bottom - top);
      });
    }
    ctx.restore();
    drawMarks(self, marks);
  }

  /** The cell under the cursor, or what the picture shows now. */
  function describe(self) {
    const { left, top } = self.cursor;
    const text = left >= 0 && top >= 0 ? cellText(self.posToVal(left, "x"), Math.round(self.posToVal(top, "y"))) : "";
    say(byId("heat-cell"), text || "Point at a cell for its numbers.");
  }

  function cellText(time, row) {
    const sample = samples.find((s) => s.start <= time && time < s.end);
    if (!sample || layers[row] === undefined) return "";
    const where = `Layer ${layers[row]}, ${clock(sample.start)} to ${clock(sample.end)}: `;
    const { total } = sample;
    if (!total?.before) return where + (sample.known && !total ? "no decode step." : "not counted.");
    return `${where}${number(total.before[row])} experts before, ${number(total.after[row])} after the rule, ` +
      `in the mean of ${total.steps} steps.`;
  }
}

function hatching(ctx) {
  const size = Math.round(6 * devicePixelRatio);
  const tile = element("canvas", { width: size, height: size });
  const pen = tile.getContext("2d");
  pen.strokeStyle = colour("--grid");
  pen.lineWidth = devicePixelRatio;
  pen.moveTo(0, size);
  pen.lineTo(size, 0);
  pen.stroke();
  return ctx.createPattern(tile, "repeat");
}

function drawScale() {
  const canvas = byId("heat-scale");
  const ctx = canvas.getContext("2d");
  for (let x = 0; x < canvas.width; x++) {
    ctx.fillStyle = shade(x / (canvas.width - 1));
    ctx.fillRect(x, 0, 1, canvas.height);
  }
}
