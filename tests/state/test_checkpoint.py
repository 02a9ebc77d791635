"""Plugin state travels in the optimizer's checkpoint; a bad one is refused and moves nothing."""

from __future__ import annotations

import copy
import math
import subprocess
import sys
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

import stablekit
from stablekit.errors import StateError, StateWarning
from stablekit_clipping import AGC, AdaGC, AutoClip, QuantileClip, ZClip
from tests.state.resumable import (
    compute_loss,
    differences,
    plugin_named,
    set_gradients,
    small_model,
)

if TYPE_CHECKING:
    from pathlib import Path

Saved = dict[str, Any]
CHAIN = ("nonfinite-guard", "zclip", "adagc", "autoclip", "quantile-clip")


def trained(
    *plugins: object, steps: int = 30, first: int = 1, device_mode: bool = False
) -> tuple[nn.Module, torch.optim.Optimizer, stablekit.Session]:
    model = small_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
    session = stablekit.attach(optimizer, *plugins, model=model, device_mode=device_mode)
    train(model, optimizer, range(first, first + steps))
    return model, optimizer, session


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        compute_loss(stablekit.session(optimizer), step)
        set_gradients(model, step)
        optimizer.step()


def written(state: object, folder: Path) -> Any:  # noqa: ANN401 - any state
    torch.save(state, folder / "saved.pt")
    return torch.load(folder / "saved.pt", weights_only=True)


@pytest.mark.parametrize("name", stablekit.available())
def test_state_survives_a_file_that_may_hold_weights_only(name: str, tmp_path: Path) -> None:
    _, optimizer, _ = trained(
        "nonfinite-guard" if "guard" not in name else "agc", plugin_named(name)
    )
    state = optimizer.state_dict()
    assert differences(written(state, tmp_path), state, "") == []


@pytest.mark.parametrize("name", stablekit.available())
def test_state_has_one_schema_in_both_modes(name: str) -> None:
    def schema(value: object) -> object:
        if isinstance(value, dict):
            return {key: schema(item) for key, item in value.items()}
        if isinstance(value, torch.Tensor):
            return value.dtype, value.device, value.shape
        return type(value)

    states = [
        trained(AGC(name="other"), plugin_named(name), device_mode=mode)[2].state_dict()["plugins"]
        for mode in (False, True)
    ]
    assert schema(states[0]) == schema(states[1])


@pytest.mark.parametrize("name", stablekit.available())
def test_state_moves_between_the_modes(name: str) -> None:
    _, optimizer, session = trained(AGC(name="other"), plugin_named(name))
    model, other, moved = trained(AGC(name="other"), plugin_named(name), steps=0, device_mode=True)
    other.load_state_dict(optimizer.state_dict())
    assert differences(moved.state_dict(), session.state_dict(), "") == []
    train(model, other, range(31, 33))


def test_values_of_parameters_are_keyed_by_canonical_name() -> None:
    _, _, session = trained("adagc", QuantileClip(per_tensor=True))
    names = {"0.weight", "0.bias", "2.weight", "2.bias"}
    plugins = session.state_dict()["plugins"]
    assert set(plugins["adagc"]["state"]["gamma"]) == names
    assert set(plugins["quantile-clip"]["state"]["histories"]) == names


def test_a_checkpoint_loads_where_stablekit_is_not_installed(tmp_path: Path) -> None:
    model, optimizer, _ = trained(*CHAIN)
    torch.save(
        {"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "c.pt"
    )
    code = f"""
import sys
sys.modules["stablekit"] = None
import torch
saved = torch.load({str(tmp_path / "c.pt")!r}, weights_only=True)
model = torch.nn.Sequential(torch.nn.Linear(5, 6), torch.nn.Tanh(), torch.nn.Linear(6, 3))
optimizer = torch.optim.AdamW(model.parameters(), fused=True)
optimizer.load_state_dict(saved["optimizer"])
model(torch.ones(1, 5)).sum().backward()
optimizer.step()
print(optimizer.param_groups[0]["lr"], int(optimizer.state[model[0].weight]["step"]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    # 25 of the 30 updates reached the first weight.
    assert done.stdout.split() == ["0.01", str(updates_of(optimizer) + 1)]


def updates_of(optimizer: torch.optim.Optimizer) -> int:
    first = optimizer.param_groups[0]["params"][0]
    return int(optimizer.state[first]["step"])


def test_loading_its_own_state_changes_nothing() -> None:
    # As AcceleratedOptimizer does when it is made.
    for steps in (0, 30):
        _, optimizer, session = trained(*CHAIN, steps=steps)
        before = copy.deepcopy(optimizer.state_dict())
        optimizer.load_state_dict(optimizer.state_dict())
        assert differences(optimizer.state_dict(), before, "") == []
        assert session.number == steps


def corrupted(state: Saved) -> Iterator[tuple[str, Saved]]:
    """Yield a name and a copy of the state for each way to spoil one field."""
    spoilt: dict[str, list[object]] = {
        "int": [None, -1, "3", 1.5, math.nan, True, [1]],
        "float": [None, "x", math.nan, math.inf, -1.0, [1.0], torch.ones(2)],
        "Tensor": [None, "x", torch.tensor(math.nan), torch.ones(2, 2), torch.tensor([-1.0]), 3],
        "dict": [None, [], 3, "x", {3: 1.0}],
        "list": [None, {}, "x", [3]],
        "str": [None, 3],
    }

    def walk(
        value: object, path: tuple[object, ...]
    ) -> Iterator[tuple[tuple[object, ...], object]]:
        yield path, value
        if isinstance(value, dict):
            for key, item in value.items():
                yield from walk(item, (*path, key))
        if isinstance(value, list):
            for i, item in enumerate(value[:1]):
                yield from walk(item, (*path, i))

    for path, value in walk(state, ()):
        if not path or "settings" in path or "data" in path:
            continue
        # What is kept by name may lack a name: of a parameter or a plugin that came later.
        kept = {"gamma", "histories", "clipped", "plugins"} & {*path[-2:-1]}
        for bad in [*spoilt[type(value).__name__], *([] if kept else ["(missing)"])]:
            changed = copy.deepcopy(state)
            inner: Any = changed
            for key in path[:-1]:
                inner = inner[key]
            if bad == "(missing)":
                del inner[path[-1]]
            else:
                inner[path[-1]] = bad
            if not isinstance(path[-1], int):
                yield f"{'.'.join(map(str, path))} = {bad!r}", changed


def test_a_malformed_state_is_refused_by_field_and_nothing_has_changed() -> None:
    _, optimizer, session = trained(*CHAIN)
    saved = optimizer.state_dict()
    _, ours, attached = trained(*CHAIN, steps=9, first=20)
    before = copy.deepcopy(ours.state_dict())
    cases = list(corrupted(session.state_dict()))
    assert len(cases) > 150
    taken = []
    for name, state in cases:
        field = name.partition(" = ")[0].split(".")[-1]
        for load in (
            lambda state: ours.load_state_dict({**saved, "stablekit": state}),
            attached.load_state_dict,
        ):
            try:
                load(state)
            except StateError as error:
                if field not in str(error):
                    taken.append(f"{name}: {error} does not name {field}")
            else:
                taken.append(f"{name} was taken")
                attached.load_state_dict(before["stablekit"])
        if found := differences(ours.state_dict(), before, ""):
            taken.append(f"{name} changed {found}")
    assert taken == [], "\n".join(taken)


def test_a_state_that_is_no_state_is_refused() -> None:
    _, optimizer, session = trained(*CHAIN, steps=2)
    whole = session.state_dict()
    wrong: list[Any] = [None, [], "x", 3, {}, {"version": 99}, {**whole, "more": 1}]
    for bad in wrong:
        with pytest.raises(StateError):
            optimizer.load_state_dict({**optimizer.state_dict(), "stablekit": bad})
        with pytest.raises(StateError):
            session.load_state_dict(bad)


def test_a_state_of_a_later_version_is_refused() -> None:
    _, _, session = trained("zclip", steps=2)
    with pytest.raises(StateError, match="version must be 1, got 2"):
        session.load_state_dict({**session.state_dict(), "version": 2})


def warned(*caught: warnings.WarningMessage) -> list[str]:
    return [str(each.message) for each in caught if issubclass(each.category, StateWarning)]


def test_plugins_that_came_or_went_are_named_in_one_warning() -> None:
    _, optimizer, _ = trained("zclip", "adagc")
    model, other, session = trained("autoclip", "zclip", steps=0)
    with pytest.warns(StateWarning) as caught:
        other.load_state_dict(optimizer.state_dict())
    (said,) = warned(*caught)
    assert "start afresh, not in the checkpoint: autoclip" in said
    assert "dropped, not attached now: adagc" in said
    assert session.plugins["zclip"].state_dict()["count"] > 20  # type: ignore[attr-defined]  # ZClip
    train(model, other, range(31, 33))


def test_another_set_of_plugins_is_an_error_if_the_user_asks_for_strictness() -> None:
    _, _, session = trained("zclip", steps=2)
    state = session.state_dict()
    _, _, other = trained("zclip", "adagc", steps=2)
    with pytest.raises(StateError, match="strict=False"):
        other.load_state_dict(state)
    with pytest.warns(StateWarning, match="start afresh"):
        other.load_state_dict(state, strict=False)


def test_the_constructor_wins_over_saved_arguments_and_says_so_once() -> None:
    _, optimizer, _ = trained(ZClip(2.0, alpha=0.9), AutoClip())
    _, other, session = trained(ZClip(3.0), AutoClip(), steps=0)
    with pytest.warns(StateWarning) as caught:
        other.load_state_dict(optimizer.state_dict())
    (said,) = warned(*caught)
    assert "zclip.z_thresh stays 3.0, was 2.0" in said
    assert "zclip.alpha stays 0.97, was 0.9" in said
    zclip = session.plugins["zclip"]
    assert isinstance(zclip, ZClip)
    assert (zclip.z_thresh, zclip.alpha) == (3.0, 0.97)


@pytest.mark.parametrize("history", [None, 5])
def test_a_shorter_history_keeps_the_newest_norms(history: int | None) -> None:
    _, optimizer, session = trained(AutoClip(history=history), steps=12, first=6)
    _, other, shorter = trained(AutoClip(history=3), steps=0)
    with pytest.warns(StateWarning, match="autoclip.history stays 3"):
        other.load_state_dict(optimizer.state_dict())
    before = session.state_dict()["plugins"]["autoclip"]["state"]["history"]
    after = shorter.state_dict()["plugins"]["autoclip"]["state"]["history"]
    assert torch.equal(after, before[-3:])


def test_nothing_is_said_about_a_state_that_fits() -> None:
    _, optimizer, _ = trained(*CHAIN)
    _, other, session = trained(*CHAIN, steps=0)
    other.load_state_dict(optimizer.state_dict())
    assert session.number == 30


def test_attaching_to_an_optimizer_with_state_names_the_call_that_restores_plugins() -> None:
    _, optimizer, session = trained("zclip")
    state = optimizer.state_dict()
    model = small_model()
    late = torch.optim.AdamW(model.parameters(), fused=True)
    late.load_state_dict(state)
    with pytest.warns(StateWarning, match=r"session.load_state_dict\(checkpoint\['stablekit'\]\)"):
        attached = stablekit.attach(late, "zclip", model=model)
    attached.load_state_dict(state["stablekit"])
    assert differences(attached.state_dict(), session.state_dict(), "") == []


def test_a_checkpoint_without_plugin_state_is_loud_and_plugins_keep_theirs() -> None:
    _, _, session = trained("zclip")
    plain = torch.optim.AdamW(small_model().parameters(), fused=True).state_dict()
    before = session.state_dict()
    with pytest.warns(StateWarning, match="holds no stablekit state"):
        session.optimizers[0].load_state_dict(plain)
    assert differences(session.state_dict(), before, "") == []


def test_a_failed_load_of_the_optimizer_leaves_plugins_as_they_were() -> None:
    _, optimizer, session = trained("zclip", "adagc")
    before = session.state_dict()
    state = optimizer.state_dict()
    state["stablekit"] = {**state["stablekit"], "number": 7}
    state["param_groups"] = state["param_groups"] * 2
    with pytest.raises(ValueError, match="different number of parameter groups"):
        optimizer.load_state_dict(state)
    assert differences(session.state_dict(), before, "") == []
    fine = optimizer.state_dict()
    optimizer.load_state_dict(fine)
    assert session.number == 30


def test_a_saved_state_does_not_change_with_the_run() -> None:
    model, optimizer, _ = trained(*CHAIN, steps=10)
    saved = optimizer.state_dict()["stablekit"]
    before = copy.deepcopy(saved)
    train(model, optimizer, range(11, 30))
    assert differences(saved, before, "") == []


def test_events_that_were_kept_are_saved() -> None:
    _, optimizer, session = trained("nonfinite-guard", steps=40)
    _, other, resumed = trained("nonfinite-guard", steps=0)
    other.load_state_dict(optimizer.state_dict())
    assert len(session.events) == 10
    assert resumed.events == session.events


def test_adagc_of_any_kind_is_saved_whole() -> None:
    for plugin in (AdaGC(warmup_steps=50), AdaGC(warmup_steps=5, warmup_norms="clipped")):
        _, _, session = trained("nonfinite-guard", plugin)
        state = session.state_dict()["plugins"]["adagc"]["state"]
        assert (
            set(state["gamma"])
            == set(state["active"])
            == set(dict(small_model().named_parameters()))
        )
