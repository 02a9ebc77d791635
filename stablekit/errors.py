"""The errors and warnings that stablekit raises, in one tree.

::

    StablekitError
     |-- PluginError             a plugin raised: names plugin, hook and step
     |-- HookError               a hook is misspelt, malformed or used at the wrong moment
     |-- AttachError             an optimizer or a combination of plugins cannot be attached
     |-- UnknownPluginError      a plugin name that no distribution provides (a ValueError)
     |-- StateError              a saved state does not fit: names the field (a ValueError)
     |-- IncompleteRoundError    only some optimizers of one session were stepped
     |-- PlacementError          a gradient is not on the mesh of its parameter
     |-- NonFiniteError          gradients stayed non-finite for longer than allowed
     `-- DivergenceError         training diverged, and what was to mend it is used up

    StablekitWarning (a UserWarning)
     |-- StateWarning            plugin state was not, or only partly, restored
     `-- NoEffectWarning         an option that cannot change anything as given
"""

__all__ = [
    "AttachError",
    "DivergenceError",
    "HookError",
    "IncompleteRoundError",
    "NoEffectWarning",
    "NonFiniteError",
    "PlacementError",
    "PluginError",
    "StablekitError",
    "StablekitWarning",
    "StateError",
    "StateWarning",
    "UnknownPluginError",
]


class StablekitError(Exception):
    """Base of every error that stablekit raises on purpose."""


class PluginError(StablekitError):
    """A plugin raised inside a hook; the original exception is the ``__cause__``."""


class HookError(StablekitError):
    """A hook is unknown, has unknown arguments, or something was done at the wrong moment."""


class AttachError(StablekitError):
    """The optimizer or the list of plugins cannot be attached as given."""


class UnknownPluginError(StablekitError, ValueError):
    """No installed distribution provides a plugin of this name."""


class StateError(StablekitError, ValueError):
    """A saved state is malformed; nothing was changed. The message names the field."""


class IncompleteRoundError(StablekitError):
    """An optimizer of a several-optimizer session stepped twice before another stepped once."""


class PlacementError(StablekitError):
    """A gradient cannot be read as the gradient of its parameter: it lies on other ranks."""


class NonFiniteError(StablekitError):
    """Gradients are not finite where training cannot go on."""


class DivergenceError(StablekitError):
    """Training diverged where no means of recovery is left."""


class StablekitWarning(UserWarning):
    """Base of every warning that stablekit gives."""


class StateWarning(StablekitWarning):
    """Plugin state was not restored, or only in part."""


class NoEffectWarning(StablekitWarning):
    """An option or pattern that selects nothing or changes nothing."""
