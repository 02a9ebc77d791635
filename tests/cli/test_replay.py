"""``stablekit replay``: the numbers of attaching live, from the record alone."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from PIL import Image

import stablekit
from stablekit.testing import factory_of
from stablekit_cli.replay._chains import Chain, ChainError, check, parse_chains
from stablekit_cli.replay._play import play
from stablekit_cli.replay._score import factors_of, score
from stablekit_cli.replay._spikes import spikes_of
from stablekit_monitors import Recorder, read_run
from tests.cli.runs import made_up_run

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from typer.testing import Result

    from stablekit_monitors import RunLog

STEPS = 90
FAULTS = {"spike": (40, 41, 63), "nan": (50,), "inf": (57,), "none": (12, 66)}

CHAINS = [
    "zclip:max_grad_norm=none",
    "zclip:max_grad_norm=none,mode=percentile,skip_update_on_spike=true",
    "autoclip:percentile=50",
    "autoclip:percentile=80,history=16",
    "quantile-clip:quantile=0.8,history=20",
    "quantile-clip:quantile=0.8,history=20,per_tensor=true",
    "adagc:warmup_steps=10",
    "adagc:warmup_steps=10,warmup_norms=clipped",
    "global-norm:max_norm=0.5",
    "nonfinite-guard+zclip",
    "nonfinite-guard+global-norm+adagc:warmup_steps=5",
    "skip-spikes:window=16,warmup_steps=8",
    "spike-monitor",
]


def _available(label: str) -> bool:
    return {part.partition(":")[0] for part in label.split("+")} <= stablekit.available().keys()


def recorded(folder: Path, chain: tuple[str, ...], *, dry_run: bool) -> RunLog:
    """Train a small network with faults, the chain attached, and return its log."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    recorder = Recorder(folder)
    with stablekit.attach(optimizer, *chain, recorder, model=model, dry_run=dry_run) as session:
        for step in range(1, STEPS + 1):
            before = [param.detach().clone() for param in model.parameters()]
            optimizer.zero_grad()
            loss = model(torch.randn(4, 6)).square().mean()
            loss.backward()
            _break(model, step)
            session.observe(loss=loss * (1000 if step in FAULTS["spike"] else 1))
            optimizer.step()
            if dry_run and step in FAULTS["nan"] + FAULTS["inf"]:
                for param, value in zip(model.parameters(), before, strict=True):
                    param.data.copy_(value)
                optimizer.state.clear()
    return read_run(folder)


def _break(model: torch.nn.Module, step: int) -> None:
    gradients = [param.grad for param in model.parameters()]
    assert gradients[0] is not None
    if step in FAULTS["spike"]:
        for gradient in gradients:
            assert gradient is not None
            gradient *= 300
    if step in FAULTS["nan"]:
        gradients[0][0, 0] = math.nan
    if step in FAULTS["inf"]:
        gradients[0][0, 0] = math.inf
    if step in FAULTS["none"]:
        next(model.parameters()).grad = None


@pytest.mark.parametrize("dry_run", [True, False], ids=["dry", "wet"])
@pytest.mark.parametrize("label", CHAINS)
def test_numbers_are_those_of_the_live_run(tmp_path: Path, label: str, dry_run: bool) -> None:
    if not _available(label):
        pytest.skip(f"{label} is not installed")
    guarded = label if dry_run or "guard" in label else f"nonfinite-guard+{label}"
    (chain,) = parse_chains([guarded])
    run = recorded(tmp_path, chain.specs, dry_run=dry_run)
    outcome = play(run, chain)

    own = {part.partition(":")[0] for part in chain.specs}
    keys = [key for key in run.scalars if key.partition("/")[0] in own]
    assert keys
    for key in [*keys, "grad_norm", "grad_norm_clipped", "loss"]:
        np.testing.assert_allclose(
            outcome.metrics[key], run.scalars[key], rtol=1e-6, atol=0, err_msg=key
        )
    assert (~outcome.skipped == run.ok).all()
    live = [(e.step, e.kind, e.plugin, e.tensors) for e in run.events if e.plugin in own]
    assert [(e.step, e.kind, e.plugin, e.tensors) for e in outcome.events if e.plugin] == live


def test_the_faults_of_that_run_make_a_difference(tmp_path: Path) -> None:
    (chain,) = parse_chains(["nonfinite-guard+zclip:max_grad_norm=none"])
    run = recorded(tmp_path, chain.specs, dry_run=True)
    outcome = play(run, chain)

    assert np.flatnonzero(outcome.skipped).tolist() == [49, 56]
    assert factors_of(outcome)[39] < 0.1
    assert not run.present[11, 0]
    assert {event.step for event in outcome.events if event.kind == "nonfinite"} == {50, 57}


@pytest.mark.parametrize("name", stablekit.available())
def test_every_plugin_is_replayed_or_refused_by_its_needs(name: str) -> None:
    plugin = factory_of(name)()
    chain = Chain(name, (plugin,))
    if getattr(plugin, "needs", ()):
        with pytest.raises(ChainError, match=f"cannot replay '{plugin.name}': it "):
            check(chain)
        return
    check(chain)
    outcome = play(made_up_run(60, spikes=(40,), nan_at=()), Chain(name, (factory_of(name)(),)))

    assert (outcome.played, outcome.stopped) == (60, "")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("agc", r"cannot replay 'agc': it looks at the norms of output units and looks at"),
        ("clip-value:limit=1.0", "it changes single elements of the gradients and"),
        ("global-norm:norm_type=inf", "it looks at the largest element of each tensor"),
        ("zclip+agc", "cannot replay 'agc'"),
        ("zclp", "did you mean 'zclip'"),
        ("zclip:z_tresh=3", "z_tresh"),
        ("autoclip:percentile=500", "percentile must be"),
    ],
)
def test_what_a_log_cannot_answer_is_refused_with_the_reason(text: str, message: str) -> None:
    with pytest.raises(ChainError, match=message):
        parse_chains([text])


def test_a_chain_given_twice_is_refused() -> None:
    with pytest.raises(ChainError, match="given twice"):
        parse_chains(["zclip", "zclip"])


def test_a_loss_that_was_not_recorded_is_not_taken_for_nan() -> None:
    run = made_up_run(60, ("a", "b", "c", "d"), spikes=(), nan_at=(40,))
    run.has_loss[:] = np.arange(60) % 10 == 9
    run.scalars["loss"][:] = np.where(run.has_loss, run.scalars["loss"], math.nan)
    run.scalars["loss"][39] = math.nan
    seen: list[float | None] = []

    class Listener:
        name = "listener"

        @stablekit.hookimpl
        def observe_gradients(self, step: stablekit.Step) -> None:
            seen.append(None if step.loss is None else step.loss.item())

    play(run, Chain("listener", (Listener(),)))

    assert [i for i, loss in enumerate(seen) if loss is not None] == [9, 19, 29, 39, 49, 59]
    assert seen[39] is not None
    assert math.isnan(seen[39])


def test_a_nan_loss_with_finite_gradients_is_skipped_as_in_the_live_run(tmp_path: Path) -> None:
    (chain,) = parse_chains(["skip-spikes:window=16,warmup_steps=8"])
    param = torch.nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([param], lr=0.1)
    with stablekit.attach(optimizer, *chain.specs, Recorder(tmp_path)) as session:
        for step in range(1, 31):
            param.grad = torch.ones(2)
            if step % 2:
                session.observe(loss=math.nan if step == 21 else 1.0)
            optimizer.step()
    run = read_run(tmp_path)
    assert np.flatnonzero(play(run, chain).skipped).tolist() == [20]
    assert np.flatnonzero(~run.ok).tolist() == [20]


def test_scores_are_counted_as_a_loop_would() -> None:
    run = made_up_run(nan_at=(255,))
    (chain,) = parse_chains(["nonfinite-guard+zclip:max_grad_norm=none"])
    outcome = play(run, chain)
    found = score(run, outcome, [120, 210, 255, 299])

    clipped = [i for i in range(300) if outcome.metrics["zclip/clipped"][i] > 0]
    factors = [
        outcome.metrics["grad_norm_clipped"][i] / outcome.metrics["grad_norm"][i] for i in clipped
    ]
    assert found.clipped == len(clipped) > 0
    assert found.share == len(clipped) / 300
    assert found.factor == pytest.approx(np.mean(factors), rel=1e-6)
    assert found.skipped == 1
    assert {120, 210, 255} == set(found.caught)
    assert found.missed == (() if 298 in clipped else (299,))


def test_clipping_does_not_count_as_catching_a_nan() -> None:
    run = made_up_run(nan_at=(255,))
    (chain,) = parse_chains(["adagc:warmup_steps=20"])
    found = score(run, play(run, chain), [255])

    assert found.missed == (255,)


def test_spikes_are_those_named_those_reported_or_none() -> None:
    run = made_up_run()

    assert spikes_of(run, [7, 3, 7]).steps == (3, 7)
    assert spikes_of(run).steps == (120, 210, 255)
    calm = made_up_run(spikes=(), nan_at=(), header={"plugins": {"spike-monitor": ""}})
    assert spikes_of(calm).steps == ()


@pytest.mark.skipif("spike-monitor" not in stablekit.available(), reason="not installed")
def test_spikes_nobody_watched_for_are_found_by_replaying_the_monitor() -> None:
    run = replace(made_up_run(), events=[])
    spikes = spikes_of(run)

    assert spikes.steps == (120, 210, 255)
    assert spikes.source == "spike-monitor, replayed"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    recorded(tmp_path / "run", ("nonfinite-guard",), dry_run=False)
    return tmp_path / "run"


def test_command_prints_a_table_and_draws_a_chart(run: Callable[..., Result], folder: Path) -> None:
    done = run("replay", folder, "--plugin", "zclip", "--plugin", "adagc:lambda_rel=1.05",
               "--spikes", "40,50")  # fmt: skip

    assert done.exit_code == 0, done.output
    for part in (
        "zclip",
        "adagc:lambda_rel=1.05",
        "90 recorded steps",
        "1 spike and 1 step not finite",
    ):
        assert part in done.stdout
    assert "APPROXIMATE" not in done.stdout
    with Image.open(folder / "replay.png") as chart:
        assert min(chart.size) > 500


def test_command_gives_strict_json(run: Callable[..., Result], folder: Path) -> None:
    done = run("replay", folder, "--plugin", "zclip", "--json", "--chart", folder / "c.png")
    found: dict[str, Any] = json.loads(done.stdout, parse_constant=pytest.fail)

    assert found["rows"] == STEPS
    assert found["chains"][0]["label"] == "zclip"
    assert 50 in found["spikes"]["steps"]
    assert (folder / "c.png").is_file()


def test_a_thinned_log_is_said_to_be_approximate(
    run: Callable[..., Result], tmp_path: Path
) -> None:
    layer = torch.nn.Linear(3, 2)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    with stablekit.attach(optimizer, Recorder(tmp_path, every=3), model=layer):
        for _ in range(9):
            layer(torch.ones(1, 3)).sum().backward()
            optimizer.step()
    done = run("replay", tmp_path, "--plugin", "zclip")

    assert "APPROXIMATE" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--plugin", "agc"), "cannot replay 'agc'"),
        (("--plugin", "zclip", "--spikes", "a"), "--spikes takes numbers"),
    ],
)
def test_command_refuses_with_one_sentence(
    run: Callable[..., Result], folder: Path, arguments: tuple[str, ...], message: str
) -> None:
    done = run("replay", folder, *arguments)

    assert done.exit_code == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
