"""The same training run in one process and in several; what a rank saw comes back as plain data."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any, NamedTuple, final

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

import stablekit
from stablekit import hookimpl

if TYPE_CHECKING:
    from collections.abc import Callable

    from stablekit import Step

STEPS = 12
SPIKE, BAD_BATCH, BAD_SHARD = 6, 9, 10
HALF_WAY = 7
_HOLDER_ROW = 4


class Run(NamedTuple):
    """One way to train."""

    engine: str
    """one, ddp, fsdp2 (rows), columns, hsdp."""
    faults: bool = True
    """A NaN batch on one rank, and a NaN in one shard."""
    missing: bool = False
    """In the last step the first rank has no gradient of the first tensor, cut by columns."""
    counted: bool = False
    """Count the collectives of a few steps instead of looking at norms, which may cost some."""
    loss: bool = True
    """Observe the loss."""


@final
class Model(nn.Module):
    """Tensors that do not cut evenly: 5 rows, 3 kernels, 1 row, 1 element; and one never used."""

    def __init__(self) -> None:
        """Make the same weights everywhere."""
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(8, 5)
        self.conv = nn.Conv1d(1, 3, 3)
        self.norm = nn.LayerNorm(5)
        self.last = nn.Linear(5, 1)
        self.idle = nn.Linear(3, 2)
        self.gain = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        """Map [n, 8] to [n, 1]."""
        hidden = self.norm(torch.tanh(self.first(x))) + self.conv(x[:, None, :7]).tanh().mean(1)
        result: Tensor = self.last(hidden) * self.gain
        return result


@final
class Probe:
    """Writes down what every step was; reads norms at its end, which may measure again."""

    name = "probe"

    def __init__(self) -> None:
        """Start with an empty sheet."""
        self.seen: list[dict[str, Any]] = []

    @hookimpl
    def on_step_end(self, step: Step) -> None:
        """Note norms, loss and decision."""
        gradients = step.gradients
        self.seen.append(
            {
                "raw": gradients.raw_norms(),
                "norms": gradients.norms(),
                "norm": gradients.norm(),
                "present": gradients.present,
                "largest": gradients.amaxes(),
                "loss": step.loss,
                "ok": step.ok,
            }
        )


@final
class LossReader:
    """Asks for the loss of every step."""

    name = "loss-reader"

    @hookimpl
    def on_step_end(self, step: Step) -> None:
        """Record it."""
        if step.loss is not None:
            step.record("loss", step.loss)


@final
class Collectives(TorchDispatchMode):
    """Counts operations of torch.distributed, by name."""

    def __init__(self) -> None:
        """Start at zero."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN204
        """Run the operation."""
        if func.namespace in ("c10d", "_c10d_functional") and "wait" not in func.__name__:
            self.seen[func.__name__] += 1
        return func(*args, **(kwargs or {}))


def plugin_named(name: str) -> Any:  # noqa: ANN401 - any plugin
    """Return a plugin of the catalogue, by its example where arguments are required."""
    point = stablekit.available()[name].entry_point.partition(":")
    factory = getattr(__import__(point[0], fromlist=[point[2]]), point[2])
    return factory.example() if hasattr(factory, "example") else stablekit.create(name)


def chains() -> dict[str, Callable[[], list[Any]]]:
    """Return the chains that are trained with: each plugin, variants of some, all together."""
    guard = "nonfinite-guard"

    def one(name: str) -> Callable[[], list[Any]]:
        return lambda: [guard] if name == guard else [guard, plugin_named(name)]

    def variant(name: str, **arguments: Any) -> Callable[[], list[Any]]:  # noqa: ANN401 - a plugin's
        return lambda: [guard, stablekit.create(name, **arguments)]

    def again() -> Any:  # noqa: ANN401 - any plugin
        return stablekit.create("agc", clipping=0.001, name="again")

    names = stablekit.available()
    return {
        **{name: one(name) for name in names},
        "zclip, short warm-up": variant("zclip", warmup_steps=3, max_grad_norm=None),
        "adagc, short warm-up": variant("adagc", warmup_steps=2),
        "quantile-clip of each tensor": variant("quantile-clip", per_tensor=True),
        "global-norm of the largest": variant("global-norm", norm_type=float("inf")),
        "agc of small tensors": lambda: [guard, stablekit.only("agc", include=["gain", "*bias"])],
        "clip-value after agc": lambda: [
            guard,
            "agc",
            plugin_named("clip-value"),
            again(),
        ],
        "everything": lambda: [guard, *(plugin_named(n) for n in names if n != guard)],
    }


def counted_chains() -> dict[str, Callable[[], list[Any]]]:
    """Return what is attached when collectives are counted: each plugin, some together."""
    names = [*stablekit.available()]

    def one(name: str) -> Callable[[], list[Any]]:
        return lambda: [plugin_named(name)]

    largest = stablekit.create("global-norm", norm_type=float("inf"))
    scaling = [name for name in names if name not in {"clip-value"}]
    return {
        "not attached": list,
        **{name: one(name) for name in names},
        "global-norm(norm_type=inf)": lambda: [largest],
        "reads step.loss": lambda: [LossReader()],
        "all that scale by norms": lambda: [plugin_named(name) for name in scaling],
        "agc, clip-value, agc": lambda: ["agc", plugin_named("clip-value"), "agc:name=again"],
    }


def train(run: Run, chain: list[Any], *, rank: int = 0, world: int = 1) -> dict[str, Any]:
    """Train for STEPS steps; ``world`` is the number of data shards for engine "one"."""
    model, optimizer = build(run.engine)
    probe = Probe()
    plugins = chain if run.counted else [*chain, probe]
    session = stablekit.attach(optimizer, *plugins, model=model) if plugins else None
    seen: dict[str, Any] = {"metrics": [], "collectives": []}
    for step in range(SPIKE - 1, SPIKE + 2) if run.counted else range(STEPS):
        if step == HALF_WAY and not run.counted:
            seen["half way"] = snapshot(model, optimizer)
        one_step(run, model, optimizer, session, step, seen, rank=rank, world=world)
    seen["probe"] = probe.seen
    seen["weights"] = [full(param.detach()).clone() for param in model.parameters()]
    if session is not None:
        seen["state"] = session.state_dict()
        seen["clipped"] = session.latest.clipped_steps()
    return seen


def resume(run: Run, chain: list[Any], half_way: dict[str, Any], *, world: int) -> dict[str, Any]:
    """Go on in one process from what several had saved."""
    model, optimizer = build("one")
    probe = Probe()
    session = stablekit.attach(optimizer, *chain, probe, model=model)
    model.load_state_dict(half_way["model"])
    optimizer.load_state_dict(half_way["optimizer"])
    seen: dict[str, Any] = {"metrics": [], "collectives": []}
    for step in range(HALF_WAY, STEPS):
        one_step(run, model, optimizer, session, step, seen, rank=0, world=world)
    return {**seen, "probe": probe.seen, "state": session.state_dict()}


def build(engine: str) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Return a model in the form an engine needs, and its optimizer."""
    model = Model()
    trained: nn.Module = model
    if engine == "ddp":
        trained = DistributedDataParallel(model, find_unused_parameters=True)
    elif engine != "one":
        world = dist.get_world_size()
        shape, names = ((2, world // 2), ("copy", "cut")) if engine == "hsdp" else ((world,), None)
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)

        def place(param: nn.Parameter) -> Shard:
            return Shard(1 if engine == "columns" and param.shape[1:] == (8,) else 0)

        for layer in (model.first, model.last):
            fully_shard(layer, mesh=mesh, shard_placement_fn=place)
        fully_shard(model, mesh=mesh, shard_placement_fn=place)
    return trained, torch.optim.AdamW(model.parameters(), lr=0.02, fused=True)


def one_step(
    run: Run,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    session: stablekit.Session | None,
    step: int,
    seen: dict[str, Any],
    *,
    rank: int,
    world: int,
) -> None:
    """Make gradients and step."""
    optimizer.zero_grad()
    losses = backward(run, model, step, rank=rank, world=world)
    if run.faults and step == BAD_SHARD:
        spoil(first_weight(model))
    if run.missing and step == STEPS - 1:
        lose(run.engine, first_weight(model), rank=rank, world=world)
    if session is not None and run.loss:
        for loss in losses:
            session.observe(loss=loss)
    with Collectives() as collectives:
        optimizer.step()
    seen["collectives"].append(dict(collectives.seen))
    if session is not None:
        seen["metrics"].append(session.metrics())


def backward(run: Run, model: nn.Module, step: int, *, rank: int, world: int) -> list[Tensor]:
    """Make gradients averaged over ranks; in one process as DDP would, batch by batch."""
    if run.engine != "one":
        loss = loss_of(model, step, rank, world, faults=run.faults)
        torch.autograd.backward(loss)
        return [loss.detach()]
    losses, params = [], list(model.parameters())
    total: list[Tensor | None] = [None] * len(params)
    for shard in range(world):
        model.zero_grad()
        loss = loss_of(model, step, shard, world, faults=run.faults)
        torch.autograd.backward(loss)
        losses.append(loss.detach())
        for i, param in enumerate(params):
            if param.grad is not None:
                part, before = param.grad / world, total[i]
                total[i] = part if before is None else before + part
    for param, grad in zip(params, total, strict=True):
        param.grad = grad
    return losses


def loss_of(model: nn.Module, step: int, shard: int, world: int, *, faults: bool) -> Tensor:
    """Return the loss of one rank's batch; SPIKE is large, BAD_BATCH is NaN for the last rank."""
    make = torch.Generator().manual_seed(100 * step + shard)
    x, y = torch.randn(4, 8, generator=make), torch.randn(4, 1, generator=make)
    if faults and step == BAD_BATCH and shard == world - 1:
        x[0, 0] = torch.nan
    gain = 300.0 if step == SPIKE else 1.0 + 0.1 * step
    return nn.functional.mse_loss(model(x), y) * gain


def first_weight(model: nn.Module) -> nn.Parameter:
    """Return the [5, 8] weight."""
    return next(p for name, p in model.named_parameters() if name.endswith("first.weight"))


def spoil(param: nn.Parameter) -> None:
    """Put NaN into the last row, on the rank that holds it."""
    grad = param.grad
    assert grad is not None
    held = grad.to_local() if isinstance(grad, DTensor) else grad
    is_holder = not isinstance(grad, DTensor) or grad.device_mesh.get_local_rank(-1) == (
        grad.device_mesh.size(-1) - 1 if grad.placements[-1].is_shard(1) else _holder(grad)
    )
    if is_holder:
        held[-1, 0] = torch.nan


def lose(engine: str, param: nn.Parameter, *, rank: int, world: int) -> None:
    """Drop the gradient of the first rank; in one process its columns are zero."""
    if engine == "one":
        assert param.grad is not None
        param.grad[:, : 8 // world] = 0
    elif rank == 0:
        param.grad = None


def snapshot(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return whole tensors, by the names and numbers that one process uses."""
    inner = model.module if isinstance(model, DistributedDataParallel) else model
    saved = optimizer.state_dict()
    state = {i: {k: full(v).clone() for k, v in s.items()} for i, s in saved["state"].items()}
    weights = {name: full(value).clone() for name, value in inner.state_dict().items()}
    return {"model": weights, "optimizer": {**saved, "state": state}}


def full(tensor: Tensor) -> Tensor:
    """Return the whole of a tensor."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _holder(grad: DTensor) -> int:
    """Return which part of the last mesh dim holds the last of 5 rows."""
    return len(torch.arange(5).chunk(grad.device_mesh.size(-1))) - 1
