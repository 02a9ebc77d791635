"""The contract that every plugin keeps, as plain functions that a plugin's own tests can call.

Example:
    >>> import stablekit
    >>> from stablekit.testing import check_plugin
    >>> class Halve:
    ...     '''Halve every gradient.'''
    ...
    ...     name = "halve"
    ...
    ...     @stablekit.hookimpl
    ...     def transform_gradients(self, step):
    ...         step.gradients.scale_(step.gradients.norm() * 0 + 0.5)
    >>> check_plugin(Halve)

With pytest, one test a check::

    @pytest.mark.parametrize("check", stablekit.testing.CHECKS, ids=lambda check: check.__name__)
    def test_my_plugin_keeps_the_contract(check):
        check(MyPlugin)
"""

from stablekit.testing._checks import CHECKS, check_plugin
from stablekit.testing._runs import Factory, NanGuard, TinyRun, factory_of

__all__ = ["CHECKS", "Factory", "NanGuard", "TinyRun", "check_plugin", "factory_of"]
