"use strict";
// Loss, norms and thresholds as lines.

function rangeOf(panel) {
  let low = Infinity, high = 0;
  for (const line of data.lines) {
    if (line.panel !== panel || line.role === "threshold") continue;
    for (const value of line.points) {
      if (value === null) continue;
      low = Math.min(low, value); high = Math.max(high, value);
    }
  }
  return [low, high];
}

for (const line of data.lines) line.numbers = decoded(line.values, Float32Array);

// A loss of NaN was recorded as such where the norm is not finite either; elsewhere there is none.
const norm = data.lines.find((line) => line.panel === "norm" && line.role === "raw");
function isBad(index) { return norm !== undefined && !Number.isFinite(norm.numbers[index]); }

for (const line of data.lines) {
  let gaps = 0;
  line.points = Array.from(line.numbers, (value, index) => {
    if (Number.isFinite(value)) return value;
    gaps += !isBad(index);
    return null;
  });
  line.sparse = gaps > steps.length / 4;
}

for (const panel of ["loss", "norm"]) {
  const [low, high] = rangeOf(panel);
  state.log[panel] = panel === "norm" ? high > 0 : low > 0 && high > 10 * low;
}

function styleOf(line, place) {
  if (line.role === "threshold") return { stroke: color("threshold" + (place % 6)), width: 1.3, dash: [6, 3] };
  if (line.role === "median") return { stroke: color("ink"), width: 1.2 };
  if (line.role === "clipped") return { stroke: color("clipped"), width: 1.2 };
  return { stroke: color("raw"), width: 1.3 };
}

function isAway(index) { return index === null || index === undefined; }

// The value at a row, or the last before it; without a row the last of all.
function latest(points, index) {
  let at = isAway(index) ? points.length - 1 : index;
  while (at >= 0 && points[at] === null) at -= 1;
  return at < 0 ? null : points[at];
}

// What the legend says: nan where it was that, not the value of an earlier step.
function told(line, index) {
  const at = isAway(index) ? steps.length - 1 : index;
  const isMeasured = line.role === "raw" || line.role === "clipped";
  if (isMeasured && line.points[at] === null && (isBad(at) || !line.sparse)) {
    return Number.isNaN(line.numbers[at]) ? "nan" : "inf";
  }
  return written(line.sparse || isAway(index) ? latest(line.points, at) : line.points[at]);
}

// Round numbers, evenly spread on a logarithmic axis.
function logTicks(low, high, count) {
  const decades = Math.log10(high / low);
  if (decades < 0.7) return linearTicks(low, high, count);
  const steps = decades > count ? [1] : decades > count / 3 ? [1, 3] : [1, 2, 5];
  const stride = Math.max(1, Math.ceil(decades / count));
  const ticks = [];
  for (let e = Math.floor(Math.log10(low)); e <= Math.ceil(Math.log10(high)); e += 1) {
    if (((e % stride) + stride) % stride) continue;
    for (const step of steps) {
      const tick = Number(step + "e" + e);
      if (tick >= low && tick <= high) ticks.push(tick);
    }
  }
  return ticks;
}

function linearTicks(low, high, count) {
  const rough = (high - low) / count;
  const base = 10 ** Math.floor(Math.log10(rough));
  const step = base * [1, 2, 5, 10].find((n) => n * base >= rough);
  const ticks = [];
  for (let n = Math.ceil(low / step); n * step <= high; n += 1) ticks.push(Number((n * step).toPrecision(12)));
  return ticks;
}

function padded(low, high, log) {
  if (low === null || low === undefined) return log ? [0.1, 10] : [0, 1];
  if (log) {
    const room = Math.max(1.15, (high / low) ** 0.06);
    return [low / room, high * room];
  }
  const room = (high - low || Math.abs(high) || 1) * 0.06;
  return [low - room, high + room];
}

function valueAxis(log) {
  return {
    stroke: () => color("axis"), grid: { stroke: () => color("grid"), width: 1 },
    ticks: { show: false }, font: "11px system-ui, sans-serif", size: LEFT, gap: 6,
    splits: (u, axis, low, high) => (log ? logTicks : linearTicks)(low, high, Math.max(3, u.height / 45)),
    filter: (u, splits) => splits, values: (u, splits) => splits.map(written),
  };
}

function lineChart(panel, height) {
  const lines = data.lines.filter((line) => line.panel === panel);
  const log = state.log[panel];
  let thresholds = -1;
  const series = lines.map((line) => {
    thresholds += line.role === "threshold";
    return {
      label: line.label, spanGaps: line.sparse, points: { show: steps.length < 60, size: 4 },
      value: (u, value, at, index) => told(line, index),
      ...styleOf(line, thresholds),
    };
  });
  const element = document.getElementById(panel);
  const options = {
    width: element.clientWidth - (isNarrow() ? 0 : GUTTER - RIGHT), height, padding: [HEADROOM, RIGHT, 0, 0],
    scales: {
      x: { time: false, min: state.range[0], max: state.range[1] },
      y: { distr: log ? 3 : 1, range: (u, low, high) => padded(low, high, log) },
    },
    series: [{ label: "step", value: (u, step, at, index) => writtenStep(isAway(index) ? steps[steps.length - 1] : step) }, ...series],
    axes: [stepAxis(), valueAxis(log)],
    cursor: cursorOf({ x: true, y: false }),
    hooks: {
      setScale: [followRange],
      setCursor: [(u) => showReadout(u.cursor.idx === null || u.cursor.idx === undefined ? null : steps[u.cursor.idx])],
      drawClear: [drawSpans],
      draw: [(u) => drawMarks(u, true)],
    },
  };
  const shown = lines.map((line) => (log ? line.points.map((v) => (v !== null && v > 0 ? v : null)) : line.points));
  charts.push(new uPlot(options, [Array.from(steps), ...shown], element));
}
