"""LogitClip bounds the norm of logits in training, and does nothing else."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import stablekit
from stablekit.errors import AttachError
from stablekit.testing import check_plugin
from stablekit_logits import LogitClip, LogitClipLoss, clip_logits, lowest_loss
from tests.logits.small import (
    CLASSES,
    classifier,
    close,
    exact,
    fit,
    fit_hf,
    golden,
    same,
    samples,
)

INPUTS, OUTPUTS = golden("logitclip")
compiles = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
CASES = [case for case in OUTPUTS if "=" in case]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("form", "kind"), [("paper", "paper"), ("repository", "reference_code")])
def test_logits_loss_and_gradient_are_the_golden_ones(case: str, form: str, kind: str) -> None:
    tau, p = (float(part.partition("=")[2]) for part in case.split(","))
    logits = INPUTS["logits"].clone()
    logits[0] *= 0.02
    logits.requires_grad_()
    clipped = clip_logits(logits, tau, p=p, form=form)
    loss = nn.functional.cross_entropy(clipped, INPUTS["targets"])
    loss.backward()
    expected = OUTPUTS[case][kind]
    assert logits.grad is not None
    torch.testing.assert_close(clipped.detach(), exact(expected["clipped"]), rtol=0, atol=1e-9)
    torch.testing.assert_close(logits.grad, exact(expected["grad"]), rtol=0, atol=1e-9)
    assert abs(loss.item() - expected["loss"]) < 1e-9


rows = st.lists(st.floats(-50, 50, width=32), min_size=2, max_size=6)


@given(row=rows, tau=st.floats(0.1, 30), p=st.sampled_from([1.0, 1.5, 2.0, 4.0, math.inf]))
def test_norms_are_bounded_and_the_order_of_classes_is_kept(
    row: list[float], tau: float, p: float
) -> None:
    logits = torch.tensor([row], dtype=torch.float64)
    clipped = clip_logits(logits, tau, p=p)
    power = sum(abs(x) ** p for x in clipped[0].tolist()) if p < math.inf else 0.0
    norm = power ** (1 / p) if p < math.inf else max(abs(x) for x in clipped[0].tolist())
    assert norm <= tau * (1 + 1e-9)
    assert clipped[0, int(logits.argmax())] == clipped.max()


@given(row=rows, scale=st.floats(0.01, 0.99))
def test_rows_below_the_bound_are_bitwise_what_they_were(row: list[float], scale: float) -> None:
    logits = torch.tensor([row], requires_grad=True)
    tau = max(float(logits.detach().norm()), 1e-3) / scale
    clipped = clip_logits(logits, tau)
    weights = torch.arange(1.0, len(row) + 1)
    (clipped * weights).sum().backward()
    assert torch.equal(clipped, logits)
    assert logits.grad is not None
    assert torch.equal(logits.grad[0], weights)


def test_the_papers_form_is_continuous_at_the_bound_and_the_repositorys_jumps() -> None:
    row = torch.tensor([[0.6, 0.8]], dtype=torch.float64)
    for form, jump in (("paper", 0.0), ("repository", 1.5 - 1 / 1.5)):
        below, above = (clip_logits(row * (1.5 + d), 1.5, form=form) for d in (-1e-6, 1e-6))
        assert abs(float((below - above).norm()) - jump) < 1e-5


def test_the_gradient_of_a_clipped_row_is_orthogonal_to_it() -> None:
    logits = (INPUTS["logits"] * 10).requires_grad_()
    nn.functional.cross_entropy(clip_logits(logits, 2.0), INPUTS["targets"]).backward()
    assert logits.grad is not None
    assert float(logits.grad.norm()) > 1e-3
    assert float((logits.grad * logits.detach()).sum(-1).abs().max()) < 1e-12


def test_a_row_of_zeros_has_a_finite_gradient() -> None:
    for p in (1.0, 2.0, 3.0, math.inf):
        logits = torch.zeros(2, 3, requires_grad=True)
        nn.functional.cross_entropy(clip_logits(logits, 1.0, p=p), torch.tensor([0, 1])).backward()
        assert logits.grad is not None
        assert logits.grad.isfinite().all()


def test_half_precision_is_measured_in_float32() -> None:
    logits = torch.full((1, 4096), 300.0, dtype=torch.float16)
    clipped = clip_logits(logits, 64.0)
    assert clipped.dtype == torch.float16
    assert torch.allclose(clipped.float(), torch.ones(1, 4096))


@pytest.mark.parametrize(("tau", "words"), [(1.5, 10), (0.5, 3), (5.0, 1000)])
@pytest.mark.parametrize("p", [1.0, 2.0, 3.0, math.inf])
def test_the_lowest_loss_is_what_a_search_finds(tau: float, words: int, p: float) -> None:
    share = torch.linspace(0, 1, 200001, dtype=torch.float64)
    # own logit a, others -b each, on the sphere a^p + (K-1) b^p = tau^p
    a = tau * share
    rest = (1 - share**p).clamp(min=0) if p < math.inf else torch.ones_like(share)
    b = tau * (rest / (words - 1)) ** (1 / p) if p < math.inf else tau * rest
    found = torch.log1p((words - 1) * torch.exp(-(a + b))).min()
    assert abs(lowest_loss(tau, words, p=p) - float(found)) < 1e-4


def test_the_loss_module_clips_in_training_only() -> None:
    logits, targets = INPUTS["logits"], INPUTS["targets"]
    criterion = LogitClipLoss(nn.MultiMarginLoss(), tau=0.5)
    expected = OUTPUTS["tau=0.5,p=2"]["paper"]["clipped"]
    bare = nn.MultiMarginLoss()
    clipped = exact(expected)[1:]
    assert torch.allclose(criterion(logits[1:], targets[1:]), bare(clipped, targets[1:]))
    assert torch.equal(criterion.eval()(logits, targets), bare(logits, targets))


def test_a_plugin_that_clips_nothing_trains_bitwise_alike() -> None:
    bare, weights, _ = fit(classifier())
    losses, watched, session = fit(classifier(), LogitClip(1e6, on="head"))
    assert losses == bare
    assert same(watched, weights)
    assert session.metrics()["logit-clip/clipped"] == 0


def test_a_plugin_trains_as_a_loop_that_clips_its_logits() -> None:
    model = classifier()
    by_hand = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(by_hand.parameters(), lr=0.02)
    for number in range(3):
        x, y = samples(number)
        z = by_hand(x)
        norm = z.norm(dim=1, keepdim=True)
        optimizer.zero_grad()
        nn.functional.cross_entropy(torch.where(norm > 1, z / norm, z), y).backward()
        optimizer.step()
        share = (norm > 1).float().mean().item()
    _, weights, session = fit(model, LogitClip(1.0, on="head"))
    assert close(weights, [param.detach() for param in by_hand.parameters()])
    assert session.metrics()["logit-clip/clipped"] == pytest.approx(share)
    assert session.metrics()["logit-clip/norm"] == pytest.approx(norm.mean().item())
    assert session.metrics()["logit-clip/threshold"] == 1.0


def test_evaluation_sees_logits_as_they_are_and_detach_leaves_no_trace() -> None:
    model = classifier()
    keys = {name: set(vars(module)) for name, module in model.named_modules()}
    x, _ = samples(0)
    plain = model(x)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    session = stablekit.attach(optimizer, LogitClip(0.1, on="head"), model=model)
    assert float(model(x).detach().norm(dim=1).max()) <= 0.1 + 1e-6
    assert torch.equal(model.eval()(x), plain)
    session.detach()
    assert torch.equal(model.train()(x), plain)
    assert {name: set(vars(module)) for name, module in model.named_modules()} == keys
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"tau": 0}, "tau must be a finite number above 0"),
        ({"p": 0.5}, "p must be a finite number of at least 1"),
        ({"form": "code"}, "form must be one of 'paper', 'repository'"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        LogitClip(**arguments)


def test_classes_in_dim_1_are_refused_by_the_loss_module() -> None:
    with pytest.raises(ValueError, match="flatten"):
        LogitClipLoss()(torch.zeros(2, 3, 4), torch.zeros(2, 4, dtype=torch.long))


def test_it_keeps_the_contract_of_plugins() -> None:
    check_plugin(LogitClip.example)


# ---- models of transformers


def tiny_classifier(kind: str) -> Any:  # noqa: ANN401 - of transformers
    """Return a small classifier with weights large enough to be clipped."""
    transformers = pytest.importorskip("transformers", reason="tiny models of transformers")
    torch.manual_seed(0)
    family = "GPT2" if "GPT2" in kind else "Bert" if "Bert" in kind else kind.partition("For")[0]
    common: dict[str, Any] = {"vocab_size": 64, "num_labels": CLASSES, "pad_token_id": 0}
    if family == "GPT2":
        sizes: dict[str, Any] = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
        sizes |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        sizes |= {"bos_token_id": 1, "eos_token_id": 1}
    else:
        common["classifier_dropout"] = 0.0
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
        sizes |= {"num_attention_heads": 4, "max_position_embeddings": 64}
    if family == "Bert":
        sizes |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    elif family != "GPT2":
        sizes |= {"num_key_value_heads": 2, "head_dim": 8, "bos_token_id": 1, "eos_token_id": 1}
    model = getattr(transformers, kind)(getattr(transformers, f"{family}Config")(**common, **sizes))
    with torch.no_grad():
        for param in model.parameters():
            param.mul_(3.0)
    return model.train()


def labelled(kind: str, number: int) -> dict[str, Any]:
    """Return four sentences with a label each, or one for each word, some of them ignored."""
    made = torch.Generator().manual_seed(number)
    ids = torch.randint(2, 64, (4, 8), generator=made)
    shape = (4, 8) if "Token" in kind else (4,)
    labels = torch.randint(0, CLASSES, shape, generator=made)
    if "Token" in kind:
        labels[:, -2:] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


KINDS = {
    "LlamaForSequenceClassification": None,
    "Qwen3ForTokenClassification": None,
    "GPT2ForSequenceClassification": "score",
    "BertForTokenClassification": "classifier",
}


@pytest.mark.parametrize(("kind", "on"), KINDS.items())
def test_classifiers_of_transformers_train_as_with_clipped_logits(
    kind: str, on: str | None
) -> None:
    model = tiny_classifier(kind)
    batches = [labelled(kind, number) for number in range(3)]
    bare, weights, _ = fit_hf(model, batches)
    losses, same_weights, _ = fit_hf(model, batches, LogitClip(1e6, on=on))
    assert losses == bare
    assert same(same_weights, weights)

    by_hand = copy.deepcopy(model)
    optimizer = torch.optim.SGD(by_hand.parameters(), lr=0.01)
    for batch in batches:
        z = by_hand(**batch).logits
        norm = z.norm(dim=-1, keepdim=True)
        z = torch.where(norm > 0.5, 0.5 * z / norm, z).flatten(0, -2)
        optimizer.zero_grad()
        nn.functional.cross_entropy(z, batch["labels"].flatten()).backward()
        optimizer.step()
    _, clipped, session = fit_hf(model, batches, LogitClip(0.5, on=on))
    assert close(clipped, [param.detach() for param in by_hand.parameters()])
    assert session.metrics()["logit-clip/clipped"] > 0.5
    if on is None and "Token" in kind:
        kept = norm[batch["labels"] != -100]
        assert session.metrics()["logit-clip/norm"] == pytest.approx(kept.mean().item(), rel=1e-5)


def test_rows_with_ignored_labels_reach_the_loss_as_they_were() -> None:
    kind = "Qwen3ForTokenClassification"
    model, seen = tiny_classifier(kind), []
    inner = model.loss_function

    def ForTokenClassification(logits: Any, labels: Any, config: Any, **others: Any) -> Any:  # noqa: ANN401 - as in transformers
        seen.append(logits)
        return inner(logits, labels, config, **others)

    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    model.loss_function = ForTokenClassification
    with stablekit.attach(optimizer, LogitClip(0.5), model=model):
        batch = labelled(kind, 0)
        logits = model(**batch).logits
    valid = batch["labels"] != -100
    assert torch.equal(seen[0][~valid], logits[~valid])
    assert float(seen[0][valid].detach().norm(dim=-1).max()) <= 0.5 + 1e-6
    assert vars(model)["_loss_function"] is ForTokenClassification


@compiles
def test_compiled_and_checkpointed_models_train_alike() -> None:
    kind = "LlamaForSequenceClassification"
    model = tiny_classifier(kind)
    batches = [labelled(kind, number) for number in range(3)]
    _, expected, _ = fit_hf(model, batches, LogitClip(0.5))

    def checkpointed(one: Any) -> Any:  # noqa: ANN401 - of transformers
        one.activation_checkpointing_enable()
        return one

    for wrap in (checkpointed, lambda one: torch.compile(one, backend="eager")):
        _, weights, session = fit_hf(model, batches, LogitClip(0.5), wrap=wrap)
        assert close(weights, expected)
        session.detach()


@pytest.mark.parametrize("on", [None, "lm_head"])
@pytest.mark.parametrize("family", ["Llama", "GPT2"])
def test_a_language_model_is_refused_at_small_tau_with_the_floor_of_its_loss(
    family: str, on: str | None
) -> None:
    from tests.monitors.families import WORDS, batch, tiny

    model = tiny(family)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    floor = math.log(1 + (WORDS - 1) * math.exp(-1.5 * math.sqrt(WORDS / (WORDS - 1))))
    with pytest.raises(AttachError, match=rf"below {floor:.2f} nats is in reach for the {WORDS}"):
        stablekit.attach(optimizer, LogitClip(1.5, on=on), model=model)
    assert not hasattr(model, "_loss_function") or "_loss_function" not in vars(model)
    session = stablekit.attach(optimizer, LogitClip(10.0, on=on), model=model)
    model(**batch()).loss.backward()
    optimizer.step()
    session.detach()
    assert "_loss_function" not in vars(model)
