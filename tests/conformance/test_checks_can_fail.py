"""Every check of the contract finds the plugin that breaks it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

import stablekit
from stablekit.errors import PluginError
from stablekit.testing import CHECKS, check_plugin
from stablekit.testing._checks import (
    check_device_mode_reads_no_host_value,
    check_reads_are_announced,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor

    from stablekit import Plugin, Session, Step


class NoDocstring:
    name = "no-docstring"

    @stablekit.hookimpl
    def observe_gradients(self, step: Step) -> None:
        """Do nothing."""


class ReadsUnannounced:
    """Look at single elements, but say that norms are enough."""

    name = "reads-unannounced"

    @stablekit.hookimpl
    def transform_gradients(self, step: Step) -> None:
        step.gradients.edit().touched(())


class LeavesAttribute:
    """Leave something on the optimizer."""

    name = "leaves-attribute"

    @stablekit.hookimpl
    def on_attach(self, session: Session) -> None:
        session.optimizers[0].left_behind = True  # type: ignore[attr-defined]  # the offence


class WritesInObserver:
    """Write into gradients while only observing."""

    name = "writes-in-observer"

    @stablekit.hookimpl
    def observe_gradients(self, step: Step) -> None:
        for param in step.parameters:
            if param.grad is not None:
                param.grad.mul_(0.5)


class NeedsEveryGradient:
    """Divide by the number of missing gradients."""

    name = "needs-every-gradient"

    @stablekit.hookimpl
    def transform_gradients(self, step: Step) -> None:
        if not bool(step.gradients.present.all()):
            raise RuntimeError("a gradient is missing")


class RemembersNorm:
    """Keep the last norm, whatever it is, as a statistic."""

    name = "remembers-norm"

    def __init__(self) -> None:
        self._norm = torch.zeros(())

    @stablekit.hookimpl
    def transform_gradients(self, step: Step) -> None:
        self._norm = step.gradients.norm()

    def state_dict(self) -> dict[str, Any]:
        return {"norm": float(self._norm)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._norm = torch.tensor(state["norm"])


class CountsInSkippedSteps:
    """Count steps in a hook that fires for skipped steps too, through a closed door."""

    name = "counts-in-skipped-steps"

    def __init__(self) -> None:
        self._session: Session | None = None

    @stablekit.hookimpl
    def on_attach(self, session: Session) -> None:
        self._session = session

    def state_dict(self) -> dict[str, Any]:
        return {"seen": self._session.number if self._session else 0}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Accept anything."""


class ForgetsItsState:
    """Scale by something learned that is not saved."""

    name = "forgets-its-state"

    def __init__(self) -> None:
        self._steps = 0

    @stablekit.hookimpl
    def transform_gradients(self, step: Step) -> None:
        self._steps += 1
        step.gradients.scale_(torch.tensor(1.0 / self._steps))


class LearnsAtEveryEvaluation:
    """Count evaluations, not steps."""

    name = "learns-at-every-evaluation"

    def __init__(self) -> None:
        self._count = 0

    @stablekit.hookimpl
    def transform_gradients(self, step: Step) -> None:
        self._count += 1

    def state_dict(self) -> dict[str, Any]:
        return {"count": self._count}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._count = state["count"]


class OverflowsInHalf:
    """Blow up gradients of half precision."""

    name = "overflows-in-half"

    @stablekit.hookimpl
    def transform_gradients(self, step: Step) -> None:
        if any(param.dtype is torch.bfloat16 for param in step.parameters):
            step.gradients.scale_(torch.tensor(float("inf")))


class IgnoresItsRestriction:
    """Reach for all parameters of the session."""

    name = "ignores-its-restriction"

    @stablekit.hookimpl
    def before_update(self, step: Step) -> None:
        for group in step.session.optimizers[0].param_groups:
            for param in group["params"]:
                param.grad.zero_()


class KnowsTheMode:
    """Do something else in device mode."""

    name = "knows-the-mode"

    @stablekit.hookimpl
    def transform_gradients(self, step: Step) -> None:
        step.gradients.scale_(torch.tensor(1.0 if step.session.host else 0.01))


class ReadsOnTheHost:
    """Branch on a value."""

    name = "reads-on-the-host"

    @stablekit.hookimpl
    def transform_gradients(self, step: Step) -> None:
        if step.gradients.norm().item() > 1e9:
            raise RuntimeError("never")


class TakesAnyState:
    """Accept every state without looking."""

    name = "takes-any-state"

    @stablekit.hookimpl
    def on_detach(self, session: Session) -> None:
        """Do nothing."""

    def state_dict(self) -> dict[str, Any]:
        return {"no such field": 1}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Accept anything."""


class MovesWeightsInDryRun:
    """Change parameters at the end of a step, dry run or not."""

    name = "moves-weights-in-dry-run"

    @stablekit.hookimpl
    def on_step_end(self, step: Step) -> None:
        step.parameters[0].add_(1.0)


class FeedsNanOn:
    """Turn the weights into NaN after a fault."""

    name = "feeds-nan-on"

    @stablekit.hookimpl
    def on_skip(self, step: Step) -> None:
        step.parameters[0].mul_(float("nan"))


BROKEN: dict[str, Callable[[], Plugin]] = {
    "check_has_a_name_and_a_summary": NoDocstring,
    "check_reads_are_announced": ReadsUnannounced,
    "check_detach_leaves_no_trace": LeavesAttribute,
    "check_dry_run_changes_nothing": MovesWeightsInDryRun,
    "check_observer_changes_nothing": WritesInObserver,
    "check_missing_gradients_are_tolerated": NeedsEveryGradient,
    "check_faults_leave_all_finite": FeedsNanOn,
    "check_unguarded_faults_stay_out_of_state": RemembersNorm,
    "check_skipped_step_moves_no_statistic": CountsInSkippedSteps,
    "check_state_survives_a_checkpoint": ForgetsItsState,
    "check_bad_state_is_refused": TakesAnyState,
    "check_closure_counts_once": LearnsAtEveryEvaluation,
    "check_half_precision_works": OverflowsInHalf,
    "check_restriction_is_kept": IgnoresItsRestriction,
    "check_device_mode_decides_alike": KnowsTheMode,
    "check_device_mode_reads_no_host_value": ReadsOnTheHost,
}


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_the_check_finds_a_plugin_that_breaks_it(check: Callable[[Any], None]) -> None:
    with pytest.raises((AssertionError, PluginError)):
        check(BROKEN[check.__name__])


@pytest.mark.parametrize(
    ("need", "read"),
    [
        ("unit_norms", lambda step: step.gradients.unit_norms()),
        ("weight_unit_norms", lambda step: step.gradients.weight_unit_norms()),
        ("amaxes", lambda step: step.gradients.amaxes()),
        ("elements", lambda step: step.gradients.edit().touched(())),
        ("parameters", lambda step: step.norms_of(step.parameters)),
    ],
)
def test_every_read_must_be_announced_by_its_name(
    need: str, read: Callable[[Step], object]
) -> None:
    class Reader:
        """Make one read."""

        name = "reader"

        def __init__(self, *needs: str) -> None:
            self.needs = needs

        @stablekit.hookimpl
        def transform_gradients(self, step: Step) -> None:
            read(step)

    check_reads_are_announced(lambda: Reader(need))
    with pytest.raises(AssertionError, match=f"reader uses {need}: name it in needs"):
        check_reads_are_announced(Reader)


def test_a_misspelt_hook_is_told_with_the_nearest_one() -> None:
    class Misspelt:
        """Mean to look at gradients."""

        name = "misspelt"

        @stablekit.hookimpl
        def observe_gradient(self, step: Step) -> None:
            """Never fire."""

    with pytest.raises(AssertionError, match="observe_gradient is not a hook, did you mean obs"):
        check_plugin(Misspelt)


def test_a_host_read_is_told_with_file_and_line_of_the_plugin() -> None:
    class Branches:
        """Read a value with the help of a function."""

        name = "branches"

        @stablekit.hookimpl
        def on_step_end(self, step: Step) -> None:
            """Read twice."""
            for _ in range(2):
                _is_large(step.gradients.raw_norm())

    line = _is_large.__code__.co_firstlineno + 1
    with pytest.raises(AssertionError, match=rf"2 host reads .* at {__file__}:{line};"):
        check_device_mode_reads_no_host_value(Branches)


def _is_large(norm: Tensor) -> bool:
    return bool(norm > 1.0)
