"""Changes of a model's layers that are made before its optimizer exists, one a module."""

from stablekit_layers._apply import apply
from stablekit_layers._catalogue import SurgeryInfo, available, create
from stablekit_layers._check import check
from stablekit_layers._decay import no_decay, parameter_groups
from stablekit_layers._fold import fold
from stablekit_layers._load import load
from stablekit_layers.hybridnorm import HybridNorm, HybridNormStar
from stablekit_layers.normformer import NormFormer
from stablekit_layers.peri_norm import PeriNorm
from stablekit_layers.qk_norm import QKNorm
from stablekit_layers.scaled_ws import ScaledWeightStandardization
from stablekit_layers.surgery import GROUP, Foldable, Surgery

__all__ = [
    "GROUP",
    "Foldable",
    "HybridNorm",
    "HybridNormStar",
    "NormFormer",
    "PeriNorm",
    "QKNorm",
    "ScaledWeightStandardization",
    "Surgery",
    "SurgeryInfo",
    "apply",
    "available",
    "check",
    "create",
    "fold",
    "load",
    "no_decay",
    "parameter_groups",
]
