"""Number formats that this processor multiplies slowly."""

from __future__ import annotations

import logging
import time

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.accelerators import CPUAccelerator

log = logging.getLogger("plprune")

_FORMATS = {"bf16": torch.bfloat16, "16": torch.float16}
_SLOW = 8.0
"""Times as long as in float32; processors with instructions for a format take less than once, those
that convert tile by tile two or three times, the others a hundred."""


def slowness(dtype: torch.dtype, size: int = 512, tokens: int = 16) -> float:
    """How much longer a product of a gradient and a weight takes than in float32.

    Args:
        dtype: number format.
        size: rows and columns of the weight.
        tokens: rows of the gradient.

    Returns:
        Ratio of the shortest of three times each, on the CPU.
    """
    weight, gradient = torch.ones(size, size), torch.ones(tokens, size)
    best = []
    for one in (dtype, torch.float32):
        left, right = gradient.to(one), weight.to(one)
        left @ right  # the first sets up
        times = []
        for _ in range(3):
            began = time.perf_counter()
            left @ right
            times.append(time.perf_counter() - began)
        best.append(min(times))
    return best[0] / best[1]


def warn_slow(trainer: Trainer) -> None:
    """Say before training that steps would take many times as long as in float32.

    Args:
        trainer: with its accelerator and precision.
    """
    dtype = _FORMATS.get(str(trainer.precision).partition("-")[0])
    if dtype is None or not isinstance(trainer.accelerator, CPUAccelerator):
        return
    times = slowness(dtype)
    if times > _SLOW and trainer.is_global_zero:
        log.warning(
            "trainer.precision %s: this processor has no instructions for it, products in training "
            "take about %.0f times as long as in float32; set trainer.precision: 32-true",
            trainer.precision,
            times,
        )
