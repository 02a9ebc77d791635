"""Every plugin decides in several processes as it does in one, on every rank alike."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import pytest
import torch

from tests.distributed.compare import assert_same
from tests.distributed.work import BAD_BATCH, BAD_SHARD, HALF_WAY, Run, chains, resume, train
from tests.distributed.worker import CUT_BY_COLUMNS, EVERYTHING

if TYPE_CHECKING:
    from collections.abc import Callable

    Group = Callable[[int], list[dict[str, Any]]]

pytestmark = pytest.mark.distributed

CHAINS = tuple(chains())
RUNS_OF_TWO = [
    *((run, name) for run in ("ddp", "fsdp2") for name in CHAINS),
    *(("columns", name) for name in CUT_BY_COLUMNS),
]
ROUNDING = 2e-6
"""Sums over ranks add up in another order than sums over a tensor."""


@functools.cache
def in_one_process(name: str, *, world: int, missing: bool = False) -> dict[str, Any]:
    """Train on the same batches in this process."""
    return train(Run("one", missing=missing), chains()[name](), world=world)


def without_loss(metrics: list[dict[str, float]]) -> list[dict[str, float]]:
    """Drop the one metric that is recorded only where telling it costs nothing."""
    return [{key: value for key, value in row.items() if key != "loss"} for row in metrics]


def assert_decisions_agree(seen: dict[str, Any], single: dict[str, Any], within: float) -> None:
    """Compare norms, decisions, metrics, events and state."""
    assert_same(seen["probe"], single["probe"], within=within, path="probe")
    told = [{k: row[k] for k in one if k in row} for row, one in _pairs(seen, single)]
    expected = [{k: one[k] for k in row if k in one} for row, one in _pairs(seen, single)]
    assert_same(told, expected, within=10 * within, path="metrics")
    for row, one in _pairs(seen, single):
        assert one.keys() - row.keys() <= {"grad_norm_clipped", "loss"}
    assert _facts(seen["state"]) == _facts(single["state"])
    assert_same(seen["state"]["plugins"], single["state"]["plugins"], within=within, path="state")


def _pairs(seen: dict[str, Any], single: dict[str, Any]) -> list[tuple[Any, Any]]:
    return list(zip(seen["metrics"], single["metrics"], strict=True))


def _facts(state: dict[str, Any]) -> dict[str, Any]:
    facts = {key: state[key] for key in ("number", "updates", "skipped", "clipped")}
    kept = ("kind", "step", "plugin", "tensors")
    return {**facts, "events": [{key: e[key] for key in kept} for e in state["events"]]}


@pytest.mark.parametrize("name", CHAINS)
def test_ddp_is_bit_identical_to_one_process_on_the_averaged_gradients(
    group: Group, name: str
) -> None:
    single = in_one_process(name, world=2)
    for seen in group(2):
        run = seen["ddp"][name]
        assert_same(run["weights"], single["weights"], path="weights")
        assert_same(run["probe"], single["probe"], path="probe")
        assert_same(without_loss(run["metrics"]), without_loss(single["metrics"]), path="metrics")
        assert_same(run["state"], single["state"], path="state")


@pytest.mark.parametrize("name", CHAINS)
def test_fsdp2_agrees_with_one_process(group: Group, name: str) -> None:
    single = in_one_process(name, world=2)
    for seen in group(2):
        run = seen["fsdp2"][name]
        assert_decisions_agree(run, single, ROUNDING)
        assert_same(run["weights"], single["weights"], within=ROUNDING, path="weights")


@pytest.mark.parametrize(("run", "world"), [("fsdp2", 1), ("fsdp2", 4), ("hsdp", 4)])
def test_all_plugins_together_agree_in_groups_of_other_sizes(
    group: Group, run: str, world: int
) -> None:
    single = in_one_process(EVERYTHING, world=world)
    for seen in group(world):
        assert_decisions_agree(seen[run][EVERYTHING], single, ROUNDING)
        assert_same(seen[run][EVERYTHING]["weights"], single["weights"], within=1e-5)


@pytest.mark.parametrize("name", CUT_BY_COLUMNS)
def test_tensors_cut_by_columns_and_missing_on_one_rank_agree_with_one_process(
    group: Group, name: str
) -> None:
    single = in_one_process(name, world=2, missing=True)
    for seen in group(2):
        assert_decisions_agree(seen["columns"][name], single, ROUNDING)


@pytest.mark.parametrize(("run", "name"), RUNS_OF_TWO)
def test_all_ranks_see_the_same_bits(group: Group, name: str, run: str) -> None:
    first, second = (seen[run][name] for seen in group(2))
    assert_same(first["probe"], second["probe"], path="probe")
    assert_same(without_loss(first["metrics"]), without_loss(second["metrics"]), path="metrics")
    assert_same(first["state"], second["state"], path="state")
    assert_same(first["weights"], second["weights"], path="weights")


@pytest.mark.parametrize(("run", "name"), RUNS_OF_TWO)
def test_every_rank_skips_the_steps_with_a_nan_on_one_rank(
    group: Group, name: str, run: str
) -> None:
    for seen in group(2):
        oks = [bool(row["ok"]) for row in seen[run][name]["probe"]]
        bad = [i for i, ok in enumerate(oks) if not ok]
        assert {BAD_BATCH, BAD_SHARD} <= set(bad)


@pytest.mark.parametrize("name", CHAINS)
def test_every_plugin_acted_in_these_runs(name: str) -> None:
    seen, plugin = in_one_process(name, world=2), name.partition(",")[0].partition(" ")[0]
    guarded = in_one_process("nonfinite-guard", world=2)
    moved = not torch.equal(torch.cat([w.ravel() for w in seen["weights"]]), _flat(guarded))
    spoke = any(event["plugin"] == plugin for event in seen["state"]["events"])
    assert moved or spoke, f"{name} changed no weight and emitted nothing: make the stream harder"


def _flat(seen: dict[str, Any]) -> torch.Tensor:
    return torch.cat([weight.ravel() for weight in seen["weights"]])


@pytest.mark.parametrize("name", CHAINS)
def test_a_run_saved_by_two_ranks_goes_on_alike_in_one_process(group: Group, name: str) -> None:
    run = group(2)[0]["fsdp2"][name]
    resumed = resume(Run("one"), chains()[name](), run["half way"], world=2)
    rest = {**run, "probe": run["probe"][HALF_WAY:], "metrics": run["metrics"][HALF_WAY:]}
    assert_decisions_agree(rest, resumed, ROUNDING)
