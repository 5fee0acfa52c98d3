// Lines over time, with uPlot. All charts share one time axis and one cursor.

import { clock, element, number } from "./format.js";

const { uPlot } = globalThis;
const LEAST_SECONDS = 60; // of the time axis
const INSTANT = 0.001; // an interval starts that much after the one before it ended

/** A colour of the style sheet, so of the light or the dark scheme. */
export const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

/** From the first interval to now, but not less than a minute. */
export function timeRange(samples, now) {
  const first = samples.length > 0 ? samples[0].start : now;
  return [Math.min(first, now - LEAST_SECONDS), now];
}

/** What every chart has in common. */
export function options(root, height, more) {
  const axis = {
    stroke: () => colour("--muted"),
    grid: { stroke: () => colour("--grid"), width: 1 },
    ticks: { show: false },
    font: "12px system-ui, sans-serif",
  };
  const [x, y] = more.axes;
  return {
    width: root.clientWidth,
    height,
    padding: [18, 26, 0, 0],
    ...more,
    cursor: { sync: { key: "time" }, drag: { x: false, y: false }, y: false, ...more.cursor },
    axes: [
      { ...axis, space: 70, size: 30, gap: 8, values: clockTicks, ...x },
      { ...axis, size: 46, space: 28, ...y },
    ],
  };
}

/** Follows the width of its place. */
export function resizing(root, height, plot) {
  const observer = new ResizeObserver(() => {
    if (root.clientWidth > 0 && root.clientWidth !== plot.width) {
      plot.setSize({ width: root.clientWidth, height });
    }
  });
  observer.observe(root);
  return () => {
    observer.disconnect();
    plot.destroy();
    root.replaceChildren();
  };
}

/** Where a policy version begins: a dashed line with its number. */
export function drawMarks(plot, marks) {
  const { ctx, bbox } = plot;
  const ratio = devicePixelRatio;
  ctx.save();
  ctx.strokeStyle = ctx.fillStyle = colour("--muted");
  ctx.lineWidth = ratio;
  ctx.setLineDash([3 * ratio, 3 * ratio]);
  ctx.font = `${11 * ratio}px system-ui, sans-serif`;
  ctx.textAlign = "center";
  for (const { time, version } of marks) {
    const x = plot.valToPos(time, "x", true);
    if (x < bbox.left || x > bbox.left + bbox.width) continue;
    ctx.beginPath();
    ctx.moveTo(x, bbox.top);
    ctx.lineTo(x, bbox.top + bbox.height);
    ctx.stroke();
    ctx.fillText(`v${version}`, x, bbox.top - 5 * ratio);
  }
  ctx.restore();
}

/**
 * Lines, one for each of `series`: {label, colour: name in the style sheet, value: sample => number}.
 * A line is level over the interval that its mean is of, and broken where there is none.
 */
export function lineChart(root, { series, empty, height = 170 }) {
  let marks = [];
  const note = element("p", { class: "empty" }, empty);
  const plot = new uPlot(
    options(root, height, {
      axes: [{}, { values: (_, ticks) => ticks.map((tick) => tick.toLocaleString("en")) }],
      scales: { x: { time: true }, y: { range: (_, low, high) => [0, high > 0 ? 1.1 * high : 1] } },
      series: [
        { label: "time", value: at(clock) },
        ...series.map((line) => ({
          label: line.label,
          stroke: () => colour(line.colour),
          width: 2,
          points: { show: false },
          value: at(number),
        })),
      ],
      hooks: { draw: [(self) => drawMarks(self, marks)] },
    }),
    [[], ...series.map(() => [])],
    root,
  );
  root.append(note);
  const destroy = resizing(root, height, plot);
  return { draw, destroy };

  function draw(samples, range, newMarks) {
    marks = newMarks;
    const times = samples.flatMap(({ start, end }) => [start + INSTANT, end]);
    const lines = series.map((line) => samples.flatMap((sample) => {
      const value = sample.total === null ? null : line.value(sample);
      return [value, value];
    }));
    note.hidden = lines.some((line) => line.some((value) => value !== null));
    plot.setData([times, ...lines], false);
    plot.setScale("x", { min: range[0], max: range[1] });
    if (plot.cursor.idx === null) plot.setLegend({ idx: null }); // of the new data
  }
}

/** Legend text of the point under the cursor, else of the newest. */
function at(format) {
  return (plot, _, series, index) => {
    const values = plot.data[series];
    return values.length === 0 ? "–" : format(values[index ?? values.length - 1]);
  };
}

function clockTicks(_, ticks, __, ___, step) {
  const withSeconds = step < 60;
  return ticks.map((tick) => new Date(tick * 1000).toLocaleTimeString("en-GB", {
    hour: "2-digit", minute: "2-digit", second: withSeconds ? "2-digit" : undefined,
  }));
}
