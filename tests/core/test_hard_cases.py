"""Cases in which something once went wrong without a word."""

from __future__ import annotations

import copy
import gc
import math
import weakref
from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor, nn

import stablekit
from stablekit.errors import (
    AttachError,
    HookError,
    NoEffectWarning,
    NonFiniteError,
    PluginError,
    StateError,
    StateWarning,
)
from stablekit.statistics import window_quantile

if TYPE_CHECKING:
    from collections.abc import Mapping

    from stablekit import Step


def parameter(*values: float) -> nn.Parameter:
    return nn.Parameter(torch.tensor(values))


class Peaks:
    """Keep the largest elements seen after the update."""

    name = "peaks"

    def __init__(self) -> None:
        self.seen = torch.zeros(0)

    @stablekit.hookimpl
    def on_step_end(self, step: Step) -> None:
        self.seen = step.gradients.amaxes()


@pytest.mark.parametrize("fused", [True, False])
def test_reads_after_the_update_see_what_the_kernel_wrote(fused: bool) -> None:
    param, peaks = parameter(0.0, 0.0), Peaks()
    optimizer = torch.optim.SGD([param], lr=1.0, fused=fused)
    stablekit.attach(optimizer, "global-norm", peaks)
    param.grad = torch.tensor([3.0, 4.0])
    optimizer.step()
    torch.testing.assert_close(peaks.seen, param.grad.abs().max().view(1))


def test_a_scale_after_an_edit_is_counted_once_by_fused_optimizers() -> None:
    param = parameter(0.0, 0.0)
    optimizer = torch.optim.SGD([param], lr=1.0, fused=True)
    last = stablekit.create("global-norm", max_norm=0.25, norm_type=math.inf)
    session = stablekit.attach(optimizer, "clip-value:limit=1.0", last)
    param.grad = torch.tensor([3.0, 4.0])
    optimizer.step()
    assert session.metrics()["grad_norm_clipped"] == pytest.approx(param.grad.norm().item())


def test_a_parameter_of_two_optimizers_is_refused() -> None:
    param = parameter(0.0)
    both = [torch.optim.SGD([param], lr=1.0) for _ in range(2)]
    with pytest.raises(AttachError, match="held twice"):
        stablekit.attach(both, "global-norm")


def test_a_parameter_that_moves_to_another_group_is_seen_there() -> None:
    first, second = parameter(0.0, 0.0), parameter(0.0, 0.0)
    optimizer = torch.optim.SGD([{"params": [first]}, {"params": [second]}], lr=1.0)
    stablekit.attach(optimizer, stablekit.only("global-norm", groups=1))
    optimizer.param_groups[0]["params"], optimizer.param_groups[1]["params"] = [], [first, second]
    for param in (first, second):
        param.grad = torch.tensor([3.0, 4.0])
    optimizer.step()
    assert first.grad is not None
    torch.testing.assert_close(first.grad.norm(), torch.tensor(0.5**0.5))


def grad_norm_of_vectors() -> float:
    params = [nn.Parameter(torch.ones(n, device="cpu")) for n in (4, 4, 4, 4, 6)]
    optimizer = torch.optim.SGD(params, lr=0.1)
    session = stablekit.attach(optimizer, "global-norm")
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    return session.metrics()["grad_norm"]


def test_an_ambient_default_device_does_not_spoil_later_norms() -> None:
    with torch.device("meta"):
        grad_norm_of_vectors()
    assert grad_norm_of_vectors() == pytest.approx(22**0.5)


def test_detaching_within_a_step_gives_back_what_was_lent() -> None:
    class Leaves:
        name = "leaves"

        @stablekit.hookimpl
        def transform_gradients(self, step: Step) -> None:
            step.gradients.scale_(0.5)
            step.session.detach()

    param = parameter(1.0, 1.0)
    optimizer = torch.optim.AdamW([param], lr=0.1, fused=True)
    stablekit.attach(optimizer, Leaves())
    param.grad = torch.tensor([3.0, 4.0])
    optimizer.step()
    assert "grad_scale" not in vars(optimizer)
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks


def test_what_waits_for_the_host_is_dropped_when_a_checkpoint_is_loaded() -> None:
    param = parameter(1.0, 1.0)
    optimizer = torch.optim.AdamW([param], lr=0.1, fused=True)
    session = stablekit.attach(optimizer, "nonfinite-guard", device_mode=True, log_every=10)
    param.grad = torch.ones(2)
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    param.grad = torch.tensor([math.nan, 1.0])
    optimizer.step()
    optimizer.load_state_dict(saved)
    session.metrics()
    assert (session.updates, session.skipped, session.events) == (1, 0, [])


def test_a_refused_state_leaves_plugins_that_load_in_place_as_they_were() -> None:
    class InPlace:
        name = "in-place"

        def __init__(self) -> None:
            self.buffer = torch.zeros(2)

        def state_dict(self) -> dict[str, Tensor]:
            return {"buffer": self.buffer}

        def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
            self.buffer.copy_(state["buffer"])

    plugin = InPlace()
    session = stablekit.attach(torch.optim.SGD([parameter(0.0)], lr=1.0), plugin, "zclip")
    state = copy.deepcopy(session.state_dict())
    state["plugins"]["in-place"]["state"]["buffer"] = torch.full((2,), 7.0)
    state["plugins"]["zclip"]["state"]["mean"] = "no number"
    with pytest.raises(StateError):
        session.load_state_dict(state)
    assert plugin.buffer.tolist() == [0.0, 0.0]


def test_losses_of_paused_steps_are_not_counted_and_are_copied() -> None:
    param = parameter(1.0)
    optimizer = torch.optim.SGD([param], lr=0.1)
    session = stablekit.attach(optimizer, "zclip")
    loss = torch.tensor(100.0)
    with session.paused():
        session.observe(loss=loss)
    for value in (1.0, 3.0):
        session.observe(loss=loss.fill_(value))
    param.grad = torch.ones(1)
    optimizer.step()
    assert session.metrics()["loss"] == 2.0


def test_a_window_quantile_is_exact_where_neighbours_are_far_apart() -> None:
    values = torch.ones(1000)
    values[900:] = 1e6
    expected = torch.quantile(values.double(), 0.9).item()
    ours = window_quantile(values[None], torch.tensor([1000.0]), 0.9).item()
    assert ours == pytest.approx(expected, rel=1e-6)


def test_an_attach_that_fails_leaves_the_optimizer_free() -> None:
    class Raises:
        name = "raises"

        @stablekit.hookimpl
        def on_attach(self, session: stablekit.Session) -> None:
            raise RuntimeError("no")

    optimizer = torch.optim.SGD([parameter(1.0)], lr=0.1)
    nowhere = stablekit.only("global-norm", include="nowhere")
    with pytest.warns(NoEffectWarning), pytest.raises(ValueError, match="no parameter is selected"):
        stablekit.attach(optimizer, nowhere)
    with pytest.raises(PluginError):
        stablekit.attach(optimizer, Raises())
    assert not optimizer._optimizer_step_pre_hooks
    stablekit.attach(optimizer, "global-norm")


def test_detach_succeeds_although_the_guard_gives_up_in_it() -> None:
    param = parameter(1.0, 1.0)
    optimizer = torch.optim.AdamW([param], lr=0.1, fused=True)
    guard = "nonfinite-guard:max_consecutive=1"
    session = stablekit.attach(optimizer, guard, device_mode=True, log_every=0)
    for _ in range(2):
        param.grad = torch.tensor([math.nan, 1.0])
        optimizer.step()
    with pytest.raises(NonFiniteError):
        session.detach()
    assert not optimizer._optimizer_step_pre_hooks


def test_a_dry_run_never_stops_a_run() -> None:
    param = parameter(1.0, 1.0)
    optimizer = torch.optim.SGD([param], lr=0.0)
    session = stablekit.attach(optimizer, "nonfinite-guard:max_consecutive=1", dry_run=True)
    for _ in range(3):
        param.grad = torch.tensor([math.nan, 1.0])
        optimizer.step()
    assert session.skipped == 3


def test_a_batch_is_let_go_after_its_step() -> None:
    param = parameter(1.0)
    optimizer = torch.optim.SGD([param], lr=0.1)
    session = stablekit.attach(optimizer, "zclip")
    batch = torch.ones(3)
    gone = weakref.ref(batch)
    session.observe(batch=batch)
    param.grad = torch.ones(1)
    optimizer.step()
    del batch
    gc.collect()
    assert gone() is None


def test_a_hook_without_its_mark_is_refused() -> None:
    class Unmarked:
        name = "unmarked"

        def transform_gradients(self, step: Step) -> None:
            """Never called."""

    with pytest.raises(HookError, match=r"without @stablekit\.hookimpl"):
        stablekit.attach(torch.optim.SGD([parameter(1.0)], lr=0.1), Unmarked())


def test_a_model_of_other_parameters_is_noticed() -> None:
    optimizer = torch.optim.SGD([parameter(1.0)], lr=0.1)
    with pytest.warns(NoEffectWarning, match="is it the model"):
        stablekit.attach(optimizer, "zclip", model=nn.Linear(1, 1))


def test_state_of_unknown_parameters_is_reported() -> None:
    def session(prefix: str) -> stablekit.Session:
        model = nn.ModuleDict({prefix: nn.Linear(2, 2)})
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        attached = stablekit.attach(optimizer, "adagc", model=model)
        for param in model.parameters():
            param.grad = torch.ones_like(param)
        optimizer.step()
        return attached

    with pytest.warns(StateWarning, match="unknown here"):
        session("b").load_state_dict(session("a").state_dict())
