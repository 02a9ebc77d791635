"""The report in a real browser: what is drawn, what the mouse and the buttons do."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from stablekit import Event
from stablekit_cli.report._write import write_report
from tests.cli.browser import CHROMIUM, WHY_NOT, act
from tests.cli.runs import made_up_run, transformer_names

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason=WHY_NOT)

STEPS = 300
HOSTILE = "<img src=x onerror=window.pwned=1></script><script>window.pwned=2</script>'\""

TOUR = """
const seen = {};
const ranges = () => charts.map((chart) => [chart.scales.x.min, chart.scales.x.max]);
const colors = (id) => {
  const canvas = one("#" + id + " canvas"), { width, height } = canvas;
  const pixels = canvas.getContext("2d").getImageData(0, 0, width, height).data.buffer;
  return new Set(new Uint32Array(pixels)).size;
};
const isShown = (row) => row.offsetHeight > 0;
const shownRows = () => all("#events tbody tr").filter(isShown).map((row) => row.dataset.kind);
seen.colors = ["loss", "norm", "heat"].map(colors);
seen.legends = all(".u-legend .u-label").map((label) => label.textContent);
seen.whole = ranges();
drag("#loss .u-over", [0.25, 0.5], [0.5, 0.6]); await wait(50);
seen.dragged = ranges();
mouse("#norm .u-over", "dblclick", 0.5, 0.5); await wait(50);
seen.reset = ranges();
drag("#heat .u-over", [0.1, 0.1], [0.6, 0.6]); await wait(50);
seen.rows = state.rows; seen.draggedHeat = ranges();
one("[data-zoom=reset]").click(); await wait(50);
seen.resetRows = state.rows;
one("[data-zoom=in]").click(); await wait(50);
seen.zoomedIn = ranges();
one("[data-zoom=reset]").click(); await wait(50);
mouse("#heat .u-over", "mouseenter", 0.4, 0.3);
mouse("#heat .u-over", "mousemove", 119 / 299, 3.5 / 12); await wait(50);
seen.tip = one(".tip").hidden ? null : one(".tip").textContent;
seen.readout = one("#readout").textContent;
mouse("#heat .u-over", "mouseleave", 0, 0);
seen.tipAfter = one(".tip").hidden;
seen.allKinds = shownRows();
one("#charts .kind[data-kind=spike]").click();
seen.withoutSpikes = shownRows();
seen.pressed = all(".kind[data-kind=spike]").map((button) => button.getAttribute("aria-pressed"));
one("#charts .kind[data-kind=spike]").click();
all("#events .goto").at(-1).click(); await wait(50);
seen.gone = ranges();
one("[data-heat=absolute]").click();
seen.heat = [state.heat, one("[data-heat=absolute]").getAttribute("aria-pressed")];
const look = () => [
  document.documentElement.dataset.theme, getComputedStyle(document.body).backgroundColor,
];
one("#theme").click(); seen.light = look();
one("#theme").click(); await wait(50); seen.dark = [...look(), colors("heat")];
seen.overflow = document.documentElement.scrollWidth - document.documentElement.clientWidth;
seen.hosts = performance.getEntriesByType("resource").map((entry) => entry.name);
return seen;
"""


@pytest.fixture(scope="module")
def tour(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], list[str]]:
    """Walk once through the report of a run with two spikes and a NaN."""
    folder = tmp_path_factory.mktemp("report")
    write_report(made_up_run(STEPS), folder / "report.html", name="run")
    return act(folder / "report.html", TOUR, folder)


def _seen(tour: tuple[dict[str, Any], list[str]]) -> dict[str, Any]:
    assert "error" not in tour[0], tour
    return tour[0]


def test_nothing_is_written_to_the_console(tour: tuple[dict[str, Any], list[str]]) -> None:
    assert tour[1] == []


def test_nothing_is_fetched(tour: tuple[dict[str, Any], list[str]]) -> None:
    assert _seen(tour)["hosts"] == []


def test_every_chart_is_drawn(tour: tuple[dict[str, Any], list[str]]) -> None:
    seen = _seen(tour)

    assert min(seen["colors"]) > 10
    assert {"loss", "gradient norm", "after clipping", "zclip threshold"} <= {*seen["legends"]}
    assert seen["whole"] == [[1, STEPS]] * 3


def test_dragging_zooms_all_charts_and_a_double_click_resets_them(
    tour: tuple[dict[str, Any], list[str]],
) -> None:
    seen = _seen(tour)
    low, high = seen["dragged"][0]

    assert seen["dragged"] == [[low, high]] * 3
    assert low == pytest.approx(1 + 0.25 * (STEPS - 1), abs=1)
    assert high == pytest.approx(1 + 0.5 * (STEPS - 1), abs=1)
    assert seen["reset"] == [[1, STEPS]] * 3


def test_the_table_of_norms_zooms_in_both_directions(
    tour: tuple[dict[str, Any], list[str]],
) -> None:
    seen = _seen(tour)

    top, bottom = seen["rows"]
    assert top == pytest.approx(0.1 * 12 - 0.5, abs=0.2)
    assert bottom == pytest.approx(0.6 * 12 - 0.5, abs=0.2)
    assert seen["draggedHeat"][0][1] == pytest.approx(0.6 * STEPS, abs=2)
    assert seen["resetRows"] is None


def test_buttons_zoom_without_a_mouse(tour: tuple[dict[str, Any], list[str]]) -> None:
    low, high = _seen(tour)["zoomedIn"][0]

    assert high - low == pytest.approx((STEPS - 1) / 2, abs=1)


def test_hovering_tells_tensor_step_and_value(tour: tuple[dict[str, Any], list[str]]) -> None:
    seen = _seen(tour)
    run = made_up_run(STEPS)

    assert seen["tip"].startswith(f"{run.names[3]}step 120: ")
    told = float(seen["tip"].partition("step 120: ")[2].partition(",")[0])
    assert told == pytest.approx(run.norms[119, 3], rel=2e-3)
    assert seen["readout"].startswith("step 120")
    assert "spike" in seen["readout"]
    assert seen["tipAfter"]


def test_a_kind_of_events_can_be_hidden(tour: tuple[dict[str, Any], list[str]]) -> None:
    seen = _seen(tour)

    assert seen["allKinds"] == ["spike", "spike", "nonfinite", "skip"]
    assert seen["withoutSpikes"] == ["nonfinite", "skip"]
    assert seen["pressed"] == ["false", "false"]


def test_the_step_of_an_event_leads_to_the_charts(tour: tuple[dict[str, Any], list[str]]) -> None:
    low, high = _seen(tour)["gone"][0]

    assert low < 255 < high
    assert high - low < 60


def test_theme_and_colours_can_be_chosen(tour: tuple[dict[str, Any], list[str]]) -> None:
    seen = _seen(tour)

    assert seen["heat"] == ["absolute", "true"]
    assert seen["light"][0] == "light"
    assert seen["dark"][0] == "dark"
    assert seen["light"][1] != seen["dark"][1]
    assert seen["dark"][2] > 10


def test_wide_page_does_not_scroll_sideways(tour: tuple[dict[str, Any], list[str]]) -> None:
    assert _seen(tour)["overflow"] <= 0


def test_small_window_has_no_sideways_scroll_and_hostile_names_are_text(tmp_path: Path) -> None:
    names = (HOSTILE, *transformer_names(2)[1:])
    events = [Event(HOSTILE, 120, HOSTILE, HOSTILE, (HOSTILE,) * 5, {HOSTILE: HOSTILE})]
    run = made_up_run(STEPS, names, events=events, header={"plugins": {HOSTILE: HOSTILE}})
    write_report(run, tmp_path / "report.html", name=HOSTILE, links=[(HOSTILE, "other.html")])
    seen, console = act(
        tmp_path / "report.html",
        "mouse('#heat .u-over', 'mouseenter', 0.4, 0.01);"
        "mouse('#heat .u-over', 'mousemove', 0.4, 0.01);"
        "return [window.pwned === undefined, all('img').length, one('h1').textContent,"
        " one('.tip b').textContent, one('.badge').textContent,"
        " document.documentElement.scrollWidth - document.documentElement.clientWidth];",
        tmp_path,
        width=500,
    )

    assert seen == [True, 0, HOSTILE, HOSTILE, HOSTILE, 0]
    assert console == []


def test_legend_tells_nan_and_marks_stand_at_their_step(tmp_path: Path) -> None:
    back = Event("rollback", 210, "r", "", (), {"from_step": 210, "to_step": 150})
    kinds = [Event(kind, 210, "r") for kind in ("skip", "spike", "nonfinite", "other")]
    run = made_up_run(STEPS, spikes=(), nan_at=(300,), events=[*kinds, back])
    run.scalars["loss"][-1] = np.nan
    write_report(run, tmp_path / "report.html", name="run")
    seen, console = act(
        tmp_path / "report.html",
        "const chart = charts[0]; const marks = []; const spans = [];"
        "drawGlyph = (ctx, kind, x, y) => marks.push([kind, x, y]);"
        "chart.ctx.fillRect = (x, y, w) => spans.push([x, x + w]);"
        "drawMarks(chart, false); drawSpans(chart);"
        "const at = (step) => chart.valToPos(step, 'x', true);"
        "return [all('.u-value').map((one) => one.textContent), marks, spans, at(210), at(150)];",
        tmp_path,
    )
    values, marks, spans, start, end = seen

    assert console == []
    assert values[1] == "nan"
    assert [kind for kind, _, _ in marks] == ["rollback", "nonfinite", "spike"]
    assert {x for _, x, _ in marks} == {round(start)}
    assert min(y for _, _, y in marks) > 0
    assert spans == [[pytest.approx(end), pytest.approx(start)]]


@pytest.mark.parametrize("steps", [0, 1, 2])
def test_hardly_any_steps_are_no_error(tmp_path: Path, steps: int) -> None:
    write_report(made_up_run(steps, spikes=(), nan_at=()), tmp_path / "report.html", name="short")
    seen, console = act(tmp_path / "report.html", "return charts.length;", tmp_path)

    assert console == []
    assert seen == (3 if steps else 0)
