"""Plugins that watch: spikes, the health of a model, and records of what happened."""

from stablekit_monitors.activation_monitor import ActivationMonitor
from stablekit_monitors.attention_monitor import AttentionMonitor
from stablekit_monitors.clipping_bias import ClippingBias
from stablekit_monitors.contrastive_monitor import ContrastiveMonitor
from stablekit_monitors.jsonl import JSONLines
from stablekit_monitors.logits_monitor import LogitsMonitor
from stablekit_monitors.recorder import Recorder
from stablekit_monitors.residual_monitor import ResidualMonitor
from stablekit_monitors.run_log import RunLog, RunReader, read_run
from stablekit_monitors.spike_monitor import SpikeMonitor
from stablekit_monitors.tensorboard import TensorBoard
from stablekit_monitors.trackers import Tracker
from stablekit_monitors.update_monitor import UpdateMonitor

__all__ = [
    "ActivationMonitor",
    "AttentionMonitor",
    "ClippingBias",
    "ContrastiveMonitor",
    "JSONLines",
    "LogitsMonitor",
    "Recorder",
    "ResidualMonitor",
    "RunLog",
    "RunReader",
    "SpikeMonitor",
    "TensorBoard",
    "Tracker",
    "UpdateMonitor",
    "read_run",
]
