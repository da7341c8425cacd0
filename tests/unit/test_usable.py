"""Settings of strategies that are refused before anything is set up."""

from typing import Any

import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy

from plprune.errors import ConfigError
from plprune.lit.strategies.usable import require_elementwise, require_engine, require_known

ZERO = {"zero_optimization": {"stage": 2}}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "names no ZeRO stage"),
        ({"zero_optimization": {"stage": 7}}, "stage: 7"),
        ({"zero_optimization": {"stage": True}}, "stage: True"),
        (ZERO | {"scheduler": {"type": "WarmupLR"}}, "model.learning_rate"),
        (ZERO | {"gradient_accumulation_steps": 2}, "trainer.accumulate_grad_batches"),
        (ZERO | {"fp16": {"enabled": True}, "bf16": {"enabled": True}}, "two number formats"),
    ],
)
def test_engines_that_are_refused(config: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        require_engine(config)


def test_engines_that_are_not():
    require_engine(ZERO)
    require_engine({"zero_optimization": {"stage": 3}, "bf16": {"enabled": True}, "fp16": {}})


def test_an_optimizer_that_deepspeed_replaces():
    weights = [torch.nn.Parameter(torch.ones(2))]
    require_elementwise(torch.optim.AdamW(weights))
    with pytest.raises(ConfigError, match="given Adagrad"):
        require_elementwise(torch.optim.Adagrad(weights))


@pytest.mark.parametrize("name", ["fsdp", "fsdp_cpu_offload", "deepspeed", "deepspeed_stage_3"])
def test_names_that_are_refused(name: str):
    with pytest.raises(ConfigError, match="cannot be cut during fit"):
        require_known(name)


@pytest.mark.parametrize(
    "strategy",
    ["ddp_spawn", "ddp_fork_find_unused_parameters_true", DDPStrategy(start_method="spawn")],
)
def test_processes_that_are_children_are_refused(strategy: Any):
    with pytest.raises(ConfigError, match="a model cut in a child process cannot come back"):
        require_known(strategy)


@pytest.mark.parametrize("name", ["auto", "ddp", "fsdp2", "zero3", DDPStrategy()])
def test_names_that_are_not(name: Any):
    require_known(name)
