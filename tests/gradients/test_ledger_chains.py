"""Norms that are derived, not read again, stay what reading again would give."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from stablekit._commit import commit
from tests.gradients.books import NAMES, NaiveBooks, ledger_of, parameters, view_of

CLOSE: dict[str, Any] = {"rel": 2e-2, "abs": 1e-6}
"""Bounded by the bf16 tensor, which is rounded whenever something is written."""

EXACT: dict[str, Any] = {"rel": 2e-6, "abs": 1e-6}
ALL = tuple(range(len(NAMES)))
EXACTLY = [i for i in ALL if NAMES[i] != "half"]

ACTIONS = (
    "scale",
    "scale each",
    "scale units",
    "edit some",
    "edit all",
    "read",
    "read units",
    "read largest",
    "commit",
)

factors = st.sampled_from([0.0, 0.25, 0.7, 1.0, 1.0, 3.0, -0.5, float("nan")])
views = st.one_of(st.none(), st.sets(st.sampled_from(ALL), min_size=1).map(sorted).map(tuple))
actions = st.tuples(
    st.sampled_from(ACTIONS),
    views,
    st.lists(factors, min_size=12, max_size=12),
)


@given(chain=st.lists(actions, max_size=8), units=st.booleans(), host=st.booleans())
def test_derived_norms_equal_those_read_again_after_any_chain(
    chain: list[tuple[str, tuple[int, ...] | None, list[float]]], units: bool, host: bool
) -> None:
    params = parameters()
    ledger, books = ledger_of(params, units=units, host=host), NaiveBooks(params)
    raw = books.norms()
    for action, chosen, values in chain:
        view, positions = view_of(ledger, chosen), ALL if chosen is None else chosen
        given_factors = torch.tensor(values)
        acting = given_factors.nan_to_num(1.0)
        if action == "scale":
            view.scale_(given_factors[0])
            books.scale(positions, acting[0])
        elif action == "scale each":
            view.scale_(given_factors[: len(positions)])
            books.scale(positions, acting[: len(positions)])
        elif action == "scale units":
            counts = [ledger.memory.unit_count(i) for i in positions]
            view.scale_units_([given_factors[:count] for count in counts])
            books.scale_units(positions, [acting[:count] for count in counts])
        elif action.startswith("edit"):
            edit, touched = view.edit(), positions
            if action == "edit some":
                touched = positions[::2]
                edit.touched([NAMES[i] for i in touched])
            for name, data in edit:
                if NAMES.index(name) in touched:
                    data.clamp_(-0.5, 0.5)
            books.clamp(touched, 0.5)
        elif action == "read":
            view.norm()
            view.norms()
        elif action == "read units":
            view.unit_norms()
        elif action == "read largest":
            view.amaxes()
        else:
            commit(ledger)
    view = view_of(ledger)
    norms, largest, rows = view.norms(), view.amaxes(), view.unit_norms()
    for i in ALL:
        close = EXACT if i in EXACTLY else CLOSE
        assert norms[i].item() == pytest.approx(books.norms()[i], **close)
        assert largest[i].item() == pytest.approx(books.amaxes()[i], **close)
        assert rows[i].tolist() == pytest.approx(books.units(i, rows[i].numel()), **close)
    assert view.norm().item() == pytest.approx(norms.double().norm().item(), **EXACT)
    assert view.raw_norms().tolist() == pytest.approx(raw, **EXACT)
    commit(ledger)
    again = NaiveBooks(params)
    assert [again.norms()[i] for i in EXACTLY] == pytest.approx(
        [books.norms()[i] for i in EXACTLY], **EXACT
    )
    assert norms.tolist() == pytest.approx(again.norms(), **CLOSE)


def test_a_restricted_view_scales_no_other_tensor() -> None:
    params = parameters()
    ledger, books = ledger_of(params), NaiveBooks(params)
    view_of(ledger, (1, 3)).scale_(torch.tensor(0.5))
    books.scale((1, 3), torch.tensor(0.5))
    assert view_of(ledger).norms().tolist() == pytest.approx(books.norms(), rel=1e-5)


def test_a_tensor_edited_twice_is_read_again_though_the_second_edit_left_it_alone() -> None:
    ledger = ledger_of(parameters())
    view = view_of(ledger)
    for name in ("matrix", "vector"):
        edit = view.edit()
        edit.touched([name])
        for found, data in edit:
            if found == name:
                data.zero_()
    assert view.norms()[:2].tolist() == [0.0, 0.0]


def test_an_edit_that_reports_its_tensors_keeps_the_norms_of_the_others() -> None:
    ledger = ledger_of(parameters())
    before = view_of(ledger).norms()
    view_of(ledger).edit().touched([])
    assert ledger.knows_norm
    assert view_of(ledger).norms() is before


def test_an_edit_that_reports_an_unknown_tensor_is_refused() -> None:
    with pytest.raises(ValueError, match=r"touched\(\) takes names .* \['matrx'\]"):
        view_of(ledger_of(parameters())).edit().touched(["matrx"])


def test_factors_of_the_wrong_shape_are_refused() -> None:
    view = view_of(ledger_of(parameters()), (0, 1))
    with pytest.raises(ValueError, match=r"lengths \[4, 1\], got \[\[4\], \[5\]\]"):
        view.scale_units_([torch.ones(4), torch.ones(5)])
    with pytest.raises(ValueError, match=r"must be 0-dim or \[2\], got \[3\]"):
        view.scale_(torch.ones(3))


def test_factor_zero_makes_norms_zero_even_where_they_are_infinite() -> None:
    params = parameters()
    assert params[0].grad is not None
    params[0].grad[0, 0] = torch.inf
    view = view_of(ledger_of(params))
    assert view.norm().isposinf()
    view.scale_(torch.tensor(0.0))
    assert view.norm() == 0
    assert not view.norms().any()


def test_unit_norms_of_complex_and_of_very_long_rows_are_exact() -> None:
    params: list[torch.Tensor] = [
        torch.nn.Parameter(torch.ones(2, 3, dtype=torch.complex64)),
        torch.nn.Parameter(torch.ones(2, 1 << 22)),
    ]
    for param in params:
        param.grad = torch.full_like(param, 0.3)
    units = view_of(ledger_of(params)).unit_norms()
    assert units[0].tolist() == pytest.approx([0.3 * 3**0.5] * 2)
    assert units[1].tolist() == pytest.approx([0.3 * 2.0**11] * 2, rel=1e-6)
