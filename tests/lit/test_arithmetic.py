"""A precision that the processor is slow in is said before training."""

import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.accelerators import CPUAccelerator, CUDAAccelerator

from plprune.lit import arithmetic


def trainer(precision: str, accelerator: Any = None, first: bool = True) -> Any:
    return SimpleNamespace(
        precision=precision, accelerator=accelerator or CPUAccelerator(), is_global_zero=first
    )


@pytest.mark.parametrize(
    ("given", "times", "said"),
    [
        (trainer("bf16-mixed"), 99.0, True),
        (trainer("16-true"), 99.0, True),
        (trainer("bf16-true"), 3.0, False),
        (trainer("32-true"), 99.0, False),
        (trainer("64-true"), 99.0, False),
        (trainer("bf16-mixed", CUDAAccelerator()), 99.0, False),
        (trainer("bf16-mixed", first=False), 99.0, False),
    ],
)
def test_said_where_it_is_slow(
    given: Any,
    times: float,
    said: bool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(arithmetic, "slowness", lambda dtype: times)
    with caplog.at_level(logging.WARNING, logger="plprune"):
        arithmetic.warn_slow(given)
    assert ("99 times as long" in caplog.text) is said
    assert ("trainer.precision: 32-true" in caplog.text) is said


def test_what_is_measured_is_a_product() -> None:
    assert arithmetic.slowness(torch.float32) < 4
    assert arithmetic.slowness(torch.float64) > 0.5
