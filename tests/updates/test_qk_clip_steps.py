"""Which forward passes QKClip counts, what it remembers, and that compiling changes nothing."""

from __future__ import annotations

import io
import math
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor

from stablekit.errors import AttachError
from stablekit_updates import QKClip
from tests.monitors.watched import Run, Transformer, backward, words
from tests.updates.clipped import EXACT, KINDS, each_kind, loud, still

if TYPE_CHECKING:
    pass


@each_kind
def test_micro_batches_count_by_their_maximum(kind: str) -> None:
    def weights(*batches: int) -> Tensor:
        run = Run(QKClip(1.0, **KINDS[kind]), model=loud(), make=still)
        run.step(*batches)
        made: Tensor = run.model.get_parameter("blocks.0.attn.wq.weight").detach()
        return made

    both, one, other = weights(1, 2), weights(1), weights(2)
    for rows in (slice(0, 4), slice(4, 8)):
        norms = [float(part[rows].norm()) for part in (one, other)]
        assert float(both[rows].norm()) == pytest.approx(min(norms), rel=1e-6)


@each_kind
def test_evaluation_and_passes_without_gradients_do_not_count(kind: str) -> None:
    run, alone = (Run(QKClip(1.0, **KINDS[kind]), model=loud(), make=still) for _ in range(2))
    run.model.eval()
    run.model(words(8))
    run.model.train()
    with torch.no_grad():
        run.model(words(9))
    run.step(1)
    alone.step(1)
    pairs = zip(run.model.parameters(), alone.model.parameters(), strict=True)
    assert all(torch.equal(ours, theirs) for ours, theirs in pairs)


@each_kind
@pytest.mark.parametrize("checkpointing", ["plain", "reentrant"])
def test_gradient_checkpointing_makes_no_difference(kind: str, checkpointing: str) -> None:
    plain, again = Transformer(), Transformer(checkpointing)
    for model in (plain, again):
        run = Run(QKClip(0.05, **KINDS[kind]), model=model)
        for _ in range(3):
            assert run.step(1, 2)["qk-clip/clipped"] > 0
    for ours, theirs in zip(again.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("device_mode", [False, True])
def test_what_a_skipped_step_saw_is_forgotten(device_mode: bool) -> None:
    chain = ["nonfinite-guard", QKClip(1.0, **EXACT)]
    run = Run(*chain, model=loud(), make=still, device_mode=device_mode, log_every=1)
    before = run.model.get_parameter("blocks.0.attn.wq.weight").detach().clone()
    backward(run.model, 3)
    run.model.get_parameter("head.bias").grad[0] = math.nan
    run.optimizer.step()
    assert run.metrics()["steps_skipped"] == 1
    run.optimizer.zero_grad(set_to_none=False)
    run.optimizer.step()
    assert torch.equal(run.model.get_parameter("blocks.0.attn.wq.weight"), before)


@each_kind
def test_layers_are_named_when_clipped_for_the_first_time(kind: str) -> None:
    run = Run(QKClip(1.0, **KINDS[kind]), model=loud(), make=still)
    for _ in range(3):
        run.step(3)
    named = [name for event in run.events("clip") for name in event.tensors]
    assert sorted(named) == [f"blocks.{i}.attn.wq.weight" for i in range(2)]


def test_a_resumed_run_does_not_name_them_again_and_goes_on_bit_by_bit() -> None:
    straight = Run(QKClip(0.5, **EXACT))
    for _ in range(3):
        straight.step()
    buffer = io.BytesIO()
    torch.save([straight.model.state_dict(), straight.optimizer.state_dict()], buffer)
    straight.step()
    resumed = Run(QKClip(0.5, **EXACT))
    buffer.seek(0)
    model, optimizer = torch.load(buffer, weights_only=True)
    resumed.model.load_state_dict(model)
    resumed.optimizer.load_state_dict(optimizer)
    resumed.number = 3
    resumed.step()
    pairs = zip(resumed.model.parameters(), straight.model.parameters(), strict=True)
    assert all(torch.equal(ours, theirs) for ours, theirs in pairs)
    assert len(resumed.events("clip")) == len(straight.events("clip")) > 0


def test_a_dry_run_tells_and_changes_nothing() -> None:
    run = Run(QKClip(1.0, **EXACT), model=loud(), make=still, dry_run=True)
    before = {name: value.clone() for name, value in run.model.state_dict().items()}
    assert run.step(3)["qk-clip/clipped"] > 0
    assert run.step(3)["qk-clip/max_logit"] > 1
    assert all(torch.equal(value, before[name]) for name, value in run.model.state_dict().items())


compiles = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")


@compiles
def test_a_compiled_model_is_clipped_alike_by_the_bound() -> None:
    torch._dynamo.reset()
    plain, model = Run(QKClip(0.05, **KINDS["bound"])), Transformer()
    compiled: Any = torch.compile(model, backend="eager")
    run = Run(QKClip(0.05, **KINDS["bound"]), model=model, attached=compiled)
    run.model = compiled
    for _ in range(3):
        assert run.step()["qk-clip/clipped"] == plain.step()["qk-clip/clipped"] > 0
    for ours, theirs in zip(model.parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


def test_exact_logits_of_a_compiled_model_are_refused() -> None:
    model = Transformer()
    compiled: Any = torch.compile(model, backend="eager")
    with pytest.raises(AttachError, match=r"torch\.compile; use QKClip\(logits='bound'\)"):
        Run(QKClip(**EXACT), model=model, attached=compiled)


@compiles
def test_a_model_compiled_later_says_that_nothing_was_seen() -> None:
    torch._dynamo.reset()
    run = Run(QKClip(0.05, **EXACT))
    run.model = torch.compile(run.model, backend="eager")
    assert math.isnan(run.step()["qk-clip/max_logit"])
    (event,) = run.events("unseen")
    assert event.message.endswith("Inside torch.compile nothing of this is seen")


@compiles
def test_a_model_compiled_and_called_before_it_is_attached_says_to_attach_first() -> None:
    torch._dynamo.reset()
    model = Transformer()
    compiled: Any = torch.compile(model, backend="eager")
    backward(compiled)
    run = Run(QKClip(0.05, **KINDS["bound"]), model=model, attached=compiled)
    run.model = compiled
    assert math.isnan(run.step()["qk-clip/max_logit"])
    (event,) = run.events("unseen")
    assert "The model is compiled" in event.message
    assert "attach before torch.compile" in event.message
