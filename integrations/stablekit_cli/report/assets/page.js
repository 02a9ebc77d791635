"use strict";
// Buttons, the theme, the filter of events, and the order in which everything is drawn.

function draw() {
  while (charts.length) charts.pop().destroy();
  document.documentElement.classList.toggle("narrow", isNarrow());
  const low = isNarrow() ? 190 : 230;
  if (document.getElementById("loss")) lineChart("loss", low);
  if (document.getElementById("norm")) lineChart("norm", low + 30);
  if (document.getElementById("heat")) { heatChart(); heatLegend(); }
  for (const glyph of document.querySelectorAll(".glyph")) {
    const ctx = glyph.getContext("2d");
    ctx.clearRect(0, 0, 24, 24);
    drawGlyph(ctx, glyph.parentElement.dataset.kind, 12, 12, 8);
  }
}

function press(buttons, isOn) {
  for (const button of buttons) button.setAttribute("aria-pressed", String(isOn(button)));
}

function zoom(how) {
  const [min, max] = state.range, span = max - min;
  if (how === "reset") { state.rows = null; setRange(...everything); redraw(); }
  if (how === "in") setRange(min + span / 4, max - span / 4);
  if (how === "out") setRange(min - span / 2, max + span / 2);
  if (how === "left") setRange(min - span / 2, max - span / 2);
  if (how === "right") setRange(min + span / 2, max + span / 2);
}

function redraw() { for (const chart of charts) chart.redraw(false, true); }

function goTo(step) {
  const whole = everything[1] - everything[0];
  const span = Math.min(whole, Math.max(40, Math.min(state.range[1] - state.range[0], whole / 10)));
  setRange(step - span / 2, step + span / 2);
  document.getElementById("charts").scrollIntoView({ block: "start" });
}

function toggleKind(kind) {
  if (!state.hidden.delete(kind)) state.hidden.add(kind);
  press(document.querySelectorAll(".kind"), (button) => !state.hidden.has(button.dataset.kind));
  let shown = 0;
  for (const row of document.querySelectorAll("#events tbody tr")) {
    row.hidden = state.hidden.has(row.dataset.kind);
    shown += !row.hidden;
  }
  const none = document.getElementById("no-events");
  if (none) none.hidden = shown > 0;
  redraw();
}

const THEMES = ["auto", "light", "dark"];
const prefersDark = matchMedia("(prefers-color-scheme: dark)");
let theme = "auto";

function applyTheme() {
  const isDark = theme === "dark" || (theme === "auto" && prefersDark.matches);
  document.documentElement.dataset.theme = isDark ? "dark" : "light";
  document.getElementById("theme").textContent = "Theme: " + theme;
  draw();
}

document.getElementById("theme").addEventListener("click", () => {
  theme = THEMES[(THEMES.indexOf(theme) + 1) % THEMES.length];
  applyTheme();
});
prefersDark.addEventListener("change", applyTheme);

for (const button of document.querySelectorAll("[data-zoom]")) button.addEventListener("click", () => zoom(button.dataset.zoom));
for (const button of document.querySelectorAll(".kind")) button.addEventListener("click", () => toggleKind(button.dataset.kind));
for (const button of document.querySelectorAll(".goto")) button.addEventListener("click", () => goTo(Number(button.dataset.step)));
for (const button of document.querySelectorAll("[data-log]")) {
  press([button], () => state.log[button.dataset.log]);
  button.addEventListener("click", () => {
    state.log[button.dataset.log] = !state.log[button.dataset.log];
    press([button], () => state.log[button.dataset.log]);
    draw();
  });
}
for (const button of document.querySelectorAll("[data-heat]")) {
  button.addEventListener("click", () => {
    state.heat = button.dataset.heat;
    press(document.querySelectorAll("[data-heat]"), (one) => one.dataset.heat === state.heat);
    heatLegend();
    redraw();
  });
}
document.getElementById("charts").addEventListener("dblclick", (event) => {
  if (event.target.closest(".u-over")) zoom("reset");
});

// The end of a spike is one more mark beside its beginning: there, but not at first.
for (const kind of new Set(data.marks.map((mark) => mark[1]))) if (kind.endsWith("-end")) toggleKind(kind);

let width = 0;
new ResizeObserver(() => {
  const now = document.getElementById("charts").clientWidth;
  if (now !== width) { width = now; draw(); }
}).observe(document.getElementById("charts"));
width = document.getElementById("charts").clientWidth;
applyTheme();
