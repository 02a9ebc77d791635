"""stablekit in the Hugging Face Trainer: one callback, or ``attach(trainer, ...)`` for everything.

::

    Trainer(..., callbacks=[StableKitCallback("nonfinite-guard", "zclip")])   # one line
    stablekit_transformers.attach(trainer, "nonfinite-guard", "zclip")        # the same, and more

====================================  =============================  ==========================
what                                  callback                       attach(trainer)
====================================  =============================  ==========================
clips, guards, resumes                yes                            yes
metrics in                            ``log_history``, progress bar  these, TensorBoard, W&B, ...
``args.max_grad_norm``                0 while training               untouched
a NaN gradient is blamed on           every tensor (Trainer clips    the tensor that has it
                                      by Inf before any callback)
``step.loss``                         what the model returns, of     what Trainer optimizes
                                      all micro-batches
plugin state is restored from         the checkpoint, if it is found whatever Trainer loads
                                      by its place
====================================  =============================  ==========================

When training ends, optimizer and model are as without plugins; ``.session`` stays readable, and a
second ``train()`` goes on where plugins were. ``.detach()`` of either ends it before or for good.
"""

from stablekit_transformers._callback import StableKitCallback
from stablekit_transformers._trainer import attach

__all__ = ["StableKitCallback", "attach"]
