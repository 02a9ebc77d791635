"""Every plugin of the catalogue keeps the contract, those that come later too."""

from collections.abc import Callable

import pytest

import stablekit
from stablekit.testing import CHECKS, Factory, factory_of


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("name", stablekit.available())
def test_every_plugin_keeps_the_contract(name: str, check: Callable[[Factory], None]) -> None:
    check(factory_of(name))
