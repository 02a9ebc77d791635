"""Lightning: plugins at work on the optimizers of ``trainer.fit``, as one callback.

Needs ``lightning`` 2.x, or ``pytorch_lightning`` 2.x where ``lightning`` is not installed.
"""

from stablekit_lightning._callback import StableKitCallback

__all__ = ["StableKitCallback"]
