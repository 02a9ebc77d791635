"""Operated models train as others do: checkpointing, compiled, sharded, cached, in Trainer."""

from __future__ import annotations

import pickle
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

pytest.importorskip("transformers")

from stablekit_layers import PeriNorm, QKNorm, apply, load
from tests.layers.models import (
    FAMILIES,
    LENGTH,
    llama,
    logits,
    mistral,
    qwen2,
    shake,
    tokens,
    train,
    transformers,
)

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

CASES = [
    (family, surgery)
    for family in FAMILIES
    for surgery in (QKNorm(), PeriNorm())
    if family != "qwen3" or surgery.name != "qk-norm"
]
each = pytest.mark.parametrize(("family", "surgery"), CASES)


def operated(family: str, surgery: Any) -> Any:  # noqa: ANN401
    model = apply(FAMILIES[family](), surgery)
    shake(model)
    return model


@each
def test_every_new_parameter_is_trained(family: str, surgery: Any) -> None:  # noqa: ANN401
    model = operated(family, surgery)
    before = {name: param.detach().clone() for name, param in model.named_parameters()}
    losses = train(model)
    assert all(loss.isfinite() for loss in losses)
    still = [name for name, param in model.named_parameters() if torch.equal(param, before[name])]
    assert not still


# Newer releases of transformers call it activation_checkpointing_enable.
@pytest.mark.filterwarnings("ignore::FutureWarning")
@each
def test_gradient_checkpointing_changes_nothing(family: str, surgery: Any) -> None:  # noqa: ANN401
    one, other = (operated(family, surgery) for _ in range(2))
    other.gradient_checkpointing_enable()
    _same(train(one), train(other), one, other)


@each
def test_compiled_it_computes_the_same_without_graph_breaks(
    family: str,
    surgery: Any,  # noqa: ANN401
) -> None:
    torch._dynamo.reset()
    one, other = (operated(family, surgery) for _ in range(2))
    compiled = torch.compile(other, backend="eager", fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        losses = train(other, forward=compiled)
    _same(train(one), losses, one, other)


@each
def test_pickled_it_computes_the_same(family: str, surgery: Any) -> None:  # noqa: ANN401
    model = operated(family, surgery)
    again = pickle.loads(pickle.dumps(model))
    assert torch.equal(logits(again), logits(model))
    _same(train(model), train(again), model, again)


@each
def test_generation_with_a_cache_equals_generation_without(
    family: str,
    surgery: Any,  # noqa: ANN401
) -> None:
    model = operated(family, surgery).eval()
    ids = tokens(rows=1)
    settings = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    cached, plain = (model.generate(ids, use_cache=use, **settings) for use in (True, False))
    assert torch.equal(cached, plain)
    assert cached.shape == (1, LENGTH + 6)


@pytest.fixture(scope="module")
def _one_process() -> Iterator[None]:
    store = dist.HashStore()  # type: ignore[attr-defined]
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@each
@pytest.mark.usefixtures("_one_process")
def test_sharded_by_fsdp2_it_trains_the_same(family: str, surgery: Any) -> None:  # noqa: ANN401
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    one, other = (operated(family, surgery) for _ in range(2))
    mesh = init_device_mesh("cpu", (1,))
    blocks: Any = next(m for m in other.modules() if isinstance(m, nn.ModuleList))
    for block in blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(other, mesh=mesh)
    plain, sharded = train(one), train(other)
    for a, b in zip(plain, sharded, strict=True):
        assert torch.allclose(a, b, atol=1e-6)
    norms = [param for name, param in other.named_parameters() if name.endswith("_norm.weight")]
    assert all(hasattr(param, "full_tensor") for param in norms)


@pytest.mark.parametrize("make", [mistral, qwen2])
def test_other_families_train_and_generate_alike(make: Any) -> None:  # noqa: ANN401
    model = apply(make(), QKNorm(), PeriNorm())
    names = [name for name, _ in model.named_parameters() if name.endswith("_norm.weight")]
    assert len(names) == 2 * 4 + 1
    before = {name: param.detach().clone() for name, param in model.named_parameters()}
    assert all(loss.isfinite() for loss in train(model))
    assert not [name for name in names if torch.equal(model.get_parameter(name), before[name])]
    ids = tokens(rows=1)
    settings = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    cached, plain = (model.eval().generate(ids, use_cache=use, **settings) for use in (True, False))
    assert torch.equal(cached, plain)


def _same(losses: list[Tensor], others: list[Tensor], one: nn.Module, other: nn.Module) -> None:
    for a, b in zip(losses, others, strict=True):
        assert torch.equal(a, b)
    for p, q in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)


def _trainer(model: nn.Module, folder: Path, **changes: Any) -> Any:  # noqa: ANN401
    settings = {
        "output_dir": str(folder),
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-3,
        "weight_decay": 0.1,
        "save_steps": 2,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        **changes,
    }
    rows = [{"input_ids": row, "labels": row} for row in tokens(rows=16)]
    arguments = transformers.TrainingArguments(**settings)
    return transformers.Trainer(model=model, args=arguments, train_dataset=rows)


@pytest.mark.parametrize(
    ("family", "surgeries"),
    [("llama", (QKNorm(), PeriNorm())), ("gpt2", (QKNorm(), PeriNorm())), ("qwen3", (PeriNorm(),))],
)
def test_trainer_saves_resumes_and_loads_it(
    tmp_path: Path, family: str, surgeries: tuple[Any, ...]
) -> None:
    model = apply(FAMILIES[family](), *surgeries)
    trainer = _trainer(model, tmp_path / "whole")
    trainer.train()
    decays = [group["weight_decay"] for group in trainer.optimizer.param_groups]
    gains = {id(p) for name, p in model.named_parameters() if name.endswith("_norm.weight")}
    decayed = {id(p) for p in trainer.optimizer.param_groups[0]["params"]}
    assert decays == [0.1, 0.0]
    assert gains
    assert not gains & decayed

    again = apply(FAMILIES[family](), *surgeries)
    resumed = _trainer(again, tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    for ours, theirs in zip(again.parameters(), model.parameters(), strict=True):
        assert torch.equal(ours, theirs)

    loaded: Any = load(type(model), tmp_path / "whole" / "checkpoint-4", surgeries=surgeries)
    assert torch.equal(logits(loaded), logits(model))


# Trainer warns of the weights that are left over, and goes on to the optimizer.
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_trainer_does_not_resume_a_plain_model_from_it(tmp_path: Path) -> None:
    _trainer(apply(llama(), QKNorm()), tmp_path).train()
    with pytest.raises(ValueError, match="parameter group that doesn't match the size"):
        _trainer(llama(), tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
