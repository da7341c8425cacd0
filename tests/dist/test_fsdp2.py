"""FSDP2 processes train, cut and recover like one process on the same global batches."""

from typing import Any

import pytest
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.fsdp import fully_shard

import fitting
import strategy_runs as runs
from ranks import run_ranks

CASES: dict[str, dict[str, Any]] = {
    "every, adamw": {},
    "last, sgd": {"optimizer": "sgd", "callbacks": lambda: [fitting.prune(commit="last")]},
    "accumulation, clipping, odd epochs": {
        "optimizer": "sgd",
        "accumulate_grad_batches": 2,
        "gradient_clip_val": 0.5,
        "rows": 20,
        "callbacks": lambda: [fitting.prune(fitting.linear(2, 2, 5))],
        "max_steps": 8,
    },
}
# The models are float64; transformers computes the loss in float32.
TOLERANCE = 2e-6


class Sharded(fitting.User):
    """Shards its model by hand, as a user would."""

    def configure_model(self) -> None:
        """Blocks, then the rest; Lightning asks for it to do nothing the second time."""
        from torch.distributed.fsdp import FSDPModule

        if isinstance(self.net, FSDPModule):
            return
        mesh = self.device_mesh["data_parallel"]
        for block in self.net.model.layers:
            fully_shard(block, mesh=mesh)
        fully_shard(self.net, mesh=mesh)


def on_ranks(world: int, **settings: Any) -> list[dict[str, Any]]:
    def run() -> dict[str, Any]:
        return runs.fit(
            lambda: ModelParallelStrategy(data_parallel_size=world, tensor_parallel_size=1),
            world=world,
            module=Sharded,
            **settings,
        )

    return run_ranks(run, world)


@pytest.mark.world_size(2)
@pytest.mark.parametrize("settings", CASES.values(), ids=list(CASES))
def test_two_processes_are_one(settings: dict[str, Any]):
    alone = runs.fit(**settings)
    both = on_ranks(2, **settings)
    assert both[0]["plans"] == both[1]["plans"] == alone["plans"]
    assert both[0]["weights"] == both[1]["weights"]
    for found in both:
        assert runs.gap(found, alone) < TOLERANCE
        assert found["rates"] == alone["rates"]
        assert found["widths"] == alone["widths"]
        assert found["steps"] == alone["steps"]
