"""Error norm truncation leaves out what it says, divides as it says, and starts when told."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import stablekit
from stablekit.errors import AttachError
from stablekit.testing import check_plugin
from stablekit_logits import ErrorNormLoss, ErrorNormTruncation, error_norms, truncation_mask
from tests.logits.models import Speaker, inputs_of, words
from tests.logits.small import Classifier, classifier, close, exact, fit, golden, same, samples

INPUTS, OUTPUTS = golden("ent")
LOGITS: Tensor = INPUTS["logits"]
LABELS: Tensor = INPUTS["targets"].clone()
LABELS[0, -2:] = -100
NAME = "error-norm-truncation"
compiles = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")


def norm_by_hand(row: Tensor, label: int) -> float:
    shares = row.double().exp() / row.double().exp().sum()
    return math.sqrt(sum((float(p) - (i == label)) ** 2 for i, p in enumerate(shares)))


def test_error_norms_and_what_is_left_out_are_the_golden_ones() -> None:
    norms = error_norms(LOGITS, LABELS)
    torch.testing.assert_close(norms, exact(OUTPUTS["el2n"]), rtol=0, atol=1e-6)
    dropped = truncation_mask(norms, threshold=OUTPUTS["threshold"], valid=LABELS != -100)
    assert dropped.tolist() == OUTPUTS["truncated"]


def test_losses_and_gradients_are_the_golden_ones() -> None:
    threshold, logits = OUTPUTS["threshold"], LOGITS.clone().requires_grad_()
    loss = ErrorNormLoss(threshold, divisor="kept")(logits, LABELS)
    loss.backward()
    assert loss.item() == pytest.approx(OUTPUTS["kept_mean"], abs=1e-6)
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad, exact(OUTPUTS["grad_kept_mean"]), rtol=0, atol=1e-6)
    valid = ErrorNormLoss(threshold)(LOGITS, LABELS).item()
    everything = OUTPUTS["ref_lm_mean_over_all"] * LABELS.numel() / int((LABELS != -100).sum())
    assert valid == pytest.approx(everything, abs=1e-6)


@pytest.mark.parametrize(
    ("mode", "arguments"),
    [
        ("threshold", {"threshold": OUTPUTS["threshold"]}),
        ("fraction_0.25", {"fraction": 0.25}),
        ("none", {"threshold": 2.0}),
    ],
)
def test_the_mask_gives_the_sums_of_the_fairseq_criterion(
    mode: str, arguments: dict[str, Any]
) -> None:
    # There padding is word 1, counts among the positions, and then costs nothing.
    labels = LABELS.where(LABELS != -100, 1)
    counts = ~truncation_mask(error_norms(LOGITS, labels), **arguments) & (labels != 1)
    logs = LOGITS.log_softmax(-1)
    nll = -logs.gather(-1, labels[..., None])[..., 0]
    classes = LOGITS.shape[-1]
    share = 0.1 / (classes - 1)
    smoothed = (1 - 0.1 - share) * nll - share * logs.sum(-1)
    expected = OUTPUTS["fairseq_ls0p1"][mode]
    assert float(nll[counts].sum()) == pytest.approx(expected["nll"], abs=1e-5)
    assert float(smoothed[counts].sum()) == pytest.approx(expected["loss"], abs=1e-5)


rows = st.lists(st.floats(-30, 30, width=32), min_size=2, max_size=6)


@given(row=rows, data=st.data())
def test_the_closed_form_is_the_distance_from_the_one_hot(
    row: list[float], data: st.DataObject
) -> None:
    label = data.draw(st.integers(0, len(row) - 1))
    logits = torch.tensor([row], dtype=torch.float64)
    found = float(error_norms(logits, torch.tensor([label])))
    assert 0 <= found <= math.sqrt(2) + 1e-12
    assert found == pytest.approx(norm_by_hand(logits[0], label), abs=1e-7)


@given(norms=st.lists(st.floats(0, 1.41), min_size=1, max_size=12), share=st.floats(0, 1))
def test_a_fraction_leaves_out_at_most_that_share_and_the_worst(
    norms: list[float], share: float
) -> None:
    dropped = truncation_mask(torch.tensor(norms), fraction=share).tolist()
    ordered = sorted(norms, reverse=True)
    assert sum(dropped) <= int(share * len(norms)) + 1e-9 or share * len(norms) % 1 > 0.99
    assert (
        min([n for n, d in zip(norms, dropped, strict=True) if d], default=2.0)
        >= max([n for n, d in zip(norms, dropped, strict=True) if not d], default=0.0) - 1e-6
    )
    assert len(ordered) == len(dropped)


@given(norms=st.lists(st.floats(0, 1.41), min_size=1), low=st.floats(0, 1.5), more=st.floats(0, 1))
def test_a_higher_threshold_leaves_out_no_more(norms: list[float], low: float, more: float) -> None:
    many = truncation_mask(torch.tensor(norms), threshold=low)
    few = truncation_mask(torch.tensor(norms), threshold=low + more)
    assert not bool((few & ~many).any())
    assert not bool(truncation_mask(torch.tensor(norms), threshold=math.sqrt(2)).any())


def test_what_is_not_valid_neither_counts_nor_goes() -> None:
    norms = torch.tensor([1.4, 1.3, 1.2, 1.1])
    valid = torch.tensor([False, True, True, False])
    assert truncation_mask(norms, fraction=0.5, valid=valid).tolist() == [False, True, False, False]
    assert not truncation_mask(norms, fraction=0.5, valid=~valid & valid).any()
    assert not truncation_mask(torch.ones(0), fraction=0.5).numel()


def test_half_precision_logits_are_judged_in_float32() -> None:
    half = LOGITS.to(torch.bfloat16)
    found = error_norms(half, LABELS)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, error_norms(half.float(), LABELS))


def test_evaluation_and_a_loss_without_labels_are_plain() -> None:
    loss = ErrorNormLoss(0.1)
    plain = nn.functional.cross_entropy(LOGITS.flatten(0, 1), LABELS.flatten())
    torch.testing.assert_close(loss.eval()(LOGITS, LABELS), plain)
    assert float(loss.train()(LOGITS, torch.full_like(LABELS, -100))) == 0.0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({}, "exactly one of threshold and fraction"),
        ({"threshold": 1.2, "fraction": 0.1}, "exactly one of threshold and fraction"),
        ({"threshold": -1}, "threshold must be a finite number of at least 0"),
        ({"fraction": 1.5}, "fraction must be a number from 0 to 1"),
        ({"threshold": 1.2, "warmup_steps": 0}, "warmup_steps must be an integer of at least 1"),
        ({"threshold": 1.2, "divisor": "all"}, "divisor must be one of 'valid', 'kept'"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ErrorNormTruncation(**{"warmup_steps": 1, **arguments})


def test_a_warm_up_must_be_named() -> None:
    with pytest.raises(TypeError, match="warmup_steps"):
        ErrorNormTruncation(1.2)  # type: ignore[call-arg]  # the mistake


# ---- on a loss module


def test_it_keeps_the_contract_of_plugins() -> None:
    check_plugin(ErrorNormTruncation.example)


@pytest.mark.parametrize("divisor", ["valid", "kept"])
@pytest.mark.parametrize("arguments", [{"threshold": 1.42}, {"fraction": 0.0}])
def test_a_plugin_that_leaves_nothing_out_trains_bitwise_alike(
    arguments: dict[str, Any], divisor: str
) -> None:
    plugin = ErrorNormTruncation(**arguments, divisor=divisor, warmup_steps=1, on="loss")
    bare, weights, _ = fit(classifier(), steps=4)
    losses, watched, session = fit(classifier(), plugin, steps=4)
    assert losses == bare
    assert same(watched, weights)
    assert session.metrics()[f"{NAME}/dropped"] == 0


def by_hand(model: Classifier, number: int, divisor: str) -> tuple[Tensor, list[bool]]:
    """Return the loss of a batch without the samples above 1.1, one at a time."""
    x, y = samples(number)
    z = model(x)
    kept = [norm_by_hand(row.detach(), int(label)) <= 1.1 for row, label in zip(z, y, strict=True)]
    terms = [-row.log_softmax(0)[label] for row, label, k in zip(z, y, kept, strict=True) if k]
    total = sum(terms, start=0.0 * z.sum())
    assert isinstance(total, Tensor)
    return total / (len(y) if divisor == "valid" else len(terms)), kept


@pytest.mark.parametrize("divisor", ["valid", "kept"])
def test_a_plugin_trains_as_a_loop_that_leaves_samples_out_after_the_warm_up(divisor: str) -> None:
    model = copy.deepcopy(classifier())
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    for number in range(4):
        x, y = samples(number)
        loss, kept = by_hand(model, number, divisor)
        optimizer.zero_grad()
        (nn.functional.cross_entropy(model(x), y) if number < 2 else loss).backward()
        optimizer.step()
    plugin = ErrorNormTruncation(1.1, divisor=divisor, warmup_steps=2, on="loss")
    losses, weights, session = fit(classifier(), plugin, steps=4)
    assert close(weights, [param.detach() for param in model.parameters()], rtol=1e-4)
    assert losses[3] == pytest.approx(loss.item(), rel=1e-4)
    assert 0 < sum(kept) < len(kept)
    assert session.metrics()[f"{NAME}/dropped"] == pytest.approx(1 - sum(kept) / len(kept))


def test_nothing_is_measured_before_the_warm_up_is_over() -> None:
    plugin = ErrorNormTruncation(0.0, warmup_steps=3, on="loss")
    _, weights, session = fit(classifier(), plugin, steps=3)
    assert same(weights, fit(classifier(), steps=3)[1])
    assert f"{NAME}/dropped" not in session.metrics()


@pytest.mark.parametrize("options", [{}, {"device_mode": True}])
@pytest.mark.parametrize(("fraction", "told"), [(0.08, [3]), (0.09, []), (0.0, [])])
def test_a_share_of_less_than_one_sample_is_told_of_once(
    fraction: float, told: list[int], options: dict[str, Any]
) -> None:
    plugin = ErrorNormTruncation(fraction=fraction, warmup_steps=2, on="loss")
    _, _, session = fit(classifier(), plugin, steps=5, **options)  # of 12 samples
    assert session.metrics()[f"{NAME}/dropped"] == pytest.approx(1 / 12 if fraction > 1 / 12 else 0)
    assert [event.step for event in session.events] == told
    assert all(event.kind == "too-few" for event in session.events)


@pytest.mark.parametrize("divisor", ["valid", "kept"])
def test_where_all_are_left_out_nothing_moves(divisor: str) -> None:
    plugin = ErrorNormTruncation(0.0, divisor=divisor, warmup_steps=1, on="loss")
    losses, _, session = fit(classifier(), plugin, steps=2)
    assert losses[1] == 0.0
    assert session.metrics()["grad_norm"] == 0.0
    assert session.metrics()[f"{NAME}/dropped"] == 1.0


def test_evaluation_is_plain_and_detach_leaves_no_trace() -> None:
    model = classifier()
    keys = {name: set(vars(module)) for name, module in model.named_modules()}
    plugin = ErrorNormTruncation(0.0, warmup_steps=1, on="loss")
    _, _, session = fit(model, plugin, steps=2)
    trained = session.model
    x, y = samples(5)
    assert trained.loss(trained(x), y).item() == 0.0
    expected = nn.functional.cross_entropy(trained(x), y).item()
    assert trained.eval().loss(trained(x), y).item() == expected
    session.detach()
    assert trained.train().loss(trained(x), y).item() == expected
    assert {name: set(vars(module)) for name, module in trained.named_modules()} == keys
    assert not any(module._forward_hooks for module in trained.modules())


def test_a_resumed_run_is_the_same() -> None:
    def run(path: dict[str, Any] | None, first: int, last: int) -> tuple[Any, dict[str, Any]]:
        model = classifier()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
        plugin = ErrorNormTruncation(fraction=0.3, warmup_steps=3, on="loss")
        session = stablekit.attach(optimizer, plugin, model=model)
        if path is not None:
            model.load_state_dict(path["model"])
            optimizer.load_state_dict(path["optimizer"])
        for number in range(first, last):
            x, y = samples(number)
            optimizer.zero_grad()
            model.loss(model(x), y).backward()
            optimizer.step()
        saved: dict[str, Any] = {"model": model.state_dict()}
        saved["optimizer"] = optimizer.state_dict()
        saved["dropped"] = session.metrics().get(f"{NAME}/dropped", math.nan)
        return [param.detach() for param in model.parameters()], copy.deepcopy(saved)

    for middle in (2, 3, 5):  # before, at and after the end of the warm-up
        straight, _ = run(None, 0, 7)
        _, saved = run(None, 0, middle)
        resumed, end = run(saved, middle, 7)
        assert same(resumed, straight)
        assert end["dropped"] == 0.25


@pytest.mark.parametrize(
    ("module", "words"),
    [
        (nn.MSELoss(), "takes an nn.CrossEntropyLoss"),
        (nn.CrossEntropyLoss(reduction="sum"), "'loss' has reduction='sum'. Use"),
        (nn.CrossEntropyLoss(weight=torch.ones(5)), "'loss' has class weights"),
    ],
)
def test_other_losses_are_refused(module: nn.Module, words: str) -> None:
    model = classifier()
    model.loss = module  # type: ignore[assignment]  # the mistake
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(AttachError, match=words):
        stablekit.attach(
            optimizer, ErrorNormTruncation(1.2, warmup_steps=1, on="loss"), model=model
        )


def test_where_one_of_several_losses_is_refused_none_is_listened_to() -> None:
    model = classifier()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.losses = nn.ModuleList([nn.CrossEntropyLoss(), nn.MSELoss()])
    with pytest.raises(AttachError, match=r"'losses\.1' is a MSELoss"):
        stablekit.attach(
            optimizer, ErrorNormTruncation(1.2, warmup_steps=1, on="losses.*"), model=model
        )
    assert not any(module._forward_hooks for module in model.modules())


# ---- on the loss function of a language model


def speak(
    *plugins: Any,  # noqa: ANN401 - any plugin form
    split: bool,
    wrap: Any = None,  # noqa: ANN401 - e.g. torch.compile
    **options: Any,  # noqa: ANN401 - of attach
) -> tuple[list[Tensor], dict[str, float]]:
    """Train on sentences at once or one by one, divided by the words of the step; of two steps."""
    model = Speaker()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    session = stablekit.attach(optimizer, *plugins, model=model, **options)
    call: Any = model if wrap is None else wrap(model)
    for number in range(2):
        labels = words(number, rows=4, ignored=3)
        items = (labels[:, 1:] != -100).sum()
        optimizer.zero_grad()
        for part in labels.split(1) if split else (labels,):
            call(inputs_of(part), part, num_items_in_batch=items).backward()
        optimizer.step()
    return [param.detach() for param in model.parameters()], session.metrics()


def speak_by_hand(divisor: str) -> tuple[list[Tensor], float]:
    """Return the weights after the same two steps, the second without words above 1.2."""
    model = Speaker()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for number in range(2):
        labels = words(number, rows=4, ignored=3)
        logits = model(inputs_of(labels))
        terms, count, kept = logits.sum() * 0.0, 0, 0
        for sentence, targets in zip(logits, labels, strict=True):
            for place in range(len(targets) - 1):
                label = int(targets[place + 1])
                if label == -100:
                    continue
                count += 1
                if number == 0 or norm_by_hand(sentence[place].detach(), label) <= 1.2:
                    kept += 1
                    terms = terms - sentence[place].log_softmax(0)[label]
        optimizer.zero_grad()
        (terms / (count if divisor == "valid" else kept)).backward()
        optimizer.step()
    return [param.detach() for param in model.parameters()], 1 - kept / count


@pytest.mark.parametrize("divisor", ["valid", "kept"])
@pytest.mark.parametrize("split", [False, True])
def test_micro_batches_of_unequal_length_are_one_batch(divisor: str, split: bool) -> None:
    plugin = ErrorNormTruncation(1.2, divisor=divisor, warmup_steps=1)
    weights, metrics = speak(plugin, split=split)
    expected, dropped = speak_by_hand(divisor)
    assert close(weights, expected, rtol=1e-4)
    assert 0 < dropped < 1
    assert metrics[f"{NAME}/dropped"] == pytest.approx(dropped, rel=1e-5)


def test_device_mode_trains_alike() -> None:
    def plugin() -> ErrorNormTruncation:
        return ErrorNormTruncation(fraction=0.3, divisor="kept", warmup_steps=1)

    host, metrics = speak(plugin(), split=True)
    device, same_metrics = speak(plugin(), split=True, device_mode=True)
    assert close(device, host)
    assert same_metrics[f"{NAME}/loss_kept"] == pytest.approx(metrics[f"{NAME}/loss_kept"])
    assert metrics[f"{NAME}/loss_dropped"] > metrics[f"{NAME}/loss_kept"]


def test_in_device_mode_forward_and_step_read_nothing_on_the_host() -> None:
    with torch.device("meta"):
        model = Speaker()
        ids = torch.ones(3, 7, dtype=torch.long)
    model.loss_function = _mean_square
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    plugins = [ErrorNormTruncation(fraction=0.3, divisor="kept", warmup_steps=1)]
    plugins += [ErrorNormTruncation(1.2, warmup_steps=1, name="other")]
    session = stablekit.attach(optimizer, *plugins, model=model, device_mode=True, log_every=0)
    for _ in range(3):
        model(ids, ids, num_items_in_batch=torch.ones((), device="meta")).backward()
        optimizer.step()
    assert session.updates == 3


def _mean_square(
    logits: Tensor, labels: Tensor, num_items_in_batch: Tensor, shift_labels: Tensor | None = None
) -> Tensor:
    return logits.square().mean()


def test_a_dry_run_measures_and_changes_nothing() -> None:
    bare, _ = speak(split=True)
    plugin = ErrorNormTruncation(1.2, divisor="kept", warmup_steps=1)
    weights, metrics = speak(plugin, split=True, dry_run=True)
    assert same(weights, bare)
    assert metrics[f"{NAME}/dropped"] > 0


@compiles
def test_models_of_transformers_train_alike_plain_compiled_and_checkpointed() -> None:
    pytest.importorskip("transformers", reason="tiny models of transformers")
    from tests.logits.small import fit_hf
    from tests.monitors.families import batch, tiny

    def plugin(fraction: float) -> ErrorNormTruncation:
        return ErrorNormTruncation(fraction=fraction, divisor="kept", warmup_steps=1)

    def checkpointed(one: Any) -> Any:  # noqa: ANN401 - of transformers
        one.activation_checkpointing_enable()
        return one

    batches: list[dict[str, Any]] = [batch(number, padded=True) for number in range(3)]
    for family in ("Llama", "GPT2", "Qwen3"):
        model = tiny(family)
        bare, weights, _ = fit_hf(model, batches)
        losses, neutral, _ = fit_hf(model, batches, plugin(0.0))
        assert losses == bare
        assert same(neutral, weights)
        _, expected, session = fit_hf(model, batches, plugin(0.2))
        assert 0 < session.metrics()[f"{NAME}/dropped"] < 1
        assert not same(expected, weights)
        if family == "Llama":
            for wrap in (checkpointed, lambda one: torch.compile(one, backend="eager")):
                _, found, _ = fit_hf(model, batches, plugin(0.2), wrap=wrap)
                assert close(found, expected)


def test_under_trainer_accumulated_micro_batches_are_one_batch(tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="tiny models of transformers")
    from stablekit_transformers import StableKitCallback
    from tests.transformers.tiny import text, trainer, weights

    rows = []
    for place, row in enumerate(text(32)):
        labels = row["labels"].clone()
        labels[: 5 * (place % 8)] = -100
        rows.append({"input_ids": row["input_ids"], "labels": labels})
    found = []
    for size, parts in ((8, 1), (2, 4)):
        plugin = ErrorNormTruncation(0.998, divisor="kept", warmup_steps=1)
        made = trainer(
            tmp_path,
            callbacks=[StableKitCallback(plugin)],
            rows=rows,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=parts,
            train_sampling_strategy="sequential",
        )
        made.train()
        dropped = [entry.get(f"{NAME}/dropped") for entry in made.state.log_history]
        found.append((weights(made.model), [one for one in dropped if one is not None]))
    torch.testing.assert_close(found[0][0], found[1][0])
    assert found[0][1] == pytest.approx(found[1][1], rel=1e-4)
    assert any(0 < share < 1 for share in found[0][1])
