"""The evidence on wrong labels trains on what it says it does."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.evidence.label_noise import ARMS, EARLY, Result, digits, main, table, train


def test_two_fifths_of_the_training_labels_are_wrong_and_no_test_label_is() -> None:
    from sklearn.datasets import load_digits

    bunch: Any = load_digits()
    known = {tuple(x): int(y) for x, y in zip(bunch.data.tolist(), bunch.target, strict=True)}
    data = digits(0)
    x, y = torch.cat([data.x, data.x_test]), torch.cat([data.right, data.y_test])
    assert [known[tuple(row)] for row in (x * 16).round().tolist()] == y.tolist()
    assert len(y) == len(known) == 1797
    wrong = [float((digits(s).given != digits(s).right).float().mean()) for s in range(5)]
    assert sum(wrong) / 5 == pytest.approx(0.4, abs=0.02)


def test_seeds_give_other_splits_and_the_same_one_gives_the_same() -> None:
    assert torch.equal(digits(1).x, digits(1).x)
    assert not torch.equal(digits(1).given, digits(2).given)


def test_a_run_without_plugins_learns_more_than_chance() -> None:
    assert train(digits(0), [], steps=60, seed=0).error < 0.5


def test_the_table_gives_mean_and_sample_deviation() -> None:
    rows = table({"this": [Result(0.1, 0.5), Result(0.3, 0.5)]}).splitlines()
    assert rows[-1] == "| this | 0.200 +- 0.141 | 0.500 +- 0.000 |"


def test_the_script_prints_a_row_for_each_arm(capsys: pytest.CaptureFixture[str]) -> None:
    before = torch.get_num_threads()
    main(["--seeds", "1", "--steps", "10"])
    torch.set_num_threads(before)
    printed = capsys.readouterr().out
    assert all(f"| {name} | " in printed for name in (*ARMS, EARLY))
