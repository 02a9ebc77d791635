"""What the demo says about an arm follows from its records alone."""

from __future__ import annotations

import math

from stablekit_cli.demo._arms import Arm
from stablekit_cli.demo._checks import comparisons, failures, fate, worst_spike
from stablekit_cli.demo._protection import Incident, Reading
from stablekit_cli.demo._summary import summarize
from stablekit_cli.demo._training import Plan, Record, Run
from stablekit_cli.demo._workload import Facts

PLAN = Plan(steps=20, seed=0)
FACTS = Facts("toy", "a toy", "no data", "nats", 20, 0.25, "head.weight", high_loss=1.5)
NAN = Incident("nonfinite", "NaN gradient", ("head.weight",))


def _run(label: str, held_out: float, *, skip: int | None = None, chain: bool = True) -> Run:
    records = [
        Record(step, 1.0, Reading(0.5, skipped=step == skip, incidents=(NAN,) * (step == skip)), 1)
        for step in range(1, PLAN.steps + 1)
    ]
    return Run(Arm(label, (label,) if chain else ()), records, 3.0, held_out, held_out)


def test_skipping_exactly_the_injected_step_passes() -> None:
    assert failures(_run("zclip", 2.0, skip=PLAN.injected_step), PLAN, FACTS) == []


def test_the_worst_spike_is_told_with_its_tensor() -> None:
    run = _run("zclip", 2.0)
    for step, score in ((5, 9.0), (9, 20.0), (12, 7.0)):
        data = {"signal": "loss", "value": 4.0, "baseline": 2.5, "score": score}
        spike = Incident("spike", "", (f"tensor{step}",), data)
        run.records[step - 1] = Record(step, 4.0, Reading(0.5, incidents=(spike,)), 1.0)

    assert worst_spike(run) == ("; worst spike at step 9: loss 4, usually 2.5, most of all tensor9")
    assert summarize(run, PLAN, FACTS).spikes == 3
    assert worst_spike(_run("zclip", 2.0)) == ""


def test_skipping_another_step_fails() -> None:
    found = failures(_run("zclip", 2.0, skip=3), PLAN, FACTS)

    assert any("skipped steps [3]" in one for one in found)
    assert any("head.weight" in one for one in found)


def test_finishing_with_a_nan_fails() -> None:
    found = failures(_run("zclip", math.nan, skip=PLAN.injected_step), PLAN, FACTS)

    assert found == ["finished with a held-out loss of nan"]


def test_nothing_is_demanded_of_an_unprotected_arm() -> None:
    assert failures(_run("none", math.nan, chain=False), PLAN, FACTS) == []


def test_arm_that_is_no_better_than_plain_clipping_is_told_so() -> None:
    runs = [_run("clip", 2.0, chain=False), _run("zclip", 1.99), _run("adagc", 1.5)]
    same, better = comparisons(runs, PLAN, FACTS)

    assert "NO BETTER" in same.partition(";")[0]
    assert better.startswith("adagc")
    assert "better" in better.partition(";")[0]


def test_arm_that_is_worse_than_plain_clipping_is_told_so() -> None:
    (line,) = comparisons([_run("clip", 2.0, chain=False), _run("zclip", 2.5)], PLAN, FACTS)

    assert "WORSE" in line.partition(";")[0]


def test_divergence_is_part_of_the_fate() -> None:
    assert fate(_run("none", 7.0, chain=False), PLAN, FACTS).startswith("diverged")
    assert "diverged" not in fate(_run("none", 2.0, chain=False), PLAN, FACTS)


def test_worst_loss_ignores_the_start_and_what_follows_the_injection() -> None:
    run = _run("none", 2.0, chain=False)
    for index, loss in ((0, 9.0), (8, 4.0), (PLAN.steps - 1, 8.0)):
        run.records[index] = Record(index + 1, loss, Reading(0.5), 1.0)
    summary = summarize(run, PLAN, FACTS)

    assert summary.worst_loss == 4.0
    assert summary.high_losses == 1
