"""Methods that act on logits and losses, one a module."""

from stablekit_logits._doors_on import sessions_on
from stablekit_logits.error_norm_truncation import (
    ErrorNormLoss,
    ErrorNormTruncation,
    error_norms,
    truncation_mask,
)
from stablekit_logits.gradient_penalty import (
    GradientPenalty,
    GradientPenaltyLoss,
    gradient_penalty,
    interpolate,
    slope_penalty,
    slopes,
)
from stablekit_logits.logit_clip import LogitClip, LogitClipLoss, clip_logits, lowest_loss
from stablekit_logits.soft_cap import SoftCap, SoftCapping, soft_cap
from stablekit_logits.z_loss import ZLoss, ZLossCrossEntropy, cross_entropy_and_z_loss, z_loss

__all__ = [
    "ErrorNormLoss",
    "ErrorNormTruncation",
    "GradientPenalty",
    "GradientPenaltyLoss",
    "LogitClip",
    "LogitClipLoss",
    "SoftCap",
    "SoftCapping",
    "ZLoss",
    "ZLossCrossEntropy",
    "clip_logits",
    "cross_entropy_and_z_loss",
    "error_norms",
    "gradient_penalty",
    "interpolate",
    "lowest_loss",
    "sessions_on",
    "slope_penalty",
    "slopes",
    "soft_cap",
    "truncation_mask",
    "z_loss",
]
