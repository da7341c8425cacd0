"""The strict environment every test runs in.

Offline, deterministic, one thread per worker, and left as it was found: environment variables,
torch's global switches and process groups. Warnings are errors (see pyproject.toml).
"""

import os

# Before anything that reads them at import: huggingface_hub, datasets and tokenizers do. Children
# inherit them. CUDA_VISIBLE_DEVICES can be given from outside to run the suite with a GPU in sight.
os.environ.update(
    HF_HUB_OFFLINE="1",
    TRANSFORMERS_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    HF_HUB_DISABLE_PROGRESS_BARS="1",
    DO_NOT_TRACK="1",
    TOKENIZERS_PARALLELISM="false",
    MPLBACKEND="agg",
)
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"

import random
import socket
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)

SEED = 0


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--network", action="store_true", help="run the tests that need the network")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--network"):
        return
    skip = pytest.mark.skip(reason="needs the network: give --network")
    for item in items:
        if item.get_closest_marker("network"):
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def _environment_restored() -> Iterator[None]:
    # A seed that a fixture of a whole module set would be set again when processes meet.
    os.environ.pop("PL_GLOBAL_SEED", None)
    before = dict(os.environ)
    yield
    # pytest writes this one itself between the phases of a test.
    current = os.environ.get("PYTEST_CURRENT_TEST")
    os.environ.clear()
    os.environ.update(before)
    if current is not None:
        os.environ["PYTEST_CURRENT_TEST"] = current


@pytest.fixture(autouse=True)
def _deterministic() -> Iterator[None]:
    random.seed(SEED)
    np.random.seed(SEED)  # noqa: NPY002  libraries under test draw from the global generator
    torch.manual_seed(SEED)
    dtype, grad = torch.get_default_dtype(), torch.is_grad_enabled()
    strict = torch.are_deterministic_algorithms_enabled()
    yield
    torch.set_default_dtype(dtype)
    torch.set_grad_enabled(grad)
    torch.use_deterministic_algorithms(strict)


@pytest.fixture(autouse=True)
def _no_process_group_left() -> Iterator[None]:
    yield
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
        pytest.fail("the test left a process group initialised: destroy it in a `finally`")


@pytest.fixture(autouse=True)
def _offline(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refuse connections that leave the machine, so that "offline" is not a matter of flags."""
    if request.node.get_closest_marker("network"):
        return
    connect = socket.socket.connect

    def guarded(self: socket.socket, address: Any) -> None:
        if self.family in (socket.AF_INET, socket.AF_INET6):
            host = address[0]
            if host not in ("localhost", "::1", "") and not str(host).startswith("127."):
                raise OSError(f"the test suite is offline, and a test asked for {host!r}")
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", guarded)
