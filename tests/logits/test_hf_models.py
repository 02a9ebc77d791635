"""Z-loss and soft-capping on models of transformers, and under Trainer."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn

transformers = pytest.importorskip("transformers", reason="models of transformers are trained")

import stablekit  # noqa: E402
from stablekit.errors import AttachError  # noqa: E402
from stablekit_logits import SoftCap, ZLoss, soft_cap  # noqa: E402
from stablekit_transformers import StableKitCallback  # noqa: E402
from tests.logits.models import z_by_hand  # noqa: E402
from tests.monitors.families import WORDS, batch, tiny  # noqa: E402
from tests.transformers.tiny import text, trainer, weights  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

FAMILIES = ("Llama", "GPT2", "Qwen3")
every_family = pytest.mark.parametrize("family", FAMILIES)
PLUGINS: dict[str, Callable[[], list[Any]]] = {
    "z-loss": lambda: [ZLoss(0.1)],
    "z-loss on a module": lambda: [ZLoss(0.1, on="lm_head")],
    "soft-cap": lambda: [SoftCap(2.0)],
    "both": lambda: [ZLoss(0.1), SoftCap(2.0)],
}
every_plugin = pytest.mark.parametrize("make", PLUGINS.values(), ids=PLUGINS.keys())


def rate(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2)


def trained(model: Any, *plugins: Any, call: Any = None, **options: Any) -> Any:  # noqa: ANN401
    """Train for 3 steps and return losses, weights and metrics."""
    optimizer, losses, metrics = rate(model), [], {}
    session = stablekit.attach(optimizer, *plugins, model=model, **options) if plugins else None
    for step in range(3):
        optimizer.zero_grad()
        loss = (call or model)(**batch(step, padded=True)).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    if session is not None:
        metrics = session.metrics()
        session.detach()
    return torch.stack(losses), weights(model), metrics


@every_family
def test_weight_zero_and_dry_runs_train_bit_for_bit_as_without(family: str) -> None:
    losses, bare, _ = trained(tiny(family))
    for plugins, options in (
        ([ZLoss(0.0)], {}),
        ([ZLoss(0.0, on="lm_head")], {}),
        ([ZLoss(0.1), SoftCap(2.0)], {"dry_run": True}),
    ):
        seen, found, metrics = trained(tiny(family), *plugins, **options)
        assert torch.equal(seen, losses)
        assert torch.equal(found, bare)
        assert metrics["z-loss/z"] > 0


@pytest.mark.parametrize("family", [*FAMILIES, "Mixtral", "Gemma"])
def test_the_loss_gets_the_term_of_positions_that_have_a_next_word(family: str) -> None:
    model = tiny(family)
    inputs = batch(padded=True)
    plain = model(**inputs)
    total, count = z_by_hand(plain.logits, inputs["labels"])
    with stablekit.attach(rate(model), ZLoss(0.1), model=model):
        found = model(**inputs).loss
        divided = model(**inputs, num_items_in_batch=torch.tensor(50)).loss
    torch.testing.assert_close(found, plain.loss + 0.1 * total / count)
    torch.testing.assert_close(divided, (plain.loss * count + 0.1 * total) / 50)


@every_family
def test_logits_are_capped_in_training_evaluation_and_generation(family: str) -> None:
    model = tiny(family).eval()
    inputs = batch()
    expected = soft_cap(model(**inputs).logits, 2.0)
    with stablekit.attach(rate(model), SoftCap(2.0), model=model):
        assert torch.equal(model(**inputs).logits, expected)
        said = model.generate(
            inputs["input_ids"],
            max_new_tokens=1,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
            pad_token_id=0,
        )
        torch.testing.assert_close(said.logits[0], expected[:, -1].detach())
        torch.testing.assert_close(model.train()(**inputs).logits, expected)


def test_the_cap_is_that_of_gemma_2_which_is_refused() -> None:
    model, inputs = tiny("Gemma2", final_logit_softcapping=2.0), batch()
    expected = model(**inputs).loss
    with pytest.raises(AttachError, match=r"caps its logits at 2\.0 itself"):
        stablekit.attach(rate(model), SoftCap(2.0), model=model)
    model.config.final_logit_softcapping = None
    with stablekit.attach(rate(model), SoftCap(2.0), model=model):
        torch.testing.assert_close(model(**inputs).loss, expected)


@every_plugin
@every_family
def test_gradient_checkpointing_makes_no_difference(
    make: Callable[[], list[Any]], family: str
) -> None:
    losses, found, metrics = trained(tiny(family), *make())
    model = tiny(family)
    # Named otherwise before transformers 5.
    enable = getattr(model, "activation_checkpointing_enable", None)
    (enable or model.gradient_checkpointing_enable)()
    again = trained(model, *make())
    torch.testing.assert_close(again[0], losses)
    torch.testing.assert_close(again[1], found)
    assert again[2] == pytest.approx(metrics)


# torch.compile itself instantiates the autograd functions it traces, and asks losses for .grad.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
@every_plugin
def test_a_compiled_model_trains_alike_without_compiling_anew(
    make: Callable[[], list[Any]],
) -> None:
    losses, found, metrics = trained(tiny("Llama"), *make())
    compiled, counts = [], []

    def backend(graph: Any, example: Any) -> Any:  # noqa: ANN401 - as torch
        compiled.append(1)
        return graph.forward

    model = tiny("Llama")
    fast: Any = torch.compile(model, backend=backend)

    def call(**inputs: Tensor) -> Any:  # noqa: ANN401 - a model's output
        said = fast(**inputs)
        counts.append(len(compiled))
        return said

    again = trained(model, *make(), call=call)
    torch.testing.assert_close(again[0], losses)
    torch.testing.assert_close(again[1], found)
    assert again[2] == pytest.approx(metrics, rel=1e-5)
    assert counts[0] == counts[-1]


@every_plugin
def test_the_model_is_saved_and_copied_as_it_would_be_without(
    make: Callable[[], list[Any]], tmp_path: Path
) -> None:
    model, inputs = tiny("Llama"), batch()
    plain = model.eval()(**inputs).loss
    before, keys = dict(vars(model)), list(model.state_dict())
    session = stablekit.attach(rate(model), *make(), model=model)
    assert list(model.state_dict()) == keys
    model.save_pretrained(tmp_path)
    copy.deepcopy(model)
    session.detach()
    again = type(model).from_pretrained(tmp_path)
    assert torch.equal(again(**inputs).loss, plain)
    assert torch.equal(model(**inputs).loss, plain)
    assert vars(model).keys() == before.keys()
    assert not any(module._forward_hooks for module in model.modules())


def small(kind: str) -> tuple[Any, dict[str, Tensor]]:
    """Return a model that classifies sequences, tokens, words or images, and a batch."""
    torch.manual_seed(0)
    family = kind.partition("For")[0]
    settings: dict[str, Any] = {"num_labels": 3}
    if family == "GPT2":
        settings |= {"n_embd": 16, "n_layer": 1, "n_head": 2, "pad_token_id": 0}
        settings |= dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    else:
        settings |= {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        settings |= {"intermediate_size": 16, "classifier_dropout": 0.0}
    if family == "ViT":
        settings |= {"image_size": 8, "patch_size": 4}
        inputs = {"pixel_values": torch.randn(2, 3, 8, 8), "labels": torch.tensor([2, 0])}
    else:
        settings |= {"vocab_size": WORDS, "pad_token_id": 0}
        words = batch()["input_ids"]
        per_word = (words % 3).masked_fill(words > 40, -100)
        is_one = "Sequence" in kind
        inputs = {"input_ids": words, "labels": torch.tensor([2, 0]) if is_one else per_word}
    model = getattr(transformers, kind)(getattr(transformers, f"{family}Config")(**settings))
    return model.train(), inputs


@pytest.mark.parametrize(
    ("kind", "items"),
    [
        ("LlamaForSequenceClassification", None),
        ("LlamaForTokenClassification", None),
        ("ViTForImageClassification", None),
        ("ViTForImageClassification", 7),
    ],
)
def test_classifiers_of_sequences_tokens_and_images_get_it_too(
    kind: str, items: int | None
) -> None:
    model, inputs = small(kind)
    if items is not None:
        inputs |= {"num_items_in_batch": torch.tensor(items)}
    plain = model(**inputs)
    levels = plain.logits.exp().sum(-1).log().square()
    counted = levels[inputs["labels"] != -100]
    expected = counted.sum() / (items or len(counted))
    with stablekit.attach(rate(model), ZLoss(0.1), model=model):
        torch.testing.assert_close(model(**inputs).loss, plain.loss + 0.1 * expected)


@pytest.mark.parametrize("kind", ["GPT2ForSequenceClassification", "BertForTokenClassification"])
def test_classifiers_that_compute_their_loss_themselves_take_the_name_of_their_head(
    kind: str,
) -> None:
    model, inputs = small(kind)
    on = "score" if kind.startswith("GPT2") else "classifier"
    optimizer = rate(model)
    with stablekit.attach(optimizer, ZLoss(), model=model):
        model(**inputs).loss.backward()
        with pytest.raises(AttachError, match=f"on={on}; "):
            optimizer.step()
    with stablekit.attach(optimizer, ZLoss(on=on), model=model) as session:
        model(**inputs).loss.backward()
        optimizer.step()
        assert session.metrics()["z-loss/z"] > 0


def test_a_regression_is_refused() -> None:
    model, inputs = small("LlamaForSequenceClassification")
    model.config.problem_type, model.config.num_labels = "regression", 1
    stablekit.attach(rate(model), ZLoss(), model=model)
    with pytest.raises(AttachError, match="regression"):
        model(**inputs)


def test_a_loss_of_two_logits_is_refused_by_name() -> None:
    model, _ = small("LlamaForQuestionAnswering")
    with pytest.raises(AttachError, match="ForQuestionAnsweringLoss"):
        stablekit.attach(rate(model), ZLoss(), model=model)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_the_model_inside_peft_is_found() -> None:
    peft = pytest.importorskip("peft", reason="adapters are put around a model")
    model, inputs = tiny("Llama"), batch()
    plain = model(**inputs)
    total, count = z_by_hand(plain.logits, inputs["labels"])
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))
    with stablekit.attach(rate(wrapped), ZLoss(0.1), SoftCap(1e4), model=wrapped):
        torch.testing.assert_close(wrapped(**inputs).loss, plain.loss + 0.1 * total / count)


def rows(count: int) -> list[dict[str, Tensor]]:
    """Return rows of text of which ever more is ignored."""
    found = []
    for place, row in enumerate(text(count)):
        labels = row["labels"].clone()
        labels[: 5 * (place % 8)] = -100
        found.append({"input_ids": row["input_ids"], "labels": labels})
    return found


def test_under_trainer_accumulated_micro_batches_are_one_batch(tmp_path: Path) -> None:
    found = []
    for size, parts in ((8, 1), (2, 4)):
        callback = StableKitCallback(ZLoss(0.1), SoftCap(2.0))
        made = trainer(
            tmp_path,
            callbacks=[callback],
            rows=rows(32),
            per_device_train_batch_size=size,
            gradient_accumulation_steps=parts,
            train_sampling_strategy="sequential",
        )
        made.train()
        logs = [entry for entry in made.state.log_history if "z-loss/z" in entry]
        found.append((weights(made.model), [entry["z-loss/z"] for entry in logs]))
        assert [entry["z-loss/ce"] < entry["loss"] for entry in logs] == [True] * 4
    torch.testing.assert_close(found[0][0], found[1][0])
    assert found[0][1] == pytest.approx(found[1][1], rel=1e-4)


@pytest.mark.parametrize("way", ["compute_loss_func", "label smoothing"])
def test_a_loss_that_trainer_computes_itself_is_an_error(way: str, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"label_smoothing_factor": 0.1} if way == "label smoothing" else {}
    made = trainer(tmp_path, callbacks=[StableKitCallback(ZLoss())], **changes)
    if way == "compute_loss_func":
        made.compute_loss_func = lambda outputs, labels, num_items_in_batch: outputs.logits.sum()
    with pytest.raises(AttachError, match=way.replace(" ", "_")):
        made.train()


def test_under_trainer_the_evaluation_loss_is_the_models(tmp_path: Path) -> None:
    made = trainer(
        tmp_path,
        callbacks=[StableKitCallback(ZLoss(0.1))],
        evaluate=text(4),
        eval_strategy="steps",
        eval_steps=4,
    )
    made.train()
    (seen,) = [e["eval_loss"] for e in made.state.log_history if "eval_loss" in e]
    assert seen == pytest.approx(made.evaluate()["eval_loss"], rel=1e-6)
