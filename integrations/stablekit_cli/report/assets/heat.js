"use strict";
// The norms of all tensors as colours: tensors down, steps across.

const heat = data.heat;
const SEQUENTIAL = ["#440154", "#482475", "#414487", "#355f8d", "#2a788e", "#21918c", "#22a884", "#44bf70", "#7ad151", "#bddf26", "#fde725"];
// From far below the median to far above it; the middle is the colour of the page.
const DIVERGING = {
  light: [["#08519c", "#3787c0", "#a9d0e8"], ["#fbc49d", "#de5a35", "#96150f"]],
  dark: [["#a5d4ff", "#4a94d6", "#1f4666"], ["#6b3014", "#e0703a", "#ffd9a8"]],
};

if (heat) {
  heat.cells = decoded(heat.codes, Uint16Array);
  heat.rows = heat.names.length;
  heat.decades = (heat.high - heat.low) / (heat.code.LAST - heat.code.FIRST);
  heat.medians = Float64Array.from(heat.names, (name, row) => median(usual(row)));
  const logs = spread(heat.cells, (code) => code);
  heat.limits = [quantile(logs, 0.01), quantile(logs, 0.999)];
  const apart = [];
  for (let row = 0; row < heat.rows; row += 1) {
    for (const code of spread(usual(row), (c) => c, 200)) apart.push(Math.abs(code - heat.medians[row]));
  }
  heat.reach = Math.min(3, Math.max(1, quantile(Float64Array.from(apart).sort(), 0.999) * heat.decades)) / heat.decades;
  heat.groups = groupsOf(heat.names);
}

function isUsual(code) { return code >= heat.code.FIRST && code <= heat.code.LAST; }
function usual(row) { return heat.cells.subarray(row * heat.columns, (row + 1) * heat.columns).filter(isUsual); }
function median(codes) { return codes.length ? quantile(Float64Array.from(codes).sort(), 0.5) : heat.code.FIRST; }
function quantile(sorted, share) { return sorted.length ? sorted[Math.round(share * (sorted.length - 1))] : 0; }

function spread(codes, value, limit = 40000) {
  const stride = Math.max(1, Math.floor(codes.length / limit));
  const found = [];
  for (let i = 0; i < codes.length; i += stride) if (isUsual(codes[i])) found.push(value(codes[i]));
  return Float64Array.from(found).sort();
}

function valueOf(code) {
  const { ABSENT, ZERO, FIRST, INF, NAN } = heat.code;
  if (code === ABSENT) return "no gradient";
  if (code === ZERO) return "0";
  if (code === INF) return "infinite";
  if (code === NAN) return "NaN";
  return written(10 ** (heat.low + (code - FIRST) * heat.decades));
}

// Rows that belong together: the path up to its first number, as in blocks.3 of blocks.3.up.weight.
function groupsOf(names) {
  const groups = [];
  names.forEach((name, row) => {
    const parts = name.split(".");
    const at = parts.findIndex((part) => /^\d+$/.test(part));
    const key = at < 0 ? parts[0] : parts.slice(Math.max(0, at - 1), at + 1).join(".");
    const last = groups[groups.length - 1];
    if (!last || last.key !== key) groups.push({ key, row, rows: 1 });
    else last.rows += 1;
  });
  return groups;
}

function rgb(hex) { return [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16)); }

function ramp(colors, size) {
  const table = new Uint32Array(size);
  const stops = colors.map(rgb);
  for (let i = 0; i < size; i += 1) {
    const at = (i / (size - 1)) * (stops.length - 1);
    const k = Math.min(Math.floor(at), stops.length - 2);
    const [r, g, b] = stops[k].map((from, c) => Math.round(from + (stops[k + 1][c] - from) * (at - k)));
    table[i] = (255 << 24) | (b << 16) | (g << 8) | r;
  }
  return table;
}

function palette() {
  const [below, above] = DIVERGING[document.documentElement.dataset.theme];
  const colors = state.heat === "absolute" ? SEQUENTIAL : [...below, color("mid"), ...above];
  const pixel = (name) => { const [r, g, b] = rgb(color(name)); return ((255 << 24) | (b << 16) | (g << 8) | r) >>> 0; };
  return { colors, table: ramp(colors, 256), nan: pixel("nonfinite"), inf: pixel("lost"), absent: 0 };
}

function shade(code, row, tints) {
  if (!isUsual(code)) {
    if (code === heat.code.NAN) return tints.nan;
    if (code === heat.code.INF) return tints.inf;
    return code === heat.code.ZERO && state.heat === "absolute" ? tints.table[0] : tints.absent;
  }
  const share = state.heat === "absolute"
    ? (code - heat.limits[0]) / Math.max(1, heat.limits[1] - heat.limits[0])
    : 0.5 + (code - heat.medians[row]) / (2 * heat.reach);
  return tints.table[Math.max(0, Math.min(255, Math.round(255 * share)))];
}

// Codes are ordered so that the largest is what must not disappear when many share a pixel.
function picture(first, last, top, bottom, width, height) {
  const wide = Math.min(width, last - first), high = Math.min(height, bottom - top);
  const image = new ImageData(wide, high);
  const pixels = new Uint32Array(image.data.buffer);
  const tints = palette();
  for (let y = 0; y < high; y += 1) {
    const rowFrom = top + Math.floor((y * (bottom - top)) / high), rowTo = top + Math.ceil(((y + 1) * (bottom - top)) / high);
    for (let x = 0; x < wide; x += 1) {
      const from = first + Math.floor((x * (last - first)) / wide), to = first + Math.ceil(((x + 1) * (last - first)) / wide);
      let code = 0, at = rowFrom;
      for (let row = rowFrom; row < rowTo; row += 1) {
        for (let i = row * heat.columns + from; i < row * heat.columns + to; i += 1) {
          if (heat.cells[i] > code) { code = heat.cells[i]; at = row; }
        }
      }
      pixels[y * wide + x] = shade(code, at, tints);
    }
  }
  return image;
}

function drawHeat(u) {
  const { ctx, bbox } = u;
  const { x, y } = u.scales;
  const first = Math.max(0, Math.floor((x.min - heat.first) / heat.width)), last = Math.min(heat.columns, Math.floor((x.max - heat.first) / heat.width) + 1);
  const top = Math.max(0, Math.round(y.min)), bottom = Math.min(heat.rows, Math.floor(y.max + 0.5));
  if (last <= first || bottom <= top) return;
  const canvas = document.createElement("canvas");
  const image = picture(first, last, top, bottom, Math.round(bbox.width), Math.round(bbox.height));
  canvas.width = image.width; canvas.height = image.height;
  canvas.getContext("2d").putImageData(image, 0, 0);
  const left = u.valToPos(heat.first + (first - 0) * heat.width - 0.5, "x", true), right = u.valToPos(heat.first + last * heat.width - 0.5, "x", true);
  const upper = u.valToPos(top - 0.5, "y", true), lower = u.valToPos(bottom - 0.5, "y", true);
  ctx.save();
  ctx.beginPath(); ctx.rect(bbox.left, bbox.top, bbox.width, bbox.height); ctx.clip();
  ctx.imageSmoothingEnabled = false;
  ctx.drawImage(canvas, left, upper, right - left, lower - upper);
  ctx.strokeStyle = color("card"); ctx.lineWidth = devicePixelRatio; ctx.globalAlpha = 0.6;
  const hasRoom = (lower - upper) / (bottom - top) > 6 * devicePixelRatio;
  for (const group of hasRoom ? heat.groups : []) {
    const line = u.valToPos(group.row - 0.5, "y", true);
    ctx.beginPath(); ctx.moveTo(bbox.left, line); ctx.lineTo(bbox.left + bbox.width, line); ctx.stroke();
  }
  ctx.restore();
  drawMarks(u, false);
}

function clippedName(name, signs) { return name.length <= signs ? name : "\u2026" + name.slice(1 - signs); }

// As many of the rows as can be read.
function labelledRows(u, low, high) {
  const first = Math.max(0, Math.ceil(low)), last = Math.min(heat.rows - 1, Math.floor(high));
  const stride = Math.max(1, Math.ceil(13 / (u.bbox.height / devicePixelRatio / (high - low))));
  const rows = [];
  for (let row = first; row <= last; row += stride) rows.push(row);
  return rows;
}

function groupTicks(u, low, high) {
  const height = u.bbox.height / devicePixelRatio / (high - low);
  let free = -Infinity;
  return heat.groups.flatMap((group) => {
    const middle = group.row + (group.rows - 1) / 2;
    if (middle < low || middle > high || (middle - free) * height < 13) return [];
    free = middle;
    return [middle];
  });
}

function groupName(row) {
  const group = heat.groups.find((one) => row >= one.row && row < one.row + one.rows);
  return group ? clippedName(group.key, 9) : "";
}

function heatChart() {
  const element = document.getElementById("heat");
  const gutter = isNarrow() ? 0 : GUTTER;
  const font = "10.5px ui-monospace, Menlo, Consolas, 'DejaVu Sans Mono', monospace";
  const full = [-0.5, heat.rows - 0.5];
  const side = { grid: { show: false }, ticks: { show: false }, stroke: () => color("axis"), font, filter: (u, s) => s };
  const options = {
    width: element.clientWidth, height: Math.max(130, Math.min(620, heat.rows * 15 + 26 + HEADROOM)), padding: [HEADROOM, gutter ? 0 : RIGHT, 0, 0],
    scales: {
      x: { time: false, min: state.range[0], max: state.range[1] },
      y: { dir: -1, range: () => state.rows || full },
    },
    series: [{}, { show: true }],
    legend: { show: false },
    axes: [
      stepAxis(),
      { ...side, scale: "y", size: LEFT, gap: 6, splits: (u, axis, low, high) => groupTicks(u, low, high), values: (u, rows) => rows.map(groupName) },
      { ...side, scale: "y", side: 1, show: gutter > 0, size: gutter, gap: 8, splits: (u, axis, low, high) => labelledRows(u, low, high),
        values: (u, rows) => rows.map((row) => clippedName(heat.names[row], 33)) },
    ],
    cursor: { ...cursorOf({ x: true, y: true, uni: 24 }), points: { show: false } },
    hooks: {
      setScale: [followRange, (u, key) => followRows(u, key, full)],
      draw: [drawHeat],
      ready: [addTip],
    },
  };
  charts.push(new uPlot(options, [everything, [null, null]], element));
}

// A zoom over steps alone leaves the rows as they are, so that they are kept here.
function followRows(u, key, full) {
  if (key !== "y" || u.status !== 1) return;
  const { min, max } = u.scales.y;
  state.rows = min <= full[0] && max >= full[1] ? null : [Math.max(min, full[0]), Math.min(max, full[1])];
}

function addTip(u) {
  u.tip = document.createElement("div");
  u.tip.className = "tip";
  u.tip.hidden = true;
  u.over.appendChild(u.tip);
  u.over.addEventListener("mousemove", () => showTip(u));
  u.over.addEventListener("mouseleave", () => { u.tip.hidden = true; });
}

function showTip(u) {
  const { left, top } = u.cursor;
  u.tip.hidden = false;
  const step = u.posToVal(left, "x"), row = Math.round(u.posToVal(top, "y"));
  const column = Math.floor((step + 0.5 - heat.first) / heat.width);
  if (row < 0 || row >= heat.rows || column < 0 || column >= heat.columns) { u.tip.hidden = true; return; }
  const from = heat.first + column * heat.width, to = Math.min(from + heat.width - 1, everything[1]);
  const code = heat.cells[row * heat.columns + column];
  const name = document.createElement("b");
  name.textContent = heat.names[row];
  const when = heat.width > 1 ? "steps " + writtenStep(from) + " to " + writtenStep(to) + ", largest " : "step " + writtenStep(from) + ": ";
  u.tip.replaceChildren(name, when + valueOf(code) + (isUsual(code) ? ", " + written(10 ** ((code - heat.medians[row]) * heat.decades)) + " x its median" : ""));
  const room = u.over.clientWidth - u.tip.offsetWidth;
  const beside = left > u.over.clientWidth / 2 ? left - 14 - u.tip.offsetWidth : left + 14;
  u.tip.style.left = Math.max(0, Math.min(beside, room)) + "px";
  u.tip.style.top = Math.min(top + 14, Math.max(0, u.over.clientHeight - 60)) + "px";
  showReadout(Math.round(step));
}

function heatLegend() {
  const tints = palette();
  const [low, bar, high] = document.getElementById("scale").children;
  bar.style.background = "linear-gradient(90deg, " + tints.colors.join(", ") + ")";
  const at = (code) => 10 ** (heat.low + (code - heat.code.FIRST) * heat.decades);
  const factor = written(Number((10 ** (heat.reach * heat.decades)).toPrecision(2)));
  low.textContent = state.heat === "absolute" ? written(Number(at(heat.limits[0]).toPrecision(2))) : "1/" + factor;
  high.textContent = state.heat === "absolute" ? written(Number(at(heat.limits[1]).toPrecision(2))) : factor + "x";
  const notes = [["NAN", "NaN", "nonfinite"], ["INF", "infinite", "lost"], ["ABSENT", "no gradient", "card"]];
  const swatches = notes.filter(([key]) => heat.cells.includes(heat.code[key])).map(([, label, tint]) => {
    const swatch = document.createElement("span"), box = document.createElement("i");
    box.style.background = color(tint);
    swatch.append(box, label);
    return swatch;
  });
  document.getElementById("swatches").replaceChildren(...swatches);
}
