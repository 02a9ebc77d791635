"""A Recorder writes what happened in every step, and costs no host read to do so."""

from __future__ import annotations

import gc
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

import stablekit
from stablekit.errors import PluginError
from stablekit.testing import CHECKS, Factory, NanGuard, TinyRun
from stablekit.testing._probes import HostReads, PlainAdam
from stablekit_monitors import Recorder, read_run

if TYPE_CHECKING:
    from collections.abc import Callable

modes = pytest.mark.parametrize("device_mode", [False, True], ids=["host", "device"])


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_it_keeps_the_contract(check: Callable[[Factory], None]) -> None:
    check(Recorder.example)


@modes
def test_a_row_holds_the_norms_and_metrics_of_its_step(tmp_path: Path, device_mode: bool) -> None:
    reader = NormReader()
    run = TinyRun(
        reader,
        "zclip:warmup_steps=3",
        Recorder(tmp_path, chunk=4),
        spike_at=(6,),
        device_mode=device_mode,
        log_every=1,
    )
    metrics, session = [], run.session
    assert session is not None
    for _ in range(10):
        run.go(1)
        metrics.append(session.metrics())
    session.detach()
    log = read_run(tmp_path)
    assert log.names == tuple(dict(run.model.named_parameters()))
    assert log.steps.tolist() == list(range(1, 11))
    np.testing.assert_allclose(log.norms, reader.norms, rtol=1e-6)
    assert log.present.all()
    assert log.ok.all()
    assert log.scalars.keys() == {"lr", *metrics[-1]}
    for key in metrics[-1]:
        expected = [each.get(key, math.nan) for each in metrics]
        np.testing.assert_allclose(log.scalars[key], expected, rtol=1e-6, err_msg=key)
    assert set(log.scalars["lr"]) == {0.01}


class NormReader:
    """Reads the gradients themselves, before anything changes them."""

    name = "norm-reader"

    def __init__(self) -> None:
        self.norms: list[list[float]] = []

    @stablekit.hookimpl
    def observe_gradients(self, step: stablekit.Step) -> None:
        grads = [param.grad for param in step.parameters]
        self.norms.append([float(grad.double().norm()) for grad in grads if grad is not None])


@modes
def test_the_mean_of_the_observed_losses_is_in_the_row(tmp_path: Path, device_mode: bool) -> None:
    p = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([p], lr=0.1)
    session = stablekit.attach(optimizer, Recorder(tmp_path), device_mode=device_mode)
    for losses in ((1.0, 3.0), (5.0,), (), (math.nan,)):
        p.grad = torch.ones(2)
        for loss in losses:
            session.observe(loss=loss)
        optimizer.step()
    session.detach()
    log = read_run(tmp_path)
    np.testing.assert_array_equal(log.scalars["loss"], [2.0, 5.0, math.nan, math.nan])
    assert log.has_loss.tolist() == [True, True, False, True]
    assert log.scalars.keys() == {"lr", "loss", *session.metrics()}


@modes
def test_bad_steps_are_recorded_as_they_were(tmp_path: Path, device_mode: bool) -> None:
    run = TinyRun(
        NanGuard(), Recorder(tmp_path), nan_at=(2,), inf_at=(4,), device_mode=device_mode
    ).go(6)
    assert run.session is not None
    run.session.detach()
    log = read_run(tmp_path)
    assert log.ok.tolist() == [True, True, False, True, False, True]
    assert math.isnan(log.norms[2, 0])
    assert log.norms[4, 0] == math.inf
    assert np.isfinite(log.norms[:, 1:]).all()
    assert math.isnan(log.scalars["grad_norm"][2])
    assert log.scalars["grad_norm"][4] == math.inf
    assert log.scalars["steps_skipped"].tolist()[-1] == 2
    assert log.events == run.session.events
    assert {event.kind for event in log.events} == {"nonfinite", "skip"}


def test_a_dry_run_says_what_would_have_been_skipped(tmp_path: Path) -> None:
    run = TinyRun(NanGuard(), Recorder(tmp_path), nan_at=(2,), dry_run=True).go(3)
    assert run.session is not None
    run.session.detach()
    log = read_run(tmp_path)
    assert log.ok.tolist() == [True, True, False]
    assert log.header["dry_run"] is True


def test_a_missing_gradient_is_not_a_zero_one(tmp_path: Path) -> None:
    run = TinyRun(Recorder(tmp_path), none_at=(1,)).go(3)
    assert run.session is not None
    run.model[-1].bias.requires_grad_(False)
    run.go(1)
    run.session.detach()
    log = read_run(tmp_path)
    absent = np.ones((4, 4), bool)
    absent[1, 1] = absent[3, 3] = False
    np.testing.assert_array_equal(log.present, absent)
    assert log.norms[1, 1] == log.norms[3, 3] == 0


@modes
def test_parameters_that_come_later_have_no_gradient_before(
    tmp_path: Path, device_mode: bool
) -> None:
    first, second = (torch.nn.Parameter(torch.ones(n)) for n in (2, 3))
    optimizer = torch.optim.SGD([("first", first)], lr=0.1)
    session = stablekit.attach(optimizer, Recorder(tmp_path), device_mode=device_mode)
    for step in range(4):
        if step == 2:
            optimizer.add_param_group({"params": [("second", second)]})
        for param in (first, second):
            param.grad = torch.full_like(param, step)
        optimizer.step()
    session.detach()
    log = read_run(tmp_path)
    assert log.names == ("first", "second")
    assert log.header["shapes"] == [[2], [3]]
    assert log.present.tolist() == [[True, False]] * 2 + [[True, True]] * 2
    expected = np.sqrt([[0, 0], [2, 0], [8, 12], [18, 27]])
    np.testing.assert_allclose(log.norms, expected, rtol=1e-6)


def test_it_sees_the_parameters_it_is_restricted_to(tmp_path: Path) -> None:
    run = TinyRun(stablekit.only(Recorder(tmp_path), include="*bias")).go(3)
    assert run.session is not None
    run.session.detach()
    log = read_run(tmp_path)
    assert log.names == ("0.bias", "2.bias")
    assert log.norms.shape == (3, 2)


def test_each_third_step_stands_for_three(tmp_path: Path) -> None:
    run = TinyRun(NanGuard(), Recorder(tmp_path, every=3), nan_at=(3,)).go(8)
    assert run.session is not None
    run.session.detach()
    log = read_run(tmp_path)
    assert (log.steps.tolist(), log.stride.tolist()) == ([3, 6], [3, 3])
    assert [event.step for event in log.events] == [4, 4]


def test_rows_can_be_read_after_the_seconds_that_were_asked_for(tmp_path: Path) -> None:
    run = TinyRun(Recorder(tmp_path / "at once", flush_seconds=0))
    late = TinyRun(Recorder(tmp_path / "late", flush_seconds=1e9, chunk=4))
    for step in range(1, 7):
        run.go(1)
        late.go(1)
        assert read_run(tmp_path / "at once").steps.tolist() == list(range(1, step + 1))
        assert len(read_run(tmp_path / "late")) == step // 4 * 4
    names = sorted(path.name for path in (tmp_path / "at once").iterdir())
    assert names == ["chunk-00000001.npz", "run.json"]


def test_the_header_says_what_was_recorded(tmp_path: Path) -> None:
    run = TinyRun("zclip:z_thresh=3.0", Recorder(tmp_path), dtype=torch.bfloat16).go(1)
    assert run.session is not None
    run.session.detach()
    header = read_run(tmp_path).header
    assert header["format"] == 1
    assert header["stablekit"] == stablekit.__version__
    assert header["shapes"] == [[8, 6], [8], [3, 8], [3]]
    assert header["plugins"]["zclip"].startswith("ZClip(z_thresh=3.0, alpha=0.97,")
    assert header["optimizers"][0].startswith("AdamW(lr=0.01, betas=(0.9, 0.999)")
    assert (header["device_mode"], header["dry_run"], header["processes"]) == (False, False, 1)


def test_device_mode_reads_nothing_between_files(tmp_path: Path) -> None:
    run = TinyRun(Recorder(tmp_path, chunk=100), optimizer=PlainAdam, device_mode=True, log_every=0)
    session = run.session
    assert session is not None
    for _ in range(5):
        run.optimizer.zero_grad()
        torch.autograd.backward(run.loss())
        session.observe(loss=run.loss())
        with HostReads() as reads:
            run.optimizer.step()
        assert reads.seen == []
    assert not list(tmp_path.glob("*.npz"))


def test_steps_on_the_meta_device_are_recorded_as_unknown(tmp_path: Path) -> None:
    run = TinyRun("zclip", Recorder(tmp_path), optimizer=PlainAdam, device="meta", log_every=0).go(
        3
    )
    assert run.session is not None
    run.session.detach()
    log = read_run(tmp_path)
    assert log.steps.tolist() == [1, 2, 3]
    assert np.isnan(log.norms).all()


def test_what_is_left_is_written_when_nobody_holds_the_session(tmp_path: Path) -> None:
    run = TinyRun(Recorder(tmp_path)).go(3)
    assert not list(tmp_path.glob("*.npz"))
    del run
    gc.collect()
    assert len(read_run(tmp_path)) == 3


def test_it_can_be_attached_again_but_not_twice(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path)
    run = TinyRun(recorder).go(2)
    with pytest.raises(PluginError, match="make another Recorder"):
        TinyRun(recorder)
    assert run.session is not None
    run.session.detach()
    with pytest.warns(stablekit.errors.StablekitWarning, match="earlier-1"):
        again = TinyRun(recorder).go(3)
    assert again.session is not None
    again.session.detach()
    assert (len(read_run(tmp_path)), len(read_run(tmp_path / "earlier-1"))) == (3, 2)


def test_it_can_be_named_on_a_command_line(tmp_path: Path) -> None:
    run = TinyRun(f"recorder:path={tmp_path},every=2").go(4)
    assert run.session is not None
    run.session.detach()
    assert read_run(tmp_path).steps.tolist() == [2, 4]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"path": 3}, TypeError, "path must be a string or a path, got 3"),
        ({"path": ""}, ValueError, "path must be a path, got ''"),
        ({"every": 0}, ValueError, "every must be an integer of at least 1, got 0"),
        ({"chunk": 1.5}, TypeError, "chunk must be an integer, got 1.5"),
        ({"flush_seconds": -1}, ValueError, "flush_seconds must be a finite number of at least 0"),
        ({"max_bytes": 0}, ValueError, "max_bytes must be an integer of at least 1, got 0"),
        ({"name": ""}, ValueError, "name must be a string"),
    ],
)
def test_bad_arguments_are_refused(
    arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        Recorder(**{"path": "somewhere", **arguments})


def test_a_limit_that_holds_nothing_is_refused_at_the_first_step(tmp_path: Path) -> None:
    with pytest.raises(PluginError, match="max_bytes must be at least 69632 for 4 tensors, got 99"):
        TinyRun(Recorder(tmp_path, max_bytes=99)).go(1)


def test_a_path_may_come_from_os(tmp_path: Path) -> None:
    assert Recorder(os.fspath(tmp_path)).path == tmp_path
