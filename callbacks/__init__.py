"""Lightning callbacks: usable by `class_path` in any LightningCLI and by hand in a plain script."""

from plprune.callbacks.export import ExportHF
from plprune.callbacks.lora import LoRARecovery
from plprune.callbacks.masks import KeepMasks
from plprune.callbacks.monitor import SizeMonitor
from plprune.callbacks.prune import Prune
from plprune.callbacks.report import PruneReport
from plprune.callbacks.statistics import Statistics

__all__ = [
    "ExportHF",
    "KeepMasks",
    "LoRARecovery",
    "Prune",
    "PruneReport",
    "SizeMonitor",
    "Statistics",
]
