"""SpikeMonitor finds what is labelled and seldom errs; the other rules are as described."""

from __future__ import annotations

import functools
import math

import numpy as np
import pytest
import torch

from benchmarks.detector_rules import lightning, olmo_core, robust_baseline, spike_monitor
from benchmarks.detectors import Tally, alarms, lines, measure, tally
from tests.monitors import labelled_record
from tests.monitors.labelled import Stream, recorded, streams

QUIET = (
    "no spike: falling loss",
    "no spike: constant",
    "no spike: wandering level",
    "no spike: noise grows 4 times",
    "recorded loss, without faults",
)
COMPLETE = (
    "loss spikes by height",
    "loss spikes by length",
    "loss spikes in clusters",
    "loss NaN",
    "loss Inf",
    "level shift up, then spikes",
    "level shift down, then spikes",
    "loss spike in the warm-up",
    "recorded loss, with faults",
    "loss that vanishes",
)
EXACT = (*QUIET, *COMPLETE[:-1], "norm spikes by height", "norm spikes in clusters")


@functools.cache
def found() -> dict[str, dict[str, Tally]]:
    """Measure every rule on one seed and the recorded runs."""
    rules = {"ours": robust_baseline(), "olmo": olmo_core(), "lightning": lightning()}
    return measure(rules, [*streams(seeds=(3,)), *recorded()])


@pytest.mark.parametrize("group", QUIET)
def test_there_is_no_alarm_where_there_is_no_spike(group: str) -> None:
    assert found()[group]["ours"].alarms == 0


@pytest.mark.parametrize("group", COMPLETE)
def test_every_spike_of_the_loss_is_found(group: str) -> None:
    assert found()[group]["ours"].recall == 1


@pytest.mark.parametrize("group", EXACT)
def test_no_alarm_is_false_where_the_noise_has_no_heavy_tails(group: str) -> None:
    result = found()[group]["ours"]
    assert (result.alarms, result.wrong_steps) == (result.right, 0)


@pytest.mark.parametrize(
    "group", ["loss NaN", "level shift up, then spikes", "no spike: norms", "norm spikes by height"]
)
def test_the_monitor_flags_what_its_baseline_does(group: str) -> None:
    stream = next(stream for stream in streams((3,)) if stream.group == group)
    values = stream.values[280:480]
    theirs = robust_baseline()(values, stream.signal)
    assert np.array_equal(spike_monitor()(values, stream.signal), theirs)


def test_a_drift_is_found_in_30_steps_and_is_too_slow_for_it_in_300() -> None:
    rule = robust_baseline()
    drifts = [stream for stream in streams((3, 4, 5)) if stream.group == "loss that drifts away"]
    found_in = {s.name.split(",")[0]: tally(s, rule(s.values, "loss")).found for s in drifts}
    assert found_in["in 10 steps"] == found_in["in 30 steps"] == 1
    assert found_in["in 300 steps"] == 0


def test_every_norm_of_20_times_the_usual_is_found() -> None:
    rule = robust_baseline()
    tall = [s for s in streams((3, 4)) if s.signal == "norm" and s.name.startswith(("20", "1000"))]
    assert len(tall) == 4
    for stream in tall:
        assert tally(stream, rule(stream.values, "norm")).recall == 1


def test_over_all_streams_it_finds_more_and_errs_less_than_the_other_rules() -> None:
    everything = found()["all"]
    ours = everything["ours"]
    assert ours.recall > 0.95
    assert ours.precision > 0.94
    assert ours.false_alarms < 0.2
    for other in (everything["olmo"], everything["lightning"]):
        assert ours.recall > other.recall + 0.2
        assert ours.false_alarms < other.false_alarms
        assert ours.wrong_steps * 100 < other.wrong_steps


def test_a_higher_threshold_finds_less_and_errs_less() -> None:
    heavy = [s for s in streams((3,)) if "heavy" in s.group or s.group == "norm spikes by height"]
    rules = {f"{t}": robust_baseline(threshold=float(t)) for t in (3, 6, 12)}
    low, middle, high = (measure(rules, heavy)["all"][name] for name in rules)
    assert low.false_alarms > middle.false_alarms > high.false_alarms
    assert low.recall >= middle.recall > high.recall


def test_olmo_cores_rule_skips_129_steps_after_one_nan() -> None:
    values = 2.0 + 0.01 * np.sin(np.arange(400.0))
    values[200] = math.nan
    flags = olmo_core()(values, "loss")
    assert np.flatnonzero(flags).tolist() == list(range(200, 329))


def test_olmo_cores_rule_has_no_opinion_on_the_first_steps_and_lets_large_spikes_hide_small() -> (
    None
):
    values = 2.0 + 0.01 * np.sin(np.arange(400.0))
    values[[30, 200, 210]] = 50.0, 50.0, 8.0
    assert np.flatnonzero(olmo_core()(values, "loss")).tolist() == [200]


def test_lightnings_rule_is_three_times_the_mean_of_the_last_ten() -> None:
    values = np.full(40, 2.0)
    values[[20, 25, 30, 35]] = 5.9, 6.0, math.nan, 0.1
    assert np.flatnonzero(lightning()(values, "loss")).tolist() == [30]
    values[[20, 25]] = 2.0, 6.1
    assert np.flatnonzero(lightning()(values, "loss")).tolist() == [25, 30]


def test_a_tally_counts_alarms_spikes_and_wrong_steps() -> None:
    stream = Stream("", "", "loss", np.zeros(100), ((20, 22), (50, 51)), ((70, 80),))
    flags = np.zeros(100, dtype=bool)
    flags[[21, 22, 23, 40, 72, 95]] = True
    result = tally(stream, flags)
    expected = Tally(steps=100, spikes=2, found=1, alarms=3, right=1, wrong_steps=3)
    assert result == expected
    assert result.recall == 0.5
    assert result.precision == pytest.approx(1 / 3)
    assert result.false_alarms == pytest.approx(20.0)


def test_steps_at_most_ten_apart_are_one_alarm() -> None:
    flags = np.zeros(60, dtype=bool)
    flags[[5, 15, 26, 40]] = True
    assert alarms(flags) == [[5, 15], [26], [40]]


def test_the_table_has_a_line_for_each_group_and_rule() -> None:
    rows = lines(found())
    assert {len(row) for row in rows} == {6}
    assert [row[0] for row in rows[1:] if row[0]] == [*found()]


def test_recorded_runs_are_labelled_by_their_faults() -> None:
    runs = list(recorded())
    assert {stream.name for stream in runs} == set(labelled_record.RECIPES)
    for stream in runs:
        recipe = labelled_record.RECIPES[stream.name]
        assert len(stream.values) == recipe.steps
        assert np.isfinite(stream.values).all()
        assert bool(stream.spikes) == bool(recipe.faults)
        for start, _ in stream.spikes:
            assert start in recipe.faults or recipe.faults[start - 1] == "rate"


def test_a_fault_is_recorded_where_it_shows() -> None:
    recipe = labelled_record.Recipe(
        labelled_record.mlp,
        labelled_record.digits(),
        lambda model: torch.optim.AdamW(model.parameters(), lr=3e-3),
        steps=95,
        faults={80: "garbage", 90: "all tensors"},
    )
    seen = labelled_record.train(recipe, seed=0)
    assert seen["loss spikes"].tolist() == [80]
    assert seen["norm spikes"].tolist() == [80, 90]
    assert seen["norm"][90] > 5 * seen["norm"][89]
