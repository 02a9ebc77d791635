"""Parameters that are whole on one rank while other ranks have others: pipelines and experts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, final

import torch
import torch.distributed as dist
from torch import Tensor, nn

import stablekit
from stablekit import hookimpl
from tests.distributed.chains import Collectives, Probe
from tests.distributed.engines import mesh_of

if TYPE_CHECKING:
    from stablekit import Session, Step

STEPS, SPIKE, BAD, HIGH = 7, 3, 5, 50.0
CHAIN = [
    "nonfinite-guard",
    "zclip:warmup_steps=2",
    "adagc:warmup_steps=1",
    "global-norm:max_norm=0.3",
]


@final
class SkipHighLoss:
    """Skips a step for its loss, which only the last stage of a pipeline has."""

    name = "skip-high-loss"

    @hookimpl
    def observe_gradients(self, step: Step) -> None:
        """Skip above a fixed limit."""
        loss = step.loss
        assert loss is not None
        step.skip("the loss is high", when=loss > HIGH)


def two_stages() -> list[nn.Sequential]:
    """Return the stages of a model, the same everywhere."""
    torch.manual_seed(0)
    return [
        nn.Sequential(nn.Linear(8, 6), nn.Tanh()),
        nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 1)),
    ]


def batch(step: int, shard: int) -> tuple[Tensor, Tensor]:
    """Return the batch of a data-parallel copy; its loss is high in step SPIKE."""
    make = torch.Generator().manual_seed(10 * step + shard)
    gain = 30.0 if step == SPIKE else 1.0
    return torch.randn(4, 8, generator=make), torch.randn(4, 1, generator=make) * gain


def spoil(stage: nn.Module, step: int) -> None:
    """Put a NaN into a gradient of the last stage in step BAD."""
    weight = next(stage.parameters())
    if step == BAD:
        assert weight.grad is not None
        weight.grad[0, 0] = torch.nan


def pipeline(rank: int, world: int, *, device_mode: bool = False) -> dict[str, Any]:
    """Train one of two stages, each of which has as many copies as the ranks allow."""
    from torch.distributed.pipelining import PipelineStage, ScheduleGPipe

    copies = world // 2
    mesh = mesh_of(2, copies, names=("stage", "copy"))
    number, copy = rank // copies, rank % copies
    module = two_stages()[number]
    stage = PipelineStage(module, number, 2, torch.device("cpu"), group=mesh.get_group("stage"))
    schedule = ScheduleGPipe(stage, n_microbatches=2, loss_fn=nn.functional.mse_loss)
    run = _Run(module, [mesh.get_group("stage")], device_mode=device_mode)
    for step in range(STEPS):
        module.zero_grad()
        x, y = batch(step, copy)
        losses: list[Tensor] = []
        if number == 0:
            schedule.step(x)
        else:
            schedule.step(target=y, losses=losses)
            spoil(module, step)
        _average(module, mesh.get_group("copy"))
        run.step(losses)
    return {"stage": number, **run.seen()}


def pipeline_in_device_mode(rank: int, world: int) -> dict[str, Any]:
    """Do the same without reading the host."""
    return pipeline(rank, world, device_mode=True)


def whole_pipeline(world: int) -> dict[str, Any]:
    """Train both stages in one process."""
    stages, copies = two_stages(), world // 2
    module = nn.Sequential(*stages)
    run = _Run(module, [])
    for step in range(STEPS):
        module.zero_grad()
        losses = []
        for copy in range(copies):
            x, y = batch(step, copy)
            for part, target in zip(x.chunk(2), y.chunk(2), strict=True):
                loss = nn.functional.mse_loss(module(part), target)
                (loss / 2 / copies).backward()
                losses.append(loss.detach())
        spoil(stages[1], step)
        run.step(losses)
    return run.seen()


def experts(rank: int, world: int) -> dict[str, Any]:
    """Train one expert of several, beside parameters that all ranks have copies of."""
    model = mixture(world)
    mine = nn.ModuleDict({"router": model["router"], f"expert{rank}": model[f"expert{rank}"]})
    run = _Run(mine, {"expert*": dist.group.WORLD})
    for step in range(STEPS):
        run.step([mixture_loss(model, step, world)], counted=True)
        for owner in range(world):
            for param in model[f"expert{owner}"].parameters():
                dist.broadcast(param.data, owner)
    return run.seen()


def whole_mixture(world: int) -> dict[str, Any]:
    """Train all experts in one process."""
    model = mixture(world)
    run = _Run(model, [])
    for step in range(STEPS):
        run.step([mixture_loss(model, step, world)])
    return run.seen()


def mixture(world: int) -> nn.ModuleDict:
    """Return a router and as many experts as ranks."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"router": nn.Linear(6, 8)})
    model.update({f"expert{i}": nn.Linear(8, 1) for i in range(world)})
    return model


def mixture_loss(model: nn.ModuleDict, step: int, world: int) -> Tensor:
    """Make the gradients of all parameters; one expert's are NaN in step BAD."""
    model.zero_grad()
    make = torch.Generator().manual_seed(step)
    x, y = torch.randn(4, 6, generator=make), torch.randn(4, 1, generator=make)
    hidden = model["router"](x).tanh()
    said = torch.stack([model[f"expert{i}"](hidden) for i in range(world)]).mean(0)
    loss = nn.functional.mse_loss(said, y) * (100.0 if step == SPIKE else 1.0)
    loss.backward()
    spoil(model[f"expert{world - 1}"], step)
    return loss.detach()


@final
class _Run:
    """A session on the parameters of this rank, and what was seen of it."""

    def __init__(self, module: nn.Module, groups: Any, *, device_mode: bool = False) -> None:  # noqa: ANN401 - a form of reduce_groups
        self._module = module
        self._optimizer = torch.optim.AdamW(module.parameters(), lr=0.02, fused=True)
        self._probe = Probe()
        self._session: Session = stablekit.attach(
            self._optimizer,
            SkipHighLoss(),
            *CHAIN,
            self._probe,
            model=module,
            reduce_groups=groups,
            device_mode=device_mode,
            log_every=1,
        )
        self._collectives: list[int] = []

    def step(self, losses: list[Tensor], *, counted: bool = False) -> None:
        for loss in losses:
            self._session.observe(loss=loss)
        with Collectives() as collectives:
            self._optimizer.step()
        self._session.metrics()
        self._collectives.append(sum(collectives.seen.values()))

    def seen(self) -> dict[str, Any]:
        weights = {name: param.detach() for name, param in self._module.named_parameters()}
        events = [event.as_dict() for event in self._session.events]
        return {
            "probe": self._probe.seen,
            "names": list(weights),
            "weights": list(weights.values()),
            "events": events,
            "collectives": self._collectives,
        }


def _average(module: nn.Module, group: dist.ProcessGroup) -> None:
    for param in module.parameters():
        assert param.grad is not None
        param.grad /= dist.get_world_size(group)
        dist.all_reduce(param.grad, group=group)
