"""The script on norm placement trains every arm and prints a table of what came out."""

from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("transformers")

from benchmarks.evidence.norm_placement import (
    ARMS,
    CONTEXT,
    Outcome,
    line,
    main,
    model_of,
    run,
    texts,
)


def test_it_prints_one_line_for_each_rate_and_arm(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--seeds", "1", "--steps", "2", "--rates", "1e-3", "1e-2"])
    head, _, *rows = capsys.readouterr().out.splitlines()
    assert head.startswith("2 steps, 1 seeds")
    wanted = [f"| {rate:g} | {arm} |" for rate in (1e-3, 1e-2) for arm in ARMS]
    assert [row[: len(start)] for row, start in zip(rows[2:], wanted, strict=True)] == wanted


def test_arms_differ_in_their_surgeries_and_share_the_other_weights() -> None:
    plain = model_of("pre-norm", 0).state_dict()
    for arm in ARMS:
        state = model_of(arm, 0).state_dict()
        shared = plain.keys() & state.keys()
        assert all(torch.equal(state[name], plain[name]) for name in shared), arm
        assert (state.keys() != plain.keys()) == (arm != "pre-norm")


def test_run_that_is_not_finite_is_counted_and_left_out_of_the_mean() -> None:
    ends = [Outcome(2.0, False, 1.0), Outcome(math.nan, True, 9.0), Outcome(3.0, False, 2.0)]
    assert line(0.1, "arm", ends) == "| 0.1 | arm | 2.500 +- 0.707 | 1 of 3 | 9 |"


def test_run_with_a_broken_weight_has_diverged() -> None:
    model = model_of("pre-norm", 0)
    model.lm_head.weight.data.fill_(math.inf)
    assert run(model, 1e-3, 0, 1, texts()).diverged


def test_training_lowers_the_loss_below_that_of_a_guess() -> None:
    data = texts()
    end = run(model_of("pre-norm", 0), 1e-2, 0, 25, data)
    assert end.loss < math.log(256) - 1
    assert data.unigram < math.log(256)
    assert data.held_out.shape[1] == CONTEXT
