"""What holds for every monitor that looks at forward passes: when it looks, and what it leaves."""

from __future__ import annotations

import copy
import io
import math
import pickle
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import stablekit
from stablekit.errors import AttachError
from stablekit_monitors import (
    ActivationMonitor,
    AttentionMonitor,
    ContrastiveMonitor,
    LogitsMonitor,
    ResidualMonitor,
)
from tests.monitors.watched import Run, Transformer, backward, hooks_in, words

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

SELF: dict[str, Any] = {"query": "blocks.*.attn.wq", "key": "blocks.*.attn.wk", "head_dim": 4}
MAKERS: dict[str, Callable[..., Any]] = {
    "residual": lambda every=1, **more: ResidualMonitor(every, **more),
    "logits": lambda every=1, **more: LogitsMonitor(every, **more),
    "attention": lambda every=1, **more: AttentionMonitor(every, **SELF, **more),
    "exact attention": lambda every=1, **more: AttentionMonitor(
        every, mode="exact", layers="blocks.*.attn", **more
    ),
    "contrastive": lambda every=1, **more: ContrastiveMonitor(
        every, first="first", second="second", **more
    ),
    "activation": lambda every=1, **more: ActivationMonitor(every, **more),
}
MEASURING = [name for name in MAKERS if name != "activation"]
COMPILED = [name for name in MEASURING if name != "exact attention"]

# Dynamo silences this warning by other means than a filter, which turning it into an error undoes.
compiles = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
every_monitor = pytest.mark.parametrize("name", MAKERS)
every_measure = pytest.mark.parametrize("name", MEASURING)


def own(metrics: dict[str, float]) -> dict[str, float]:
    """Keep what monitors of models record."""
    return {key: value for key, value in metrics.items() if "-monitor/" in key}


@every_monitor
def test_without_a_model_the_error_says_how_to_give_one(name: str) -> None:
    optimizer = torch.optim.SGD(Transformer().parameters(), lr=0.1)
    with pytest.raises(AttachError, match=r"model=\.\.\."):
        stablekit.attach(optimizer, MAKERS[name]())


@every_monitor
def test_detach_takes_every_hook_away(name: str) -> None:
    model = Transformer()
    before = hooks_in(model)
    run = Run(MAKERS[name](), model=model)
    assert hooks_in(model) > before + 1
    run.step()
    assert run.session is not None
    run.session.detach()
    assert hooks_in(model) == before


@every_monitor
def test_training_is_the_same_bit_by_bit(name: str) -> None:
    bare, watched = Run(), Run(MAKERS[name]())
    for _ in range(3):
        bare.step()
        watched.step()
    pairs = zip(bare.model.parameters(), watched.model.parameters(), strict=True)
    assert all(torch.equal(ours, theirs) for ours, theirs in pairs)


@every_measure
def test_only_steps_that_every_divides_are_sampled(name: str) -> None:
    run = Run(MAKERS[name](3))
    seen = [own(run.step()) for _ in range(5)]
    assert seen[0] == seen[1] == {}
    assert seen[2]
    assert seen[4] == seen[2]


class Operations(TorchDispatchMode):
    """Counts what reaches torch."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(
        self,
        func: Any,  # noqa: ANN401 - as torch
        types: Any,  # noqa: ANN401 - as torch
        args: Any = (),  # noqa: ANN401 - as torch
        kwargs: dict[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401 - as torch
        self.count += 1
        return func(*args, **(kwargs or {}))


def operations_of_three_steps(*monitors: Any) -> list[int]:  # noqa: ANN401 - plugins
    run = Run("global-norm", *monitors, log_every=0)
    counts = []
    for number in range(3):
        with Operations() as operations:
            backward(run.model, number)
            run.optimizer.step()
        counts.append(operations.count)
    return counts


@every_monitor
def test_a_step_that_is_not_sampled_costs_no_operation(name: str) -> None:
    bare, watched = operations_of_three_steps(), operations_of_three_steps(MAKERS[name](3))
    assert watched[:2] == bare[:2]
    assert watched[2] > bare[2]


@every_measure
def test_batches_in_evaluation_or_without_gradients_do_not_count(name: str) -> None:
    run, alone = Run(MAKERS[name]()), Run(MAKERS[name]())
    assert run.session is not None
    run.model.eval()
    run.model(words(7) * 0)
    run.model.train()
    with torch.no_grad():
        run.model(words(8) * 0)
    with run.session.paused():
        run.model(words(9) * 0)
    assert own(run.step(1)) == own(alone.step(1))


@every_measure
def test_micro_batches_of_a_step_count_together(name: str) -> None:
    together, first, second = (Run(MAKERS[name]()) for _ in range(3))
    both, one, other = own(together.step(1, 2)), own(first.step(1)), own(second.step(2))
    for key, value in both.items():
        low, high = sorted((one[key], other[key]))
        slack = 1e-5 * abs(high) if name != "attention" else math.inf
        assert low - slack <= value <= high + slack, key
    assert both != one


@every_measure
@pytest.mark.parametrize("checkpointing", ["plain", "reentrant"])
def test_what_gradient_checkpointing_computes_again_counts_once(
    name: str, checkpointing: str
) -> None:
    plain = Run(MAKERS[name](), model=Transformer())
    again = Run(MAKERS[name](), model=Transformer(checkpointing))
    for batches in ((1, 2), (3,)):
        expected, found = own(plain.step(*batches)), own(again.step(*batches))
        assert found == pytest.approx(expected, rel=1e-6)


@compiles
@pytest.mark.parametrize("name", COMPILED)
@pytest.mark.parametrize("checkpointing", ["", "plain"])
def test_a_compiled_model_shows_the_same_and_is_not_compiled_anew_each_step(
    name: str, checkpointing: str
) -> None:
    torch._dynamo.reset()
    graphs = []

    def count(graph: Any, inputs: Any) -> Any:  # noqa: ANN401 - as torch
        graphs.append(graph)
        return graph.forward

    model = Transformer(checkpointing)
    compiled = torch.compile(model, backend=count)
    plain, run = Run(MAKERS[name](2)), Run(MAKERS[name](2), model=model)
    run.model = compiled
    for step in range(6):
        found, expected = own(run.step(step, step + 1)), own(plain.step(step, step + 1))
        assert found == pytest.approx(expected, rel=1e-5)
        if step == 1:
            after_both_kinds = len(graphs)
    assert len(graphs) == after_both_kinds


@compiles
@pytest.mark.parametrize("name", ["exact attention", "activation"])
def test_a_monitor_that_cannot_look_into_a_compiled_model_says_so(name: str) -> None:
    torch._dynamo.reset()
    model = Transformer()
    run = Run(MAKERS[name](), model=model)
    run.model = torch.compile(model, backend="eager")
    run.step()
    (event,) = run.events("unseen")
    assert event.plugin == f"{name.split()[-1]}-monitor"
    assert event.message.endswith("Inside torch.compile nothing of this is seen")


@every_monitor
def test_a_model_that_is_not_the_one_in_training_is_reported_once(name: str) -> None:
    with pytest.warns(stablekit.errors.NoEffectWarning):
        run = Run(MAKERS[name](2), attached=Transformer())
    for _ in range(6):
        run.step()
    (event,) = run.events("unseen")
    assert event.step == 2
    assert all(math.isnan(value) for value in own(run.metrics()).values())


@every_monitor
def test_a_copy_of_the_model_is_not_watched(name: str) -> None:
    run, alone = Run(MAKERS[name]()), Run(MAKERS[name]())
    hooks = [h for m in run.model.modules() for h in m._forward_hooks.values()]
    pickle.loads(pickle.dumps(hooks[1:]))
    handles = list(run.model._forward_hooks)[:1]  # the session's own
    own_hook = run.model._forward_hooks.pop(handles[0])
    twin = copy.deepcopy(run.model)
    run.model._forward_hooks[handles[0]] = own_hook
    backward(twin, 9)
    assert own(run.step(1)) == own(alone.step(1))


@every_measure
def test_a_resumed_run_samples_the_same_steps(name: str) -> None:
    straight = Run(MAKERS[name](3))
    straight.step()
    straight.step()
    buffer = io.BytesIO()
    torch.save([straight.model.state_dict(), straight.optimizer.state_dict()], buffer)
    expected = own(straight.step())
    resumed = Run(MAKERS[name](3))
    buffer.seek(0)
    model, optimizer = torch.load(buffer, weights_only=True)
    resumed.model.load_state_dict(model)
    resumed.optimizer.load_state_dict(optimizer)
    resumed.number = 2
    assert own(resumed.step()) == expected != {}


@every_measure
def test_device_mode_records_the_same(name: str) -> None:
    host, device = Run(MAKERS[name]()), Run(MAKERS[name](), device_mode=True, log_every=0)
    assert own(device.step()) == pytest.approx(own(host.step()), rel=1e-6)


@every_measure
def test_a_module_inside_ddp_is_found_by_its_own_name(name: str, group_of_one: None) -> None:
    bare, model = Run(MAKERS[name]()), Transformer()
    parallel = nn.parallel.DistributedDataParallel(model)
    run = Run(MAKERS[name](), model=parallel)
    assert own(run.step()) == own(bare.step())


@pytest.fixture
def group_of_one(tmp_path: Path) -> Iterator[None]:
    """A process group of this process alone."""
    store = f"file://{tmp_path / 'store'}"
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@compiles
@pytest.mark.parametrize("way", ["wrapped", "in place"])
@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("residual", "attach before torch.compile"),
        ("attention", "attach before torch.compile"),
        ("contrastive", "attach before torch.compile"),
        ("activation", "Inside torch.compile nothing of this is seen"),
        ("exact attention", "Inside torch.compile nothing of this is seen"),
    ],
)
def test_a_model_compiled_before_it_is_attached_says_so(name: str, advice: str, way: str) -> None:
    torch._dynamo.reset()
    bare: Any = Transformer()
    if way == "in place":
        bare.compile(backend="eager")
    model: Any = bare if way == "in place" else torch.compile(bare, backend="eager")
    backward(model)
    run = Run(MAKERS[name](), model=model)
    run.step()
    (event,) = run.events("unseen")
    assert advice in event.message
    assert "training mode" not in event.message


def test_a_name_that_matches_nothing_is_an_error_that_shows_names() -> None:
    with pytest.raises(AttachError, match=r"blocks='layers\.\*'.*nearest names are blocks"):
        Run(ResidualMonitor(blocks="layers.*"))


@every_monitor
def test_hooks_are_gone_after_a_refused_attach(name: str) -> None:
    model = Transformer()
    before = hooks_in(model)
    bad = {"residual": ResidualMonitor(blocks="x"), "logits": LogitsMonitor(module="x")}
    bad |= {"attention": AttentionMonitor(), "exact attention": AttentionMonitor(mode="exact")}
    bad |= {"contrastive": ContrastiveMonitor(first="head", second="x")}
    bad |= {"activation": ActivationMonitor(watch="x")}
    with pytest.raises(AttachError):
        Run(bad[name], model=model)
    assert hooks_in(model) == before
