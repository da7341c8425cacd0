"""What every process of these tests needs is imported once, before any of them is forked."""

import importlib
from contextlib import suppress

import pytest


@pytest.fixture(scope="session", autouse=True)
def _imported() -> None:
    """DeepSpeed's optimizers import torch's compiler: longer than most of these runs."""
    with suppress(ImportError):
        importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")
