"use strict";
// What all charts share: the data, colours, numbers, the range of steps and the kinds shown.

const data = JSON.parse(document.getElementById("data").textContent);

function decoded(text, Kind) {
  const bytes = Uint8Array.from(atob(text), (sign) => sign.charCodeAt(0));
  return new Kind(bytes.buffer);
}

const steps = decoded(data.steps, Float64Array);
const everything = steps.length ? [steps[0], Math.max(steps[steps.length - 1], steps[0] + 1)] : [0, 1];
const state = { range: everything, rows: null, heat: "relative", hidden: new Set(), log: {} };
const charts = [];

const GUTTER = 230;
const LEFT = 62;
const RIGHT = 16;
const isNarrow = () => document.documentElement.clientWidth < 760;

function color(name) {
  return getComputedStyle(document.documentElement).getPropertyValue("--" + name).trim();
}

function written(value) {
  if (value === null || value === undefined) return "-";
  if (!Number.isFinite(value) || value === 0) return String(value);
  const size = Math.abs(value);
  if (size >= 1e-3 && size < 1e5) return String(Number(value.toPrecision(4)));
  return value.toExponential(2).replace("e+", "e");
}

function writtenStep(step) {
  return Math.round(step).toLocaleString("en-US");
}

function shortStep(step) {
  const size = Math.abs(step);
  if (size >= 1e6) return Number((step / 1e6).toFixed(3)) + "M";
  if (size >= 1e4) return Number((step / 1e3).toFixed(2)) + "k";
  return String(step);
}

// Glyphs tell the kinds apart without colour.
const GLYPHS = {
  spike: ["spike", "triangle"],
  nonfinite: ["nonfinite", "diamond"],
  "scaler-skip": ["nonfinite", "square"],
  skip: ["skip", "cross"],
  rollback: ["skip", "square"],
};
const glyphOf = (kind) => (Object.hasOwn(GLYPHS, kind) ? GLYPHS[kind] : ["other", "circle"]);

// Of several kinds at a step the most severe stand lowest, and only so many are drawn.
const SEVERITY = ["rollback", "nonfinite", "scaler-skip", "spike", "skip"];
const severity = (kind) => (SEVERITY.includes(kind) ? SEVERITY.indexOf(kind) : SEVERITY.length);
const LEVELS = 3;
const STACK = 11;
const HEADROOM = 18 + STACK * (Math.min(LEVELS, mostAtAStep()) - 1);

function mostAtAStep() {
  const counts = new Map([[null, 1]]);
  for (const [step, kind] of data.marks) if (!kind.endsWith("-end")) counts.set(step, (counts.get(step) || 0) + 1);
  return [...counts.values()].reduce((a, b) => Math.max(a, b));
}

function drawGlyph(ctx, kind, x, y, size) {
  const [tint, shape] = glyphOf(kind);
  ctx.fillStyle = ctx.strokeStyle = color(tint);
  ctx.lineWidth = size / 2.2;
  ctx.beginPath();
  if (shape === "triangle") {
    ctx.moveTo(x, y + size); ctx.lineTo(x - size, y - size); ctx.lineTo(x + size, y - size);
  } else if (shape === "diamond") {
    ctx.moveTo(x, y - 1.2 * size); ctx.lineTo(x + 1.1 * size, y); ctx.lineTo(x, y + 1.2 * size); ctx.lineTo(x - 1.1 * size, y);
  } else if (shape === "cross") {
    ctx.moveTo(x - size, y - size); ctx.lineTo(x + size, y + size);
    ctx.moveTo(x + size, y - size); ctx.lineTo(x - size, y + size);
    ctx.stroke();
    return;
  } else if (shape === "square") {
    ctx.rect(x - 0.9 * size, y - 0.9 * size, 1.8 * size, 1.8 * size);
  } else {
    ctx.arc(x, y, size, 0, 2 * Math.PI);
  }
  ctx.fill();
}

// The marks of the visible kinds in the visible range, at most one a kind and pixel column.
function visibleMarks(u) {
  const found = [];
  const taken = new Set();
  for (const [step, kind] of data.marks) {
    if (state.hidden.has(kind) || step < u.scales.x.min || step > u.scales.x.max) continue;
    const x = Math.round(u.valToPos(step, "x", true));
    const key = kind + x;
    if (taken.has(key)) continue;
    taken.add(key);
    found.push([x, kind]);
  }
  return found.sort((a, b) => severity(a[1]) - severity(b[1]));
}

// The steps that a rollback undid.
function drawSpans(u) {
  const { ctx } = u;
  const { left, top, width, height } = u.bbox;
  if (state.hidden.has("rollback")) return;
  ctx.save();
  ctx.beginPath(); ctx.rect(left, top, width, height); ctx.clip();
  ctx.globalAlpha = 0.14;
  ctx.fillStyle = color("skip");
  for (const [from, to] of data.spans) {
    const start = u.valToPos(from, "x", true);
    ctx.fillRect(start, top, u.valToPos(to, "x", true) - start, height);
  }
  ctx.restore();
}

function drawMarks(u, withLines) {
  const { ctx } = u;
  const { top, height } = u.bbox;
  const size = 4 * devicePixelRatio;
  const levels = new Map();
  const gap = STACK * devicePixelRatio;
  ctx.save();
  for (const [x, kind] of visibleMarks(u)) {
    if (withLines) {
      ctx.strokeStyle = color(glyphOf(kind)[0]);
      ctx.globalAlpha = 0.45;
      ctx.lineWidth = devicePixelRatio;
      ctx.setLineDash([3 * devicePixelRatio, 3 * devicePixelRatio]);
      ctx.beginPath(); ctx.moveTo(x, top); ctx.lineTo(x, top + height); ctx.stroke();
      ctx.setLineDash([]);
      ctx.globalAlpha = 1;
    }
    // Kinds at one step stand on one another, in the margin above the plot.
    const before = levels.get(x) || 0;
    levels.set(x, before + 1);
    if (before < LEVELS) drawGlyph(ctx, kind, x, top - 8 * devicePixelRatio - before * gap, size);
  }
  ctx.restore();
}

function stepAxis() {
  return {
    stroke: () => color("axis"), grid: { stroke: () => color("grid"), width: 1 },
    ticks: { stroke: () => color("grid"), width: 1, size: 4 }, font: "11px system-ui, sans-serif",
    size: 26, gap: 3, space: 64, incrs: [1, 2, 5].flatMap((n) => [...Array(10).keys()].map((e) => n * 10 ** e)).sort((a, b) => a - b),
    values: (u, splits) => splits.map(shortStep),
  };
}

function cursorOf(drag) {
  const filters = { pub: (type) => type === "mousemove" || type === "mouseleave" };
  return { drag, sync: { key: "steps", scales: ["x", null], setSeries: false, filters }, points: { size: 6 }, y: false };
}

// All charts show the same steps.
function setRange(min, max) {
  const span = Math.max(2, Math.min(max - min, everything[1] - everything[0]));
  const low = Math.min(Math.max(min, everything[0]), everything[1] - span);
  state.range = [Math.max(low, everything[0]), Math.min(low + span, everything[1])];
  for (const chart of charts) chart.setScale("x", { min: state.range[0], max: state.range[1] });
}

function followRange(u, key) {
  if (key !== "x" || u.status !== 1) return;
  const { min, max } = u.scales.x;
  if (min === state.range[0] && max === state.range[1]) return;
  setRange(min, max);
}

function showReadout(step) {
  const element = document.getElementById("readout");
  if (step === null) { element.textContent = ""; return; }
  const near = Math.max(0.5, (state.range[1] - state.range[0]) / 300);
  const kinds = new Set();
  for (const [at, kind] of data.marks) {
    if (Math.abs(at - step) <= near && !state.hidden.has(kind)) kinds.add(kind + (at === step ? "" : " at " + writtenStep(at)));
  }
  element.textContent = ["step " + writtenStep(step), ...[...kinds].slice(0, 4)].join(" \u00b7 ");
}
