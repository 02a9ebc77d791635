"""Looking at forward passes: which of them, at which modules, and what is kept of them."""

from stablekit.forward._attention_layers import AttentionLayer, known_layers, named_layers
from stablekit.forward._bounded_logits import BoundedLogits, logit_bound
from stablekit.forward._exact_logits import ExactLogits
from stablekit.forward._sampling import Sampling
from stablekit.forward._scores import largest_logit, largest_logits
from stablekit.forward._slots import Slots, largest

__all__ = [
    "AttentionLayer",
    "BoundedLogits",
    "ExactLogits",
    "Sampling",
    "Slots",
    "known_layers",
    "largest",
    "largest_logit",
    "largest_logits",
    "logit_bound",
    "named_layers",
]
