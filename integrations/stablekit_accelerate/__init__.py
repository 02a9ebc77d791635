"""stablekit in loops written with Accelerate: one call, and the loop stays what it is.

::

    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    session = stablekit_accelerate.attach(accelerator, optimizer, "recommended", model=model)

==================================  ================================================================
of the accelerator                  what it does while a session is attached
==================================  ================================================================
``backward(loss)``                  also tells the session the loss, unscaled; ``step.loss`` is the
                                    mean over the micro-batches of a step and over ranks
``clip_grad_norm_(params, limit)``  returns the norm and clips in the step, after the plugins
``log``, ``trackers``               get the metrics every ``log_every`` steps
``save_state``, ``load_state``      have the session in them, under FSDP2 too
``optimizer_step_was_skipped``      is true after a skipped step, also with a fused optimizer;
                                    schedulers prepared by the accelerator wait, as it promises
==================================  ================================================================

``session.detach()`` leaves the accelerator as it was.
"""

from stablekit_accelerate._attach import attach

__all__ = ["attach"]
