"""Attaching changes nothing but the hooks, and detaching leaves no trace."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch

import stablekit
from stablekit.errors import AttachError
from tests.core.oracles import (
    Diary,
    backward,
    copies,
    difference,
    equal,
    parameters_after,
    picture,
    small_model,
)


@pytest.mark.parametrize("fused", [False, True])
def test_detach_leaves_no_trace(fused: bool) -> None:
    model = small_model()
    optimizer = torch.optim.AdamW(model.parameters(), fused=fused)
    keys, hooks = list(vars(optimizer)), _hooks(optimizer)
    session = stablekit.attach(optimizer, "nonfinite-guard", "zclip", model=model)
    backward(model)
    optimizer.step()
    before = picture(optimizer)
    session.detach()
    session.detach()
    assert list(vars(optimizer)) == keys
    assert _hooks(optimizer) == hooks == {name: 0 for name in hooks}
    assert difference(before, picture(optimizer)) == ""
    assert not model._forward_hooks
    assert "stablekit" not in optimizer.state_dict()
    with pytest.raises(AttachError, match="no session"):
        stablekit.session(optimizer)
    for step in range(2):
        backward(model, step)
        optimizer.step()
    assert session.number == 1


def _hooks(optimizer: torch.optim.Optimizer) -> dict[str, int]:
    return {name: len(value) for name, value in vars(optimizer).items() if name.endswith("_hooks")}


def test_after_detach_another_session_may_be_attached() -> None:
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with stablekit.attach(optimizer, "zclip"):
        backward(model)
        optimizer.step()
    with stablekit.attach(optimizer, "global-norm") as second:
        backward(model)
        optimizer.step()
    assert second.updates == 1


def test_leaving_the_context_detaches_also_after_an_error() -> None:
    optimizer = torch.optim.SGD(small_model().parameters(), lr=0.1)
    with pytest.raises(RuntimeError, match="mine"), stablekit.attach(optimizer, "zclip"):
        raise RuntimeError("mine")
    assert not optimizer._optimizer_step_pre_hooks


def test_second_session_on_one_optimizer_is_refused_and_the_first_works_on() -> None:
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    session = stablekit.attach(optimizer, "zclip")
    with pytest.raises(AttachError, match="has a session already, with zclip"):
        stablekit.attach(optimizer, "global-norm")
    backward(model)
    optimizer.step()
    assert session.updates == 1
    assert stablekit.session(optimizer) is session


def test_one_optimizer_listed_twice_is_refused() -> None:
    optimizer = torch.optim.SGD(small_model().parameters(), lr=0.1)
    with pytest.raises(AttachError, match="twice"):
        stablekit.attach([optimizer, optimizer], "zclip")
    assert not optimizer._optimizer_step_pre_hooks


def test_paused_session_lets_steps_pass_unseen() -> None:
    model, twin = small_model(), small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    plain = torch.optim.SGD(twin.parameters(), lr=0.1)
    diary = Diary()
    session = stablekit.attach(optimizer, "global-norm:max_norm=0.01", diary)
    with session.paused():
        with session.paused():
            pass
        assert equal(parameters_after(3, optimizer, model), parameters_after(3, plain, twin))
    assert (session.number, diary.pages) == (0, ["on_attach"])
    backward(model)
    optimizer.step()
    assert session.number == 1


def test_two_sessions_do_not_know_each_other() -> None:
    models = [small_model(), small_model()]
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in models]
    sessions = [stablekit.attach(o, "nonfinite-guard", "zclip") for o in optimizers]
    for step in range(3):
        backward(models[0], step)
        optimizers[0].step()
    backward(models[1])
    optimizers[1].step()
    assert [session.number for session in sessions] == [3, 1]
    assert sessions[0].plugins["zclip"] is not sessions[1].plugins["zclip"]


def test_copy_of_an_attached_optimizer_has_no_session() -> None:
    model = small_model()
    optimizer = torch.optim.AdamW(model.parameters())
    session = stablekit.attach(optimizer, "nonfinite-guard", "zclip", model=model)
    parameters_after(2, optimizer, model)
    for twin in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert _hooks(twin) == {name: 0 for name in _hooks(twin)}
        with pytest.raises(AttachError):
            stablekit.session(twin)
        before = copies(twin.param_groups[0]["params"])
        for param in twin.param_groups[0]["params"]:
            param.grad = torch.ones_like(param)
        twin.step()
        assert not equal(before, copies(twin.param_groups[0]["params"]))
    assert session.number == 2
    parameters_after(1, optimizer, model)
    assert session.number == 3


def test_state_dict_of_an_attached_optimizer_loads_where_nothing_is_attached() -> None:
    model, twin = small_model(), small_model()
    optimizer = stablekit.wrap(torch.optim.AdamW(model.parameters()), "nonfinite-guard", "zclip")
    parameters_after(2, optimizer, model)
    saved = io.BytesIO()
    torch.save(optimizer.state_dict(), saved)
    saved.seek(0)
    state = torch.load(saved, weights_only=True)
    assert set(state) == {"state", "param_groups", "stablekit"}
    plain = torch.optim.AdamW(twin.parameters())
    plain.load_state_dict(state)
    twin.load_state_dict(model.state_dict())
    optimizer_alone = stablekit.session(optimizer)
    optimizer_alone.detach()
    assert equal(parameters_after(2, optimizer, model), parameters_after(2, plain, twin))


def test_observer_alone_changes_no_bit_of_training() -> None:
    model, twin = small_model(), small_model()
    optimizer = stablekit.wrap(torch.optim.AdamW(model.parameters()), Diary(), log_every=1)
    plain = torch.optim.AdamW(twin.parameters())
    assert equal(parameters_after(5, optimizer, model), parameters_after(5, plain, twin))
