"""Additive statistics of activations: everything merges by `+`."""

from plprune.stats.base import Stat, Tap
from plprune.stats.cosine import Cosine
from plprune.stats.energy import Energy
from plprune.stats.gram import Gram
from plprune.stats.moments import Moments

__all__ = ["Cosine", "Energy", "Gram", "Moments", "Stat", "Tap"]
