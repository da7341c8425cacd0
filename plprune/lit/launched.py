"""Processes that torchrun or srun started, for commands without a trainer."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import torch
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment

from plprune.errors import ConfigError, first_line


@contextlib.contextmanager
def process_group(device: str | None) -> Iterator[str]:
    """Join the processes that were started together, if any.

    Args:
        device: where to compute; None: this process's CUDA device if there is one, else the CPU.

    Yields:
        The device.

    Raises:
        ConfigError: for a device that is not there.
    """
    import torch.distributed as dist

    environment = _environment()
    local = 0 if environment is None else environment.local_rank()
    found = device or (f"cuda:{local}" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(
            "--device cannot be used",
            given=f"{found} ({first_line(error)})",
            allowed="cpu, or a device that torch sees, such as cuda or cuda:1",
        ) from error
    if environment is None or environment.world_size() == 1:
        yield found
        return
    if found.startswith("cuda"):
        torch.cuda.set_device(found)
    os.environ.setdefault("MASTER_ADDR", environment.main_address)
    os.environ.setdefault("MASTER_PORT", str(environment.main_port))
    dist.init_process_group(
        "nccl" if found.startswith("cuda") else "gloo",
        rank=environment.global_rank(),
        world_size=environment.world_size(),
    )
    try:
        yield found
    finally:
        dist.destroy_process_group()


def _environment() -> SLURMEnvironment | TorchElasticEnvironment | None:
    if TorchElasticEnvironment.detect():
        return TorchElasticEnvironment()
    if SLURMEnvironment.detect() and "SLURM_PROCID" in os.environ:
        return SLURMEnvironment()
    return None
