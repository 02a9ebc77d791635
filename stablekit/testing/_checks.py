"""The checks themselves: each takes a factory and raises AssertionError with what is wrong."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from stablekit import attach, only
from stablekit.errors import AttachError, StateError
from stablekit.hookspecs import Plugin, hooks_of
from stablekit.testing._compare import (
    require,
    require_equal,
    require_finite,
    require_known_hooks,
    require_same,
    tensors_in,
)
from stablekit.testing._probes import FusedAdam, HostReads, PlainAdam, reads_seen
from stablekit.testing._runs import NanGuard, TinyRun

if TYPE_CHECKING:
    from collections.abc import Callable

    from stablekit.testing._runs import Factory

_WRITING = {"transform_gradients", "before_update", "after_update"}
_FAULTS: dict[str, Any] = {"nan_at": (2, 9), "inf_at": (4,), "spike_at": (6,), "none_at": (3, 7)}


def check_plugin(factory: Factory) -> None:
    """Run every check on the plugins that ``factory()`` makes.

    Raises:
        AssertionError: The first broken promise, in words, after the name of its check.
        TypeError: ``factory`` is not callable.
    """
    if not callable(factory):
        raise TypeError(
            f"check_plugin takes a class or a function that makes plugins, got {factory!r}"
        )
    for check in CHECKS:
        try:
            check(factory)
        except AssertionError as error:
            raise AssertionError(f"{check.__name__}: {error}") from error


def check_has_a_name_and_a_summary(factory: Factory) -> None:
    """A plugin has a name, at least one hook, and a docstring whose first line sums it up."""
    plugin = factory()
    require(isinstance(plugin, Plugin) and bool(plugin.name), "a plugin needs a name")
    require_known_hooks(plugin)
    require(bool(hooks_of(plugin)), "no method is marked with stablekit.hookimpl")
    require(bool((type(plugin).__doc__ or "").strip()), "the class has no docstring")


def check_reads_are_announced(factory: Factory) -> None:
    """What a plugin reads beyond norms and loss is in its ``needs``."""
    plugin = factory()
    with reads_seen() as seen:
        TinyRun(plugin, spike_at=(6,)).go(8)
    missing = sorted(seen - set(getattr(plugin, "needs", ())))
    require(not missing, f"{plugin.name} uses {', '.join(missing)}: name it in needs = (...)")


def check_detach_leaves_no_trace(factory: Factory) -> None:
    """After ``detach()`` the optimizer holds exactly what it held before."""
    run = TinyRun(optimizer=lambda params: torch.optim.AdamW(params, lr=0.01))
    before = dict(vars(run.optimizer))
    with attach(run.optimizer, factory(), model=run.model):
        run.go(3)
    require(vars(run.optimizer).keys() == before.keys(), "an attribute was left behind")
    left = [name for name, value in vars(run.optimizer).items() if "hooks" in name and value]
    require(not left, f"hooks were left behind in {left}")


def check_dry_run_changes_nothing(factory: Factory) -> None:
    """With ``dry_run=True`` training is bit-identical to training without the plugin."""
    bare = TinyRun(spike_at=(6,)).go(12)
    watched = TinyRun(factory(), spike_at=(6,), dry_run=True).go(12)
    require_same(watched.weights(), bare.weights(), "a dry run changed the weights")


def check_observer_changes_nothing(factory: Factory) -> None:
    """A plugin that has no writing hook and announces no loss leaves training bit-identical."""
    plugin = factory()
    if _WRITING & set(hooks_of(plugin)) or "loss" in getattr(plugin, "needs", ()):
        return
    bare = TinyRun(spike_at=(6,)).go(12)
    watched = TinyRun(factory(), spike_at=(6,)).go(12)
    require_same(watched.weights(), bare.weights(), "an observer changed the weights")


def check_missing_gradients_are_tolerated(factory: Factory) -> None:
    """Parameters without gradient, in some steps or in all, disturb nothing."""
    run = TinyRun(factory(), none_at=(0, 1, 4)).go(8)
    run.optimizer.zero_grad()
    run.optimizer.step()
    require_finite(run.weights(), "a missing gradient made a weight non-finite")


def check_faults_leave_all_finite(factory: Factory) -> None:
    """Behind a guard, NaN and Inf gradients reach neither weights nor any state."""
    run = TinyRun(NanGuard(), factory(), **_FAULTS).go(14)
    require_finite(run.weights(), "a fault reached the weights")
    require_finite(tensors_in(run.state()), "a fault reached the optimizer's state")
    require_finite(
        tensors_in(run.plugin_state(), nan_only=True), "a fault reached the plugin's state"
    )


def check_unguarded_faults_stay_out_of_state(factory: Factory) -> None:
    """Even without a guard no statistic becomes NaN."""
    run = TinyRun(factory(), optimizer=lambda p: torch.optim.AdamW(p, lr=0.0), **_FAULTS).go(14)
    require_finite(
        tensors_in(run.plugin_state(), nan_only=True), "a fault reached the plugin's state"
    )


def check_skipped_step_moves_no_statistic(factory: Factory) -> None:
    """In a skipped step the state of a plugin that does not decide about skipping stands still."""
    plugin = factory()
    if {"observe_gradients", "on_skip", "on_event", "on_step_end"} & set(hooks_of(plugin)):
        return
    run = TinyRun(NanGuard(), plugin, nan_at=(5,)).go(5)
    before = run.plugin_state().get(plugin.name)
    run.go(1)
    after = run.plugin_state().get(plugin.name)
    require_equal(after, before, f"{plugin.name} moved in a skipped step")


def check_state_survives_a_checkpoint(factory: Factory) -> None:
    """A run resumed from a saved checkpoint is bit-identical to one that went on."""
    straight = TinyRun(factory(), spike_at=(6,), none_at=(3,)).go(9)
    buffer = io.BytesIO()
    torch.save([straight.optimizer.state_dict(), straight.model.state_dict()], buffer)
    straight.go(6)
    buffer.seek(0)
    optimizer, model = torch.load(buffer, weights_only=True)
    resumed = TinyRun(factory(), spike_at=(6,), none_at=(3,))
    resumed.model.load_state_dict(model)
    resumed.optimizer.load_state_dict(optimizer)
    resumed.step = 9
    resumed.go(6)
    require_same(
        resumed.weights(),
        straight.weights(),
        "a resumed run went another way: what changes must be in state_dict",
    )
    require_equal(resumed.plugin_state(), straight.plugin_state(), "state differs after resuming")


def check_bad_state_is_refused(factory: Factory) -> None:
    """A state that is not one raises StateError and changes nothing."""
    run = TinyRun(factory()).go(4)
    assert run.session is not None
    good = run.session.state_dict()
    for name, entry in good["plugins"].items():
        bad = {**good, "plugins": {name: {**entry, "state": {"no such field": 1}}}}
        try:
            run.session.load_state_dict(bad)
        except StateError:
            require_equal(run.session.state_dict(), good, "a refused state changed something")
        else:
            raise AssertionError(f"{name} took a state with an unknown field")


def check_closure_counts_once(factory: Factory) -> None:
    """Statistics advance once in a step whose closure is evaluated several times."""
    if "observe_gradients" in hooks_of(factory()):
        return

    class Twice(torch.optim.AdamW):
        def step(self, closure: Callable[[], Any]) -> Any:  # type: ignore[override]  # noqa: ANN401 - as torch
            with torch.enable_grad():
                closure()
            return super().step(closure)

    def train(make: Callable[[Any], torch.optim.Optimizer]) -> TinyRun:
        run = TinyRun(factory(), optimizer=make)

        def closure() -> Tensor:
            run.optimizer.zero_grad()
            loss = run.loss()
            loss.backward()
            return loss

        for _ in range(4):
            run.optimizer.step(closure)  # type: ignore[arg-type]  # a tensor, as torch takes it
            run.step += 1
        return run

    once = train(lambda params: torch.optim.AdamW(params, lr=0.0))
    twice = train(lambda params: Twice(params, lr=0.0))
    require_equal(
        twice.plugin_state(), once.plugin_state(), "a second evaluation moved a statistic"
    )


def check_half_precision_works(factory: Factory) -> None:
    """bf16 parameters and gradients are taken as they are."""
    run = TinyRun(NanGuard(), factory(), dtype=torch.bfloat16, spike_at=(4,)).go(8)
    require_finite(run.weights(), "bf16 weights became non-finite")


def check_restriction_is_kept(factory: Factory) -> None:
    """Under ``only(...)`` other parameters train as if the plugin were not there."""
    bare = TinyRun(spike_at=(0,)).go(1)
    if "loss" in getattr(plugin := factory(), "needs", ()):
        try:
            TinyRun(only(plugin, include="0.*"))
        except AttachError:
            return
    limited = TinyRun(only(factory(), include="0.*"), spike_at=(0,)).go(1)
    require_same(
        limited.weights()[2:], bare.weights()[2:], "a parameter outside only(...) was changed"
    )


def check_device_mode_decides_alike(factory: Factory) -> None:
    """Device mode gives the weights and the state of host mode to 1e-6."""

    def fused(params: Any) -> torch.optim.Optimizer:  # noqa: ANN401 - as torch
        return torch.optim.AdamW(params, lr=0.01, fused=True)

    runs = [
        TinyRun(
            NanGuard(), factory(), optimizer=fused, spike_at=(6,), nan_at=(8,), device_mode=mode
        ).go(12)
        for mode in (False, True)
    ]
    for ours, theirs in zip(*(run.weights() for run in runs), strict=True):
        close = torch.allclose(ours, theirs, rtol=1e-5, atol=1e-6)
        require(close, "device mode and host mode gave different weights")


def check_device_mode_reads_no_host_value(factory: Factory) -> None:
    """Between two log points a device-mode step never waits for a value on the host."""
    if "observe_gradients" in hooks_of(factory()):
        optimizer: Callable[[Any], torch.optim.Optimizer] = FusedAdam
    else:
        optimizer = PlainAdam
    run = TinyRun(factory(), optimizer=optimizer, device_mode=True, log_every=0)
    run.go(2)
    for _ in range(3):
        run.optimizer.zero_grad()
        run.loss().backward()
        with HostReads() as reads:
            run.optimizer.step()
        require(
            not reads.seen,
            f"{len(reads.seen)} host reads in a step, at {', '.join(dict.fromkeys(reads.seen))};"
            " use step.scalar, flag or defer",
        )


CHECKS: tuple[Callable[[Factory], None], ...] = (
    check_has_a_name_and_a_summary,
    check_reads_are_announced,
    check_detach_leaves_no_trace,
    check_dry_run_changes_nothing,
    check_observer_changes_nothing,
    check_missing_gradients_are_tolerated,
    check_faults_leave_all_finite,
    check_unguarded_faults_stay_out_of_state,
    check_skipped_step_moves_no_statistic,
    check_state_survives_a_checkpoint,
    check_bad_state_is_refused,
    check_closure_counts_once,
    check_half_precision_works,
    check_restriction_is_kept,
    check_device_mode_decides_alike,
    check_device_mode_reads_no_host_value,
)
"""Every check, in the order in which a new plugin is best made to pass them."""
