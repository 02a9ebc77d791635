"""Every optimizer of torch, attached, equals a loop written by hand; skipped, it stands still."""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn, optim

import stablekit
from stablekit_clipping import ClipValue, GlobalNorm
from stablekit_recovery import NonFiniteGuard
from tests.core.oracles import (
    X,
    Y,
    backward,
    copies,
    difference,
    equal,
    gradients,
    picture,
    small_model,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    Factory = Callable[[Iterable[Tensor]], optim.Optimizer]

_FOREACH: list[Any] = [
    optim.ASGD,
    optim.Adadelta,
    optim.Adagrad,
    optim.Adam,
    optim.AdamW,
    optim.Adamax,
    optim.NAdam,
    optim.RAdam,
    optim.RMSprop,
    optim.Rprop,
    optim.SGD,
]
_FUSED: list[Any] = [optim.Adagrad, optim.Adam, optim.AdamW, optim.SGD]

CASES: dict[str, Factory] = {
    **{f"{c.__name__}-foreach": partial(c, lr=0.01, foreach=True) for c in _FOREACH},
    **{f"{c.__name__}-loop": partial(c, lr=0.01, foreach=False) for c in _FOREACH},
    **{f"{c.__name__}-fused": partial(c, lr=0.01, fused=True) for c in _FUSED},
    "SGD-momentum": partial(optim.SGD, lr=0.01, momentum=0.9, nesterov=True, weight_decay=0.1),
    "SGD-momentum-fused": partial(optim.SGD, lr=0.01, momentum=0.9, fused=True),
    "AdamW-maximize-fused": partial(optim.AdamW, lr=0.01, maximize=True, fused=True),
    "Adam-amsgrad-tensor-lr": partial(optim.Adam, lr=torch.tensor(0.01), amsgrad=True),
    "RMSprop-centered": partial(optim.RMSprop, lr=0.01, centered=True, momentum=0.5),
    "Adafactor": optim.Adafactor,
}


def _matrices_only(model: nn.Module) -> list[Tensor]:
    return [param for param in model.parameters() if param.ndim == 2]


def test_no_optimizer_of_torch_is_forgotten() -> None:
    special = {"LBFGS", "Muon", "SparseAdam", "Optimizer"}
    covered = {name.split("-")[0] for name in CASES} | special
    there = {n for n, c in vars(optim).items() if isinstance(c, type) and c.__name__ == n}
    assert {n for n in there if issubclass(getattr(optim, n), optim.Optimizer)} == covered


@pytest.mark.parametrize("name", CASES)
def test_chain_equals_clipping_by_hand(name: str) -> None:
    model, twin = small_model(), small_model()
    attached, plain = CASES[name](model.parameters()), CASES[name](twin.parameters())
    session = stablekit.attach(attached, NonFiniteGuard(), GlobalNorm(0.5), ClipValue(0.05))
    for step in range(10):
        backward(model, step)
        attached.step()
        backward(twin, step)
        torch.nn.utils.clip_grad_norm_(twin.parameters(), 0.5)
        torch.nn.utils.clip_grad_value_(twin.parameters(), 0.05)
        plain.step()
        torch.testing.assert_close(gradients(model), gradients(twin), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(
        list(model.parameters()), list(twin.parameters()), rtol=1e-5, atol=1e-6
    )
    assert session.metrics()["global-norm/clipped"] == 1.0


@pytest.mark.parametrize("name", CASES)
def test_chain_that_does_not_clip_changes_no_bit(name: str) -> None:
    model, twin = small_model(), small_model()
    attached, plain = CASES[name](model.parameters()), CASES[name](twin.parameters())
    stablekit.attach(
        attached, "nonfinite-guard", "global-norm:max_norm=1e6", "clip-value:limit=1e6"
    )
    for step in range(10):
        backward(model, step)
        attached.step()
        backward(twin, step)
        plain.step()
    assert equal(copies(model.parameters()), copies(twin.parameters()))


@pytest.mark.parametrize("before", [0, 1, 5])
@pytest.mark.parametrize("name", CASES)
def test_skipped_step_changes_no_bit(name: str, before: int) -> None:
    model = small_model()
    optimizer = CASES[name](model.parameters())
    session = stablekit.attach(optimizer, NonFiniteGuard())
    for step in range(before):
        backward(model, step)
        optimizer.step()
    _skip_and_compare(optimizer, model)
    assert session.skipped == 1


def _skip_and_compare(optimizer: optim.Optimizer, model: nn.Module) -> None:
    backward(model, 7)
    next(p.grad for p in model.parameters() if p.grad is not None).view(-1)[0] = math.nan
    grads, held = gradients(model), [p.grad for p in model.parameters()]
    shown = picture(optimizer)
    optimizer.step()
    assert difference(shown, picture(optimizer)) == ""
    assert all(p.grad is g for p, g in zip(model.parameters(), held, strict=True))
    assert equal(gradients(model), grads)


def test_muon_and_adamw_are_one_session_of_two_optimizers() -> None:
    model, twin = small_model(), small_model()
    mine, other = _pair(model), _pair(twin)
    session = stablekit.attach(mine, NonFiniteGuard(), GlobalNorm(0.5))
    for step in range(10):
        backward(model, step)
        if step == 4:
            next(model.parameters()).grad = torch.full((16, 8), math.inf)
            before = [picture(one) for one in mine]
        for one in mine:
            one.step()
        if step == 4:
            assert [difference(b, picture(o)) for b, o in zip(before, mine, strict=True)] == [
                "",
                "",
            ]
            continue
        backward(twin, step)
        torch.nn.utils.clip_grad_norm_(twin.parameters(), 0.5)
        for one in other:
            one.step()
    torch.testing.assert_close(
        list(model.parameters()), list(twin.parameters()), rtol=1e-5, atol=1e-6
    )
    assert (session.number, session.updates) == (10, 9)


def _pair(model: nn.Module) -> list[optim.Optimizer]:
    rest = [param for param in model.parameters() if param.ndim != 2]
    return [optim.Muon(_matrices_only(model), lr=0.01), optim.AdamW(rest, lr=0.01)]


def _sparse_backward(model: nn.Embedding, step: int) -> None:
    model.zero_grad()
    rows = torch.tensor([step % 5, 3, 3, 7])  # row 3 comes twice: the gradient is not coalesced
    (model(rows).square().sum() * (1 + step)).backward()


def test_sparse_gradients_are_clipped_as_their_dense_form_would_be() -> None:
    torch.manual_seed(0)
    model = nn.Embedding(10, 4, sparse=True)
    twin = nn.Embedding(10, 4, sparse=True)
    twin.load_state_dict(model.state_dict())
    attached = optim.SparseAdam(model.parameters(), lr=0.01)
    plain = optim.SparseAdam(twin.parameters(), lr=0.01)
    stablekit.attach(attached, NonFiniteGuard(), GlobalNorm(0.5), ClipValue(0.1))
    for step in range(10):
        _sparse_backward(model, step)
        attached.step()
        _sparse_backward(twin, step)
        assert twin.weight.grad is not None
        dense = twin.weight.grad.to_dense()
        dense = dense * (0.5 / (dense.norm() + 1e-6)).clamp(max=1.0)
        twin.weight.grad = dense.clamp(-0.1, 0.1).to_sparse(1)
        plain.step()
    torch.testing.assert_close(model.weight, twin.weight, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("before", [0, 3])
def test_skipped_step_with_sparse_gradients_changes_no_bit(before: int) -> None:
    model = nn.Embedding(10, 4, sparse=True)
    optimizer = optim.SparseAdam(model.parameters(), lr=0.01)
    session = stablekit.attach(optimizer, NonFiniteGuard())
    for step in range(before):
        _sparse_backward(model, step)
        optimizer.step()
    _sparse_backward(model, 3)
    assert model.weight.grad is not None
    model.weight.grad = model.weight.grad * math.nan
    shown = picture(optimizer)
    optimizer.step()
    assert difference(shown, picture(optimizer)) == ""
    assert model.weight.grad.is_sparse
    assert session.skipped == 1


@pytest.mark.parametrize("search", [None, "strong_wolfe"])
@pytest.mark.parametrize("limit", [0.05, 1e6])
def test_lbfgs_equals_a_closure_that_clips_by_hand(search: str | None, limit: float) -> None:
    model, twin = small_model(), small_model()
    attached = optim.LBFGS(model.parameters(), lr=0.1, max_iter=4, line_search_fn=search)
    plain = optim.LBFGS(twin.parameters(), lr=0.1, max_iter=4, line_search_fn=search)
    stablekit.attach(attached, NonFiniteGuard(), GlobalNorm(limit))

    def by_hand() -> Tensor:
        loss = backward(twin)
        torch.nn.utils.clip_grad_norm_(twin.parameters(), limit)
        return loss

    for _ in range(5):
        mine = attached.step(lambda: backward(model))
        torch.testing.assert_close(mine, plain.step(by_hand))
    torch.testing.assert_close(
        list(model.parameters()), list(twin.parameters()), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("before", [0, 2])
@pytest.mark.parametrize("search", [None, "strong_wolfe"])
def test_skipped_step_of_lbfgs_changes_no_bit(before: int, search: str | None) -> None:
    model = small_model()
    optimizer = optim.LBFGS(model.parameters(), lr=0.1, max_iter=4, line_search_fn=search)
    session = stablekit.attach(optimizer, NonFiniteGuard())
    for _ in range(before):
        optimizer.step(lambda: backward(model))

    def poisoned() -> Tensor:
        model.zero_grad()
        loss = nn.functional.mse_loss(model(X), Y) * math.nan
        loss.backward()
        return loss.detach()

    shown = picture(optimizer)
    assert math.isnan(optimizer.step(poisoned))
    assert difference(shown, picture(optimizer)) == ""
    assert session.skipped == 1
    assert all(bool(grad.isnan().all()) for grad in gradients(model))
