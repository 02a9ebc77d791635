"""Around the update: what limits it, what resets its momentum, and constraints on weights."""

from stablekit_updates.cautious import Cautious
from stablekit_updates.logit_scale_clamp import LogitScaleClamp
from stablekit_updates.max_norm import MaxNorm
from stablekit_updates.momentum_reset import MomentumReset
from stablekit_updates.qk_clip import QKClip
from stablekit_updates.spectral_cap import SpectralCap
from stablekit_updates.update_clip import UpdateClip
from stablekit_updates.weight_clip import WeightClip

__all__ = [
    "Cautious",
    "LogitScaleClamp",
    "MaxNorm",
    "MomentumReset",
    "QKClip",
    "SpectralCap",
    "UpdateClip",
    "WeightClip",
]
