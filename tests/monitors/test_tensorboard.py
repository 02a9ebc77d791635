"""TensorBoard shows scalars, histograms of norms and events, each at its step."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import stablekit
from stablekit.testing import CHECKS, Factory, NanGuard, TinyRun
from stablekit_monitors import TensorBoard, tensorboard

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


def shown(folder: Path) -> EventAccumulator:
    """Return what TensorBoard shows of a folder."""
    curves = EventAccumulator(
        str(folder), size_guidance=dict.fromkeys(("scalars", "tensors", "histograms"), 0)
    )
    curves.Reload()
    return curves


def steps(curves: EventAccumulator, tag: str) -> list[int]:
    return [point.step for point in curves.Scalars(tag)]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_it_keeps_the_contract(check: Callable[[Factory], None]) -> None:
    check(TensorBoard.example)


@pytest.mark.parametrize("device_mode", [False, True], ids=["host", "device"])
def test_metrics_norms_and_events_are_shown_at_their_steps(
    tmp_path: Path, device_mode: bool
) -> None:
    run = TinyRun(
        NanGuard(),
        "zclip",
        TensorBoard(tmp_path, histogram_every=3),
        nan_at=(3,),
        log_every=2,
        device_mode=device_mode,
    ).go(6)
    session = run.session
    assert session is not None
    session.detach()
    curves = shown(tmp_path)
    metrics = session.metrics()
    assert set(curves.Tags()["scalars"]) == set(metrics)
    assert steps(curves, "grad_norm") == [2, 4, 6]
    assert curves.Scalars("grad_norm")[-1].value == pytest.approx(metrics["grad_norm"])
    assert math.isnan(curves.Scalars("grad_norm")[1].value)
    assert [point.step for point in curves.Histograms("log10_grad_norms")] == [3, 6]
    texts = curves.Tensors("events/text_summary")
    assert [point.step for point in texts] == [4, 4]
    said = texts[0].tensor_proto.string_val[0].decode()
    assert said.startswith("**nonfinite**")
    assert "- `0.weight`" in said


def test_a_histogram_is_of_the_logarithms_of_finite_norms(tmp_path: Path) -> None:
    params = [torch.nn.Parameter(torch.zeros(1)) for _ in range(4)]
    optimizer = torch.optim.SGD(params, lr=0.0)
    with stablekit.attach(optimizer, TensorBoard(tmp_path, histogram_every=1)):
        for param, norm in zip(params, (0.01, 1000.0, math.inf, 0.0), strict=True):
            param.grad = torch.tensor([norm])
        optimizer.step()
        for param in params:
            param.grad = None
        optimizer.step()
    (point,) = shown(tmp_path).Histograms("log10_grad_norms")
    histogram = point.histogram_value
    assert (histogram.num, histogram.min, histogram.max) == (2, -2, 3)
    assert histogram.sum == pytest.approx(1)


def test_a_resumed_run_hides_what_it_does_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = TinyRun(TensorBoard(tmp_path)).go(3)
    checkpoint = first.optimizer.state_dict()
    first.go(4)
    assert first.session is not None
    first.session.detach()
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 5)  # names of files have seconds in them
    second = TinyRun(TensorBoard(tmp_path))
    second.optimizer.load_state_dict(checkpoint)
    second.go(2)
    assert second.session is not None
    second.session.detach()
    assert steps(shown(tmp_path), "grad_norm") == [1, 2, 3, 4, 5]


def test_a_run_that_goes_back_begins_another_file(tmp_path: Path) -> None:
    run = TinyRun(TensorBoard(tmp_path)).go(2)
    assert run.session is not None
    state = run.session.state_dict()
    run.go(4)
    run.session.load_state_dict(state)
    run.go(3)
    run.session.detach()
    assert steps(shown(tmp_path), "grad_norm") == [1, 2, 3, 4, 5]
    assert len(list(tmp_path.iterdir())) == 2


def test_without_histograms_there_are_none(tmp_path: Path) -> None:
    run = TinyRun(f"tensorboard:log_dir={tmp_path},histogram_every=0").go(3)
    assert run.session is not None
    run.session.detach()
    assert shown(tmp_path).Tags()["histograms"] == []


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorboard, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'stablekit\[tensorboard\]'"):
        TensorBoard(tmp_path)


def test_nothing_is_written_before_the_first_step(tmp_path: Path) -> None:
    TinyRun(TensorBoard(tmp_path / "run")).go(0)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("value", [-1, 2.5])
def test_bad_intervals_are_refused(value: float) -> None:
    with pytest.raises((TypeError, ValueError), match="histogram_every must be an integer"):
        TensorBoard("run", histogram_every=value)  # type: ignore[arg-type]  # that is the mistake
