"""Gradient clipping: fixed thresholds, and thresholds that are learned from the run."""

from stablekit_clipping.adagc import AdaGC
from stablekit_clipping.agc import AGC
from stablekit_clipping.autoclip import AutoClip
from stablekit_clipping.clip_value import ClipValue
from stablekit_clipping.global_norm import GlobalNorm
from stablekit_clipping.quantile_clip import QuantileClip
from stablekit_clipping.spam import SPAM
from stablekit_clipping.stable_spam import StableSPAM
from stablekit_clipping.zclip import ZClip

__all__ = [
    "AGC",
    "SPAM",
    "AdaGC",
    "AutoClip",
    "ClipValue",
    "GlobalNorm",
    "QuantileClip",
    "StableSPAM",
    "ZClip",
]
