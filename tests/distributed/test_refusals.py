"""What hides parameters or steps from a session is refused, and the message names what is not."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import optim

import stablekit
from stablekit.errors import AttachError

if TYPE_CHECKING:
    from collections.abc import Callable

    Group = Callable[[int], list[dict[str, Any]]]

SUPPORTED = r"Supported are plain torch, DDP, FSDP2 \(torch.distributed.fsdp.fully_shard\)"


@pytest.mark.distributed
@pytest.mark.parametrize("how", ["original parameters", "flat parameters", "attached before"])
def test_fsdp1_is_refused(group: Group, how: str) -> None:
    for seen in group(2):
        said = seen["flat"][how]
        assert "FSDP1" in said
        assert "fully_shard" in said


class Holder:
    """Shaped as the optimizers of engines: it steps one inside."""

    def __init__(self, optimizer: optim.Optimizer) -> None:
        self.optimizer = optimizer

    def step(self) -> None:
        self.optimizer.step()


def engine(name: str, module: str) -> type[Holder]:
    kind: type[Holder] = type(name, (Holder,), {})
    kind.__module__ = module
    return kind


ENGINES = [
    engine("DeepSpeedZeroOptimizer", "deepspeed.runtime.zero.stage_1_and_2"),
    engine("DeepSpeedZeroOptimizer_Stage3", "deepspeed.runtime.zero.stage3"),
    engine("BF16_Optimizer", "deepspeed.runtime.bf16_optimizer"),
    engine("DistributedOptimizer", "megatron.core.optimizer.distrib_optimizer"),
    engine("Float16OptimizerWithFloat16Params", "megatron.core.optimizer.optimizer"),
]
WRAPPERS = [
    engine("DeepSpeedOptimizerWrapper", "accelerate.utils.deepspeed"),
    engine("MegatronLMOptimizerWrapper", "accelerate.utils.megatron_lm"),
]


@pytest.mark.parametrize("kind", ENGINES + WRAPPERS)
def test_optimizers_of_engines_are_refused_with_what_is_supported(kind: type[Holder]) -> None:
    with pytest.raises(AttachError, match=f"{kind.__name__} cannot be attached to.*{SUPPORTED}"):
        stablekit.attach(kind(optim.SGD([torch.zeros(1)])), "global-norm")


@pytest.mark.parametrize("kind", ENGINES)
def test_an_engine_that_takes_over_later_is_refused_at_its_first_step(kind: type[Holder]) -> None:
    optimizer = optim.SGD([torch.zeros(1, requires_grad=True)])
    stablekit.attach(optimizer, "global-norm")
    with pytest.raises(AttachError, match=f"handed to {kind.__name__}.*{SUPPORTED}"):
        kind(optimizer).step()


def test_a_training_loop_of_that_name_is_not_an_engine() -> None:
    optimizer = optim.SGD([torch.zeros(1, requires_grad=True)])
    session = stablekit.attach(optimizer, "global-norm")
    engine("DeepSpeedEngine", "deepspeed.runtime.engine")(optimizer).step()
    engine("MyOptimizer", "my.project")(optimizer).step()
    assert session.number == 2
