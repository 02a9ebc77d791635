"""The verdict on runs that died, that went back, or in which every tensor was lost at once."""

from __future__ import annotations

import math

import numpy as np
import pytest

from stablekit import Event
from stablekit_cli._app import _console
from stablekit_cli.replay._score import Score
from stablekit_cli.replay._spikes import Spikes
from stablekit_cli.replay._table import table
from stablekit_cli.report._curves import medians
from stablekit_cli.report._verdict import verdict_on
from stablekit_cli.watch._frame import Pulse
from tests.cli.runs import made_up_run, transformer_names
from tests.cli.test_watch import drawn

NAMES = transformer_names(2)


def _all_lost(step: int) -> Event:
    return Event("nonfinite", step, "", "nan", NAMES[:4], {"kind": "nan", "count": len(NAMES)})


def test_no_tensor_is_blamed_where_all_were_lost() -> None:
    events = [_all_lost(255), Event("skip", 255, "nonfinite-guard", "", NAMES)]
    text = verdict_on(made_up_run(spikes=(), events=events)).text

    assert "All 12 tensors were not finite, so no single one is behind it." in text
    assert not any(name in text for name in NAMES)


def test_the_first_module_that_was_not_finite_is_named() -> None:
    monitor = Event("nonfinite-activation", 255, "activation-monitor", "", (), {"module": "a.b"})
    text = verdict_on(made_up_run(spikes=(), events=[_all_lost(255), monitor])).text

    assert "no single one is behind it; first non-finite output: a.b." in text


@pytest.mark.parametrize(
    ("scores", "is_named"),
    [([9.0, 2.0], True), ([9.0], True), ([math.inf, math.inf], False), ([3.0, 3.0], False)],
)
def test_a_spike_names_a_tensor_that_stands_out(scores: list[float], is_named: bool) -> None:
    event = Event("spike", 120, "m", "", NAMES[: len(scores)], {"tensor_scores": scores})
    text = verdict_on(made_up_run(nan_at=(), events=[event])).text

    assert (NAMES[0] in text) == is_named


def test_a_run_that_died_is_no_success() -> None:
    run = made_up_run(spikes=(), nan_at=(298, 299, 300), events=[_all_lost(300), _all_lost(305)])
    verdict = verdict_on(run)

    assert verdict.level == "lost"
    assert "The last 3 steps were skipped or not finite" in verdict.text
    assert "go on to step 305: nonfinite." in verdict.text
    assert "The loss" not in verdict.text


def test_a_loss_that_was_not_recorded_at_the_end_is_no_death() -> None:
    run = made_up_run(spikes=(), nan_at=())
    run.scalars["loss"][-3:] = np.nan

    assert verdict_on(run).level == "calm"
    assert "The loss fell" in verdict_on(run).text


def test_a_rollback_is_told_with_its_steps() -> None:
    back = Event("rollback", 210, "rollback", "", (), {"from_step": 210, "to_step": 150})
    dry = Event("rollback", 250, "rollback", "would have", (), {"reason": ""})
    run = made_up_run(spikes=(), nan_at=(), events=[back, dry])

    assert "The run went back once, from step 210 to 150." in verdict_on(run).text
    assert "  1 rollback" in drawn(run, width=100)


def test_short_runs_have_a_running_median_at_every_step() -> None:
    values = np.random.default_rng(0).standard_normal(400)
    found = medians(values, np.arange(400))

    assert np.isfinite(found).all()
    assert found[200] == np.median(values[190:211])


def test_a_logarithmic_plot_says_so() -> None:
    run = made_up_run(spikes=(), nan_at=())
    heads = [line for line in drawn(run, width=100).splitlines() if line.startswith(("loss", "gr"))]

    assert [" (log)" in line for line in heads] == [False, True]


def test_replay_tells_spikes_from_steps_that_are_not_finite() -> None:
    run = made_up_run()
    label = "nonfinite-guard+zclip:max_grad_norm=none"
    one = Score(label, None, None, 0, 0.0, None, 1, (120, 255), (210,), (255,), None, "")
    made = table("run", run, [one], Spikes((120, 210, 255), "events"))
    cells = {str(column.header): next(iter(column.cells)) for column in made.columns}

    assert str(made.caption) == "2 spikes and 1 step not finite: events"
    assert (cells["spikes\ncaught"], cells["not finite\nskipped"]) == ("1 of 2", "1 of 1")
    assert str(cells["plugins"]).splitlines() == [
        "nonfinite-guard+zclip:", "max_grad_norm=none",
    ]  # fmt: skip


def test_pulse_without_a_rate_says_nothing_of_it() -> None:
    assert "12.5 steps/s" in drawn(made_up_run(), width=100)
    assert "steps/s" not in drawn(made_up_run(), width=100, pulse=Pulse(None, 3.0))


def test_a_pipe_is_as_wide_as_columns_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "70")
    assert _console().width == 70
    monkeypatch.delenv("COLUMNS")
    assert _console().width >= 120
