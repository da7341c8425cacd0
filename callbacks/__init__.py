"""Lightning callbacks: usable by `class_path` in any LightningCLI and by hand in a plain script."""

from plprune.callbacks.prune import Prune
from plprune.callbacks.statistics import Statistics

__all__ = ["Prune", "Statistics"]
