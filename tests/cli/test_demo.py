"""``stablekit demo``: what it writes, what it prints, and when it fails."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from stablekit_monitors import read_run

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from typer.testing import Result

STEPS = 24
INJECTED = 20


def _arms(out: Path) -> dict[str, dict[str, Any]]:
    results = json.loads((out / "results.json").read_text())
    return {arm["arm"]: arm for arm in results["arms"]}


@pytest.mark.parametrize("workload", ["shards", "rnn", "digits"])
def test_short_run_writes_chart_figures_and_curves(
    run: Callable[..., Result], tmp_path: Path, workload: str
) -> None:
    done = run(
        "demo", "--workload", workload, "--steps", STEPS, "--arms", "none,clip,zclip",
        "--out", tmp_path,
    )  # fmt: skip

    assert done.exit_code == 0, done.output
    with Image.open(tmp_path / "demo.png") as chart:
        assert min(chart.size) > 800
    assert list(_arms(tmp_path)) == ["none", "clip", "zclip"]
    curves = EventAccumulator(str(tmp_path / "tensorboard" / "zclip"))
    curves.Reload()
    assert len(curves.Scalars("train/loss")) == STEPS


def test_plugins_around_model_and_update_run_on_the_transformer(
    run: Callable[..., Result], tmp_path: Path
) -> None:
    arms = [
        "stable-spam:reset_interval=5",
        "spam:threshold=1,warmup_steps=2,grad_accu_steps=2",
        "qk-clip:threshold=0.01",
        "global-norm:max_norm=100+update-clip:threshold=0.1",
        "global-norm:max_norm=0.1+z-loss+soft-cap",
    ]
    done = run(
        "demo", "--workload", "shards-adamw", "--steps", 12, "--arms", ",".join(arms),
        "--out", tmp_path,
    )  # fmt: skip

    assert done.exit_code == 0, done.output
    for name in arms:
        assert any(value > 0 for value in _arms(tmp_path)[name]["history"]["clipped"])


def test_arm_that_needs_another_optimizer_says_so_before_anything_is_trained(
    run: Callable[..., Result], tmp_path: Path
) -> None:
    done = run("demo", "--steps", 10, "--arms", "clip,spam", "--out", tmp_path)

    assert done.exit_code == 2
    assert "arm 'spam': spam clips against the second moment, and SGD keeps none" in done.stderr
    assert not list(tmp_path.iterdir())


def test_protected_arm_skips_the_nan_and_the_others_die_of_it(
    run: Callable[..., Result], tmp_path: Path
) -> None:
    done = run(
        "demo", "--workload", "digits", "--steps", STEPS, "--arms", "none,clip,zclip,adagc",
        "--out", tmp_path,
    )  # fmt: skip

    arms = _arms(tmp_path)
    for name in ("zclip", "adagc"):
        assert arms[name]["skipped_steps"] == [INJECTED]
        assert arms[name]["culprits"] == ["hidden2.weight"]
        assert arms[name]["died_at"] is None
    for name in ("none", "clip"):
        assert arms[name]["died_at"] == INJECTED + 1
        assert arms[name]["held_out_end"] == "nan"
        assert arms[name]["held_out_before_injection"] != "nan"
        assert f"{name}: died at step {INJECTED + 1}, 1 step after the injected NaN" in done.stdout


def test_protected_arms_leave_logs_and_reports(run: Callable[..., Result], tmp_path: Path) -> None:
    for _ in range(2):
        done = run("demo", "--workload", "digits", "--steps", STEPS, "--arms", "clip,zclip,adagc",
                   "--out", tmp_path)  # fmt: skip

    assert done.exit_code == 0, done.output
    assert f"{tmp_path}/report.html" in done.stdout
    logs = sorted((tmp_path / "logs").iterdir())
    assert [log.name for log in logs] == ["adagc", "zclip"]
    for log in logs:
        recorded = read_run(log)
        assert recorded.steps.tolist() == [*range(1, STEPS + 1)]
        assert not (log / "earlier-1").exists()
        named = {e.tensors for e in recorded.events if e.kind == "nonfinite"}
        assert named == {("hidden2.weight",)}
        assert np.flatnonzero(~recorded.ok).tolist() == [INJECTED - 1]
    links = re.findall(r'<a href="(.*?)">', (tmp_path / "report.html").read_text("utf-8"))
    assert links == ["logs/adagc/report.html"]
    links = re.findall(r'<a href="(.*?)">', (logs[0] / "report.html").read_text("utf-8"))
    assert [(logs[0] / link).resolve().is_file() for link in links] == [True]
    assert run("report", logs[1]).exit_code == 0
    assert run("replay", logs[1], "--plugin", "adagc").exit_code == 0


def test_spikes_of_the_demo_are_detected_named_and_survived(
    run: Callable[..., Result], tmp_path: Path
) -> None:
    done = run("demo", "--workload", "shards", "--steps", 90, "--arms", "zclip",
               "--out", tmp_path)  # fmt: skip

    assert done.exit_code == 0, done.output
    (spike, *_) = [e for e in read_run(tmp_path / "logs" / "zclip").events if e.kind == "spike"]
    assert spike.tensors
    assert _arms(tmp_path)["zclip"]["spikes"] > 0
    assert "worst spike at step" in done.stdout
    assert spike.tensors[0] in (tmp_path / "report.html").read_text("utf-8")


def test_unprotected_arms_leave_no_report(run: Callable[..., Result], tmp_path: Path) -> None:
    run("demo", "--workload", "digits", "--steps", 10, "--arms", "clip", "--out", tmp_path)

    assert not (tmp_path / "report.html").exists()


def test_arms_share_initial_weights_and_order_of_the_data(
    run: Callable[..., Result], tmp_path: Path
) -> None:
    run("demo", "--workload", "digits", "--steps", STEPS, "--arms",
        "none,zclip:max_grad_norm=none,nonfinite-guard", "--out", tmp_path)  # fmt: skip

    plain, _, guarded = (arm["history"]["loss"] for arm in _arms(tmp_path).values())
    assert plain[:INJECTED] == guarded[:INJECTED]


def test_seed_changes_the_run_and_nothing_else_does(
    run: Callable[..., Result], tmp_path: Path
) -> None:
    losses = []
    for number, seed in enumerate((0, 0, 1)):
        out = tmp_path / str(number)
        run("demo", "--workload", "digits", "--steps", STEPS, "--arms", "clip", "--seed", seed,
            "--out", out)  # fmt: skip
        losses.append(_arms(out)["clip"]["history"]["loss"])

    assert losses[0] == losses[1] != losses[2]


def test_arm_without_a_guard_fails_the_check(run: Callable[..., Result], tmp_path: Path) -> None:
    done = run(
        "demo", "--workload", "digits", "--steps", STEPS, "--arms", "zclip", "--no-guard",
        "--out", tmp_path,
    )  # fmt: skip

    assert done.exit_code == 1
    assert "CHECK FAILED" in done.stdout
    assert "failed its check" in done.stderr
    assert _arms(tmp_path)["zclip"]["failed_checks"]


def test_old_curves_are_replaced(run: Callable[..., Result], tmp_path: Path) -> None:
    for _ in range(2):
        run("demo", "--workload", "digits", "--steps", 10, "--arms", "clip", "--out", tmp_path)

    assert len(list((tmp_path / "tensorboard" / "clip").iterdir())) == 1


@pytest.mark.parametrize(
    ("arms", "message"),
    [
        ("none,zclp", "did you mean zclip?"),
        ("zclip:z_tresh=3", "z_tresh"),
        ("autoclip:percentile=500", "percentile"),
    ],
)
def test_bad_arms_exit_2_before_anything_is_trained(
    run: Callable[..., Result], tmp_path: Path, arms: str, message: str
) -> None:
    done = run("demo", "--arms", arms, "--out", tmp_path / "never")

    assert done.exit_code == 2
    assert message in done.stderr
    assert not (tmp_path / "never").exists()


def test_too_few_steps_exit_2(run: Callable[..., Result]) -> None:
    assert run("demo", "--steps", 3).exit_code == 2
