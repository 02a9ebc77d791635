"""Every plugin decides in several processes as it does in one, on every rank alike."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import pytest
import torch

from stablekit.hookspecs import hooks_of
from tests.distributed.chains import (
    CLIPPERS,
    CUT_BY_COLUMNS,
    EVERYTHING,
    GUARD,
    SPEAKING,
    catalogue,
    chains,
    plugin_named,
)
from tests.distributed.compare import assert_same
from tests.distributed.model import BAD_BATCH, BAD_SHARD, HALF_WAY
from tests.distributed.training import Run, resume, train
from tests.distributed.worker import RUNS, WIDE

if TYPE_CHECKING:
    from collections.abc import Callable

    Seen = dict[str, Any]
    Group = Callable[[int], list[Seen]]

pytestmark = pytest.mark.distributed

CHAINS = tuple(chains())
WORLDS = (1, 2, 4)
WRITING = {"transform_gradients", "before_update", "after_update"}
CASES = [
    *((world, run, name) for world in (2, 4) for run in ("ddp", "fsdp2") for name in CHAINS),
    *((2, "columns", name) for name in (*CUT_BY_COLUMNS, EVERYTHING)),
    *((2, run, CLIPPERS) for run in ("ddp, device mode", "fsdp2, device mode")),
    (4, "hsdp", EVERYTHING),
]
ROUNDING = 1e-6
"""Sums over ranks add up in another order than sums over a tensor."""

every_chain = pytest.mark.parametrize("name", CHAINS)
every_world = pytest.mark.parametrize("world", WORLDS)
every_run = pytest.mark.parametrize(("world", "run", "name"), CASES)


@functools.cache
def in_one_process(world: int, run: str = "fsdp2") -> dict[str, Seen]:
    """Train on the same batches in this process, as the run of that name does in several."""
    how = RUNS[world][run]
    return _alone(world, missing=how.missing, dtype=how.dtype)


@functools.cache
def _alone(world: int, *, missing: bool, dtype: torch.dtype) -> dict[str, Seen]:
    made = chains()
    chosen = {name: made[name] for name in CUT_BY_COLUMNS} if missing else made
    return train(Run("one", missing=missing, dtype=dtype), chosen, world=world)


def _without_loss(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Drop what depends on the loss: four ranks add their losses up in another order."""
    return [{key: v for key, v in row.items() if "loss" not in key} for row in rows]


def assert_decisions_agree(seen: Seen, single: Seen, within: float = ROUNDING) -> None:
    """Compare norms, decisions, metrics, events and state."""
    assert_same(seen["probe"], single["probe"], within=within, path="probe")
    for row, one in zip(seen["metrics"], single["metrics"], strict=True):
        assert one.keys() ^ row.keys() <= {"grad_norm_clipped", "loss"}
        for key in one.keys() & row.keys():
            assert_same(row[key], one[key], within=10 * within, path=f"metrics/{key}")
    assert _facts(seen["state"]) == _facts(single["state"])
    assert_same(seen["state"]["plugins"], single["state"]["plugins"], within=within, path="state")


def _facts(state: Seen) -> Seen:
    facts = {key: state[key] for key in ("number", "updates", "skipped", "clipped")}
    kept = ("kind", "step", "plugin", "tensors")
    return {**facts, "events": [{key: e[key] for key in kept} for e in state["events"]]}


@every_world
@every_chain
def test_ddp_is_bit_identical_to_one_process_on_the_averaged_gradients(
    group: Group, name: str, world: int
) -> None:
    single = in_one_process(world, "ddp")[name]
    for seen in group(world):
        run = seen["ddp"][name]
        assert_same(run["weights"], single["weights"], path="weights")
        assert_same(_without_loss(run["probe"]), _without_loss(single["probe"]), path="probe")
        assert_decisions_agree(run, single, 0.0 if world < 4 else ROUNDING)


@every_world
@every_chain
def test_fsdp2_agrees_with_one_process(group: Group, name: str, world: int) -> None:
    single = in_one_process(world)[name]
    for seen in group(world):
        run = seen["fsdp2"][name]
        assert_decisions_agree(run, single)
        assert_same(run["weights"], single["weights"], within=ROUNDING, path="weights")


def test_shards_with_copies_agree_with_one_process(group: Group) -> None:
    single = in_one_process(4, "hsdp")[EVERYTHING]
    for seen in group(4):
        assert_decisions_agree(seen["hsdp"][EVERYTHING], single)
        assert_same(seen["hsdp"][EVERYTHING]["weights"], single["weights"], within=ROUNDING)


@pytest.mark.parametrize("run", ["ddp", "fsdp2"])
def test_device_mode_agrees_with_one_process(group: Group, run: str) -> None:
    single = in_one_process(2, f"{run}, device mode")[CLIPPERS]
    for seen in group(2):
        there = seen[f"{run}, device mode"][CLIPPERS]
        assert_same(there["weights"], single["weights"], within=ROUNDING, path="weights")
        assert _facts(there["state"]) == _facts(single["state"])


def _without_updates(run: Seen) -> Seen:
    """Leave out how far tensors moved: momentum moves a whole tensor whose gradient is zero.

    A shard without a gradient is left where it is.
    """
    monitor = "update-monitor"
    metrics = [{k: v for k, v in row.items() if monitor not in k} for row in run["metrics"]]
    events = [event for event in run["state"]["events"] if event["plugin"] != monitor]
    return {**run, "metrics": metrics, "state": {**run["state"], "events": events}}


@pytest.mark.parametrize("name", CUT_BY_COLUMNS)
def test_tensors_cut_by_columns_and_missing_on_one_rank_agree_with_one_process(
    group: Group, name: str
) -> None:
    single = _without_updates(in_one_process(2, "columns")[name])
    for seen in group(2):
        assert_decisions_agree(_without_updates(seen["columns"][name]), single)


@every_run
def test_all_ranks_see_the_same_bits(group: Group, world: int, run: str, name: str) -> None:
    first, *others = (seen[run][name] for seen in group(world))
    for other in others:
        for what in ("probe", "metrics", "state", "weights"):
            assert_same(first[what], other[what], path=what)


@every_run
def test_every_rank_skips_the_steps_with_a_nan_on_one_rank(
    group: Group, world: int, run: str, name: str
) -> None:
    for seen in group(world):
        oks = [bool(row["ok"]) for row in seen[run][name]["probe"]]
        assert not oks[BAD_BATCH]
        assert not oks[BAD_SHARD]


@every_run
def test_a_loss_that_is_nan_on_one_rank_is_nan_on_all(
    group: Group, world: int, run: str, name: str
) -> None:
    for seen in group(world):
        losses = [row["loss"] for row in seen[run][name]["probe"]]
        assert [i for i, loss in enumerate(losses) if loss.isnan()] == [BAD_BATCH]


@pytest.mark.parametrize("name", CHAINS)
@every_world
def test_every_plugin_acted_in_these_runs(name: str, world: int) -> None:
    seen, plugin = in_one_process(world)[name], name.partition(",")[0].partition(" ")[0]
    spoke = any(event["plugin"] == plugin for event in seen["state"]["events"])
    moved = not torch.equal(_flat(seen), _flat(in_one_process(world)[GUARD]))
    noted = any(key.startswith(f"{plugin}/") for row in seen["metrics"] for key in row)
    observes = name in catalogue() and not WRITING & set(hooks_of(plugin_named(name)))
    acted = moved or spoke or (observes and (noted or plugin in seen["files"]))
    assert acted, f"{name} did nothing: give it arguments in EAGER with which it acts"


@pytest.mark.parametrize(("name", "kind"), SPEAKING.items())
def test_plugins_that_answer_trouble_did(name: str, kind: str) -> None:
    for world in WORLDS:
        events = in_one_process(world)[name]["state"]["events"]
        assert kind in [event["kind"] for event in events if event["plugin"] == name]


def _flat(seen: Seen) -> torch.Tensor:
    return torch.cat([weight.ravel() for weight in seen["weights"]])


@functools.cache
def _resumed(saved: int) -> dict[str, Seen]:
    half_way = _SAVED[saved]
    return resume(Run("one", dtype=WIDE), chains(), half_way, world=2)


_SAVED: dict[int, dict[str, Seen]] = {}


@every_chain
def test_a_run_saved_by_two_ranks_goes_on_alike_in_one_process(group: Group, name: str) -> None:
    there = group(2)[0]["fsdp2"]
    _SAVED[0] = {key: run["half way"] for key, run in there.items()}
    run = there[name]
    rest = {**run, "probe": run["probe"][HALF_WAY:], "metrics": run["metrics"][HALF_WAY:]}
    assert_decisions_agree(rest, _resumed(0)[name])
