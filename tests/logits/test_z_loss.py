"""The z-loss: its numbers, and what it adds to a model's loss and gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import stablekit
from stablekit.errors import AttachError
from stablekit.testing import check_plugin
from stablekit_logits import ZLoss, ZLossCrossEntropy, cross_entropy_and_z_loss, z_loss
from tests.logits.goldens import far, golden
from tests.logits.models import Speaker, gradients, inputs_of, words, z_by_hand

INPUTS, OUTPUTS, TOLERANCE = golden("zloss_softcap")
LOGITS, TARGETS = INPUTS["logits"], INPUTS["targets"]


def rate(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1)


def test_the_numbers_of_olmo_core() -> None:
    ce, z = cross_entropy_and_z_loss(LOGITS, TARGETS)
    summed = z_loss(LOGITS, TARGETS, reduction="sum")
    assert far(ce, OUTPUTS["ce"]) < TOLERANCE
    assert far(1e-4 * z, OUTPUTS["z_mean_1e4"]) < TOLERANCE
    assert far(1e-4 * summed, OUTPUTS["z_sum_1e4"]) < TOLERANCE
    each = z_loss(LOGITS, reduction="none").sqrt()
    assert far(each, OUTPUTS["lse"]) < TOLERANCE


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_gradient_of_olmo_core(dtype: torch.dtype) -> None:
    logits = LOGITS.to(dtype, copy=True).requires_grad_()
    (1e-4 * z_loss(logits, TARGETS)).backward()
    assert logits.grad is not None
    assert far(logits.grad, OUTPUTS["grad_z"]) < TOLERANCE


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_its_cross_entropy_is_that_of_torch(reduction: str) -> None:
    logits = LOGITS.clone().requires_grad_()
    ce, _ = cross_entropy_and_z_loss(logits, TARGETS, reduction=reduction)
    expected = cross_entropy(LOGITS, TARGETS, reduction=reduction)
    torch.testing.assert_close(ce, expected)
    ce.sum().backward()
    theirs = LOGITS.clone().requires_grad_()
    cross_entropy(theirs, TARGETS, reduction=reduction).sum().backward()
    torch.testing.assert_close(logits.grad, theirs.grad)


@given(st.floats(-20, 20), st.integers(0, 1000))
def test_a_constant_added_to_all_logits_moves_it_and_not_the_cross_entropy(
    constant: float, seed: int
) -> None:
    made = torch.Generator().manual_seed(seed)
    logits = torch.randn(1, 5, generator=made, dtype=torch.float64)
    labels = torch.tensor([3])
    before, squared = cross_entropy_and_z_loss(logits, labels)
    after, moved = cross_entropy_and_z_loss(logits + constant, labels)
    level = torch.log(logits.exp().sum())
    torch.testing.assert_close(before, after)
    torch.testing.assert_close(squared, level**2)
    torch.testing.assert_close(moved, (level + constant) ** 2)


@given(st.integers(0, 1000))
def test_its_gradient_is_along_the_softmax(seed: int) -> None:
    made = torch.Generator().manual_seed(seed)
    logits = torch.randn(4, 5, generator=made, dtype=torch.float64).requires_grad_()
    z_loss(logits).backward()
    level = logits.detach().exp().sum(-1, keepdim=True).log()
    torch.testing.assert_close(logits.grad, 2 / 4 * level * logits.detach().softmax(-1))


def test_it_is_zero_where_the_partition_function_is_one() -> None:
    assert z_loss(torch.full((2, 4), 0.25, dtype=torch.float64).log()) < 1e-30


def test_bfloat16_is_computed_in_float32() -> None:
    logits = LOGITS.to(torch.bfloat16)
    found = z_loss(logits, TARGETS)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, z_loss(logits.float(), TARGETS))


def test_the_module_leaves_it_out_of_evaluation() -> None:
    loss = ZLossCrossEntropy(0.1)
    plain = cross_entropy(LOGITS, TARGETS)
    torch.testing.assert_close(loss(LOGITS, TARGETS), plain + 0.1 * OUTPUTS["z_mean_1e4"] * 1e4)
    torch.testing.assert_close(loss.eval()(LOGITS, TARGETS), plain)


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (lambda: ZLoss(-1.0), ValueError),
        (lambda: ZLoss("0.1"), TypeError),  # type: ignore[arg-type]
        (lambda: ZLoss(on=3.5), TypeError),  # type: ignore[arg-type]
        (lambda: ZLossCrossEntropy(float("inf")), ValueError),
        (lambda: ZLossCrossEntropy(reduction="median"), ValueError),
        (lambda: z_loss(LOGITS, reduction="median"), ValueError),
    ],
)
def test_bad_arguments_are_refused(make: Any, error: type[Exception]) -> None:  # noqa: ANN401
    with pytest.raises(error):
        make()


@pytest.mark.parametrize("items", [None, 40])
def test_it_is_added_to_the_loss_divided_as_the_loss_is(items: int | None) -> None:
    model, labels = Speaker(), words(ignored=3)
    ids = inputs_of(labels)
    plain = model(ids, labels, num_items_in_batch=items)
    total, count = z_by_hand(model(ids), labels)
    expected = plain + 0.1 * total / (items or count)
    expected.backward()
    wanted = gradients(model)
    optimizer = rate(model)
    with stablekit.attach(optimizer, ZLoss(0.1), model=model) as session:
        loss = model(ids, labels, num_items_in_batch=items)
        loss.backward()
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close([p.grad for p in model.parameters()], wanted)
        optimizer.step()
        metrics = session.metrics()
    assert metrics["z-loss/z"] == pytest.approx(total.item() / count, rel=1e-5)
    whole = plain.item() * (items or count) / count
    assert metrics["z-loss/ce"] == pytest.approx(whole, rel=1e-5)


def test_micro_batches_of_unequal_length_are_one_batch() -> None:
    labels = words(ignored=5, rows=4)
    items = int((labels[:, 1:] != -100).sum())

    def run(parts: list[Tensor]) -> tuple[list[Tensor], float]:
        model = Speaker()
        optimizer = rate(model)
        with stablekit.attach(optimizer, ZLoss(0.1), model=model) as session:
            for part in parts:
                model(inputs_of(part), part, num_items_in_batch=items).backward()
            optimizer.step()
            return [*model.parameters()], session.metrics()["z-loss/z"]

    whole, in_one = run([labels])
    split, in_parts = run([labels[:1], labels[1:]])
    torch.testing.assert_close(split, whole)
    assert in_parts == pytest.approx(in_one, rel=1e-6)


@pytest.mark.parametrize("state", ["evaluation", "no gradients", "paused", "dry run"])
def test_at_other_times_the_loss_is_the_models(state: str) -> None:
    model, labels = Speaker(), words()
    plain = model(labels, labels)
    session = stablekit.attach(rate(model), ZLoss(0.1), model=model, dry_run=state == "dry run")
    if state == "evaluation":
        model.eval()
    with torch.set_grad_enabled(state != "no gradients"):
        if state == "paused":
            with session.paused():
                found = model(labels, labels)
        else:
            found = model(labels, labels)
    assert torch.equal(found, plain)


def test_the_output_of_a_module_passes_and_its_gradient_gets_the_terms() -> None:
    model, labels = Speaker(), words()
    logits = model(labels)
    (cross_entropy(logits.flatten(0, 1), labels.flatten()) + 0.1 * z_loss(logits)).backward()
    wanted = gradients(model)
    session = stablekit.attach(rate(model), ZLoss(0.1, on="head"), model=model)
    found = model(labels)
    assert torch.equal(found, logits)
    cross_entropy(found.flatten(0, 1), labels.flatten()).backward()
    torch.testing.assert_close([p.grad for p in model.parameters()], wanted)
    session.detach()
    assert not model.head._forward_hooks


def test_float16_outputs_are_refused_since_their_loss_is_scaled() -> None:
    model = nn.Linear(2, 4).half()
    stablekit.attach(rate(model), ZLoss(on=""), model=model)
    with pytest.raises(AttachError, match="float16"):
        model(torch.ones(1, 2, dtype=torch.float16))


def test_weight_zero_records_and_changes_nothing() -> None:
    model, twin, labels = Speaker(), Speaker(), words()
    session = stablekit.attach(rate(model), ZLoss(0.0), model=model)
    for one in (model, twin):
        optimizer = session.optimizers[0] if one is model else rate(twin)
        for _ in range(3):
            optimizer.zero_grad()
            one(labels, labels).backward()
            optimizer.step()
    assert all(map(torch.equal, model.parameters(), twin.parameters()))
    assert session.metrics()["z-loss/z"] > 0


@pytest.mark.parametrize("weight", [0.0, 1e-4])
def test_the_contract_is_kept(weight: float) -> None:
    check_plugin(lambda: ZLoss(weight, on=""))


def test_a_scaler_that_a_module_cannot_know_of_is_refused() -> None:
    model, ids = Speaker(), words()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for on in ("head", None):
        with stablekit.attach(optimizer, ZLoss(0.1, on=on), model=model) as session:
            scaler.scale(model(ids, ids)).backward()
            if on is None:
                scaler.step(optimizer)
                assert session.updates == 1
                continue
            with pytest.raises(AttachError, match=r"on='head'.*is not multiplied"):
                scaler.step(optimizer)
        scaler.update()
