"""The ways onto a loss function and off it again, whoever comes and goes in which order."""

from __future__ import annotations

import copy
import pickle
import sys
from itertools import permutations
from types import ModuleType
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn

import stablekit
from stablekit.errors import AttachError
from stablekit_logits import SoftCap, ZLoss
from stablekit_logits._door import LossCall, LossDoor
from tests.logits.models import Speaker, causal_loss, gradients, words

if TYPE_CHECKING:
    from collections.abc import Callable

    from stablekit import Session, Step


def rate(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.01)


class Scale:
    """Multiplies logits and adds to the loss, so that the order shows."""

    needs = ("model", "loss")

    def __init__(self, name: str, factor: float, term: float) -> None:
        self.name, self.factor, self.term = name, factor, term
        self.door = LossDoor(name, around=self._around)

    @stablekit.hookimpl
    def on_attach(self, session: Session) -> None:
        self.door.open(session)

    @stablekit.hookimpl
    def on_detach(self, session: Session) -> None:
        self.door.close(session)

    def _around(self, call: LossCall) -> Tensor:
        return call.loss(logits=(call.logits + self.term) * self.factor)


class Drop:
    """Leaves out the words above 8."""

    name, needs = "drop", ("model", "loss")

    def __init__(self) -> None:
        self.door = LossDoor(self.name, "share", around=self._around)

    @stablekit.hookimpl
    def on_attach(self, session: Session) -> None:
        self.door.open(session)

    @stablekit.hookimpl
    def on_step_end(self, step: Step) -> None:
        self.door.tally.record(step)

    def _around(self, call: LossCall) -> Tensor:
        targets = call.targets()
        dropped = targets > 8
        self.door.tally.add((targets != call.ignore_index).sum(), dropped.sum())
        return call.loss(targets=targets.masked_fill(dropped, call.ignore_index))


def test_the_first_listed_sees_the_raw_logits_first() -> None:
    model, ids = Speaker(), words()
    logits = model(ids)
    expected = causal_loss(((logits + 1) * 2 + 3) * 4, ids)
    plugins = [Scale("first", 2.0, 1.0), Scale("second", 4.0, 3.0)]
    with stablekit.attach(rate(model), *plugins, model=model):
        torch.testing.assert_close(model(ids, ids), expected)


@pytest.mark.parametrize("order", [*permutations(range(3))])
@pytest.mark.parametrize("own", [False, True])
def test_they_leave_in_any_order_without_a_trace(order: tuple[int, ...], own: bool) -> None:
    model, ids = Speaker(), words()
    if own:
        model.loss_function = causal_loss
    before, keys = dict(model.__dict__), list(model.state_dict())
    plain = model(ids, ids)
    plugins = [ZLoss(0.1, name=f"z{place}") for place in range(3)]
    sessions = [stablekit.attach(rate(model), plugin, model=model) for plugin in plugins]
    for place, which in enumerate(order):
        term = model(ids, ids) - plain
        torch.testing.assert_close(term / (3 - place), (model(ids, ids) - plain) / (3 - place))
        assert float(term.detach()) > 0
        sessions[which].detach()
    assert torch.equal(model(ids, ids), plain)
    assert model.__dict__ == before
    assert list(model.state_dict()) == keys
    assert not any(module._forward_hooks for module in model.modules())


def test_a_loss_module_of_the_model_stays_where_it_is() -> None:
    class Judge(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.temperature = nn.Parameter(torch.ones(()))

        def forward(
            self, logits: Tensor, labels: Tensor, shift_labels: Tensor | None = None
        ) -> Any:  # noqa: ANN401
            return causal_loss(logits / self.temperature, labels, shift_labels=shift_labels)

    model, ids = Speaker(), words()
    judge = Judge()
    model._loss_function = judge
    keys = list(model.state_dict())
    with stablekit.attach(rate(model), ZLoss(0.1), model=model):
        model(ids, ids).backward()
        assert list(model.state_dict()) == keys
    assert model.loss_function is judge
    assert list(model.state_dict()) == keys
    assert "_loss_function" not in vars(model)
    assert judge.temperature.grad is not None


def test_a_loss_function_set_meanwhile_is_left_alone() -> None:
    model = Speaker()
    session = stablekit.attach(rate(model), ZLoss(0.1), model=model)
    model.loss_function = theirs = lambda logits, labels: logits.sum()
    session.detach()
    assert model.loss_function is theirs


@pytest.mark.parametrize("shifted", [False, True])
def test_rows_are_left_out_by_the_target_that_is_ignored(shifted: bool) -> None:
    model, ids = Speaker(), words()
    targets = nn.functional.pad(ids[:, 1:], (0, 1), value=-100)
    kept = torch.where(targets > 8, -100, targets)
    expected = causal_loss(model(ids), ids, shift_labels=kept)
    optimizer = rate(model)
    session = stablekit.attach(optimizer, Drop(), model=model)
    options: dict[str, Any] = {"shift_labels": targets} if shifted else {}
    found = model(ids, ids, **options)
    assert torch.equal(found, expected)
    found.backward()
    optimizer.step()
    share = int((targets > 8).sum()) / int((targets != -100).sum())
    assert session.metrics()["drop/share"] == pytest.approx(share)


def test_copies_of_the_model_have_its_own_loss_function() -> None:
    model, ids = Speaker(), words()
    plain = model(ids, ids)
    with stablekit.attach(rate(model), ZLoss(0.1), model=model):
        copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
        assert float((model(ids, ids) - plain).detach()) > 0
        for one in copies:
            assert one.loss_function is causal_loss
            assert torch.equal(one(ids, ids), plain)


@pytest.mark.parametrize("plugin", [ZLoss(), SoftCap(), ZLoss(on="head")], ids=["z", "cap", "z on"])
def test_a_first_step_without_a_forward_pass_there_is_an_error(plugin: Any) -> None:  # noqa: ANN401
    model, ids = Speaker(), words()
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = rate(model)
    stablekit.attach(optimizer, plugin, model=model)
    hidden = model.embedding(ids)
    (hidden @ model.head.weight.T).square().mean().backward()
    with pytest.raises(AttachError, match="first training step did not call"):
        optimizer.step()
    assert all(map(torch.equal, before, model.parameters()))


def test_the_error_names_the_ways_that_remain() -> None:
    model, ids = Speaker(), words()
    optimizer = rate(model)
    stablekit.attach(optimizer, ZLoss(), model=model)
    causal_loss(model(ids), ids).backward()
    with pytest.raises(AttachError, match=r"compute_loss_func.*on=head; .*z_loss to the loss"):
        optimizer.step()


def test_a_model_without_a_loss_function_is_refused() -> None:
    model = nn.Linear(2, 2)
    with pytest.raises(AttachError, match="on="):
        stablekit.attach(rate(model), ZLoss(), model=model)
    with pytest.raises(AttachError, match="model="):
        stablekit.attach(rate(model), ZLoss())


def test_where_one_is_refused_those_before_it_leave_the_model() -> None:
    model, ids = Speaker(), words()
    plain, before = model(ids, ids), dict(vars(model))
    with pytest.raises(AttachError, match="matches no module"):
        stablekit.attach(
            rate(model), ZLoss(0.1), SoftCap(2.0), SoftCap(on="nowhere", name="third"), model=model
        )
    assert torch.equal(model(ids, ids), plain)
    assert vars(model) == before


def test_a_loss_function_of_unknown_arguments_is_refused_by_name() -> None:
    def boxes_loss(logits: Tensor, boxes: Tensor) -> Tensor:
        return (logits - boxes).sum()

    model = Speaker()
    model.loss_function = boxes_loss
    with pytest.raises(AttachError, match="boxes_loss of Speaker"):
        stablekit.attach(rate(model), ZLoss(), model=model)
    assert model.loss_function is boxes_loss


def test_labels_that_are_values_are_refused() -> None:
    model, ids = Speaker(), words()
    stablekit.attach(rate(model), ZLoss(), model=model)
    with pytest.raises(AttachError, match="float32"):
        model(ids, ids.float())


@pytest.mark.parametrize("plugin", [ZLoss(), SoftCap(), ZLoss(on="head")], ids=["z", "cap", "z on"])
@pytest.mark.parametrize("where", ["instance", "class", "wrapped"])
def test_a_forward_of_liger_is_refused(
    plugin: Any,  # noqa: ANN401 - any plugin
    where: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    name = "liger_kernel.transformers.model.llama"
    stand_in = ModuleType(name)
    exec("def lce_forward(self, ids, labels=None): return self.head.weight.sum()", vars(stand_in))
    monkeypatch.setitem(sys.modules, name, stand_in)
    fused = vars(stand_in)["lce_forward"]
    model = Speaker()
    if where == "class":
        monkeypatch.setattr(Speaker, "forward", fused)
    elif where == "instance":
        monkeypatch.setattr(model, "forward", fused.__get__(model))
    else:

        def autocast(*args: Any) -> Any:  # noqa: ANN401 - as the forward
            return fused(model, *args)

        monkeypatch.setattr(autocast, "__wrapped__", fused.__get__(model), raising=False)
        monkeypatch.setattr(model, "forward", autocast)
    with pytest.raises(AttachError, match="use_liger_kernel=False"):
        stablekit.attach(rate(model), plugin, model=model)
    assert "_loss_function" not in vars(model)


# torch.compile itself instantiates the autograd functions it traces.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize(
    "make",
    [
        lambda: [ZLoss(0.1)],
        lambda: [SoftCap(2.0)],
        lambda: [SoftCap(2.0), ZLoss(0.1, on="head")],
    ],
)
def test_a_compiled_model_computes_the_same_and_is_compiled_once(
    make: Callable[[], list[Any]],
) -> None:
    compiled: list[int] = []

    def backend(graph: Any, example: Any) -> Any:  # noqa: ANN401 - as torch
        compiled.append(1)
        return graph.forward

    def fast_loss(logits: Tensor, labels: Tensor, shift_labels: Tensor | None = None) -> Tensor:
        targets = nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
        targets = targets if shift_labels is None else shift_labels
        return nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())

    runs = []
    for is_compiled in (False, True):
        model = Speaker()
        model.loss_function = fast_loss
        call: Any = torch.compile(model, backend=backend) if is_compiled else model
        optimizer = rate(model)
        session = stablekit.attach(optimizer, *make(), model=call)
        counts = []
        for step in range(4):
            optimizer.zero_grad()
            call(words(step), words(step)).backward()
            optimizer.step()
            counts.append(len(compiled))
        runs.append([[*model.parameters()], session.metrics()])
        assert counts[0] == counts[-1]
        session.detach()
    torch.testing.assert_close(runs[0], runs[1])
    assert compiled


def test_a_head_computed_again_by_checkpointing_counts_once() -> None:
    def run(*, again: bool) -> tuple[list[Tensor], dict[str, float]]:
        model, ids = Speaker(), words()
        optimizer = rate(model)
        session = stablekit.attach(optimizer, ZLoss(0.1, on="head"), SoftCap(), model=model)
        hidden = model.embedding(ids)
        if again:
            logits = torch.utils.checkpoint.checkpoint(model.head, hidden, use_reentrant=False)
        else:
            logits = model.head(hidden)
        causal_loss(logits, ids).backward()
        found = gradients(model)
        optimizer.step()
        return found, session.metrics()

    plain, again = run(again=False), run(again=True)
    assert all(map(torch.equal, plain[0], again[0]))
    assert plain[1] == pytest.approx(again[1])


def test_in_device_mode_forward_and_step_read_nothing_on_the_host() -> None:
    with torch.device("meta"):
        model = Speaker()
        ids = torch.ones(3, 7, dtype=torch.long)
    model.loss_function = lambda logits, labels, shift_labels=None: logits.square().mean()
    optimizer = rate(model)
    session = stablekit.attach(
        optimizer, SoftCap(), ZLoss(), model=model, device_mode=True, log_every=0
    )
    for _ in range(2):
        model(ids, ids).backward()
        optimizer.step()
    assert session.number == 2
