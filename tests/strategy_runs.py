"""One pruned run on any strategy, and what is compared between them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import torch.distributed
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.strategies import ModelParallelStrategy
from safetensors.torch import load_file
from torch.distributed.fsdp import FSDPModule, fully_shard

import fitting
from fitting import User
from plprune.lit.loader import TokenLoader
from plprune.lit.strategies.deepspeed import ZeRO
from plprune.sharded import whole
from ranks import run_ranks

GLOBAL_BATCH = 4
# The models are float64; transformers computes the loss in float32.
TOLERANCE = 2e-6


def adamw(module: LightningModule) -> Any:
    """AdamW in two groups with a cosine."""
    return _two_groups(module, lambda groups: torch.optim.AdamW(groups, lr=3e-3, weight_decay=0.05))


class Doubled(Callback):
    """Gradients of twice the size."""

    def on_train_start(self, trainer: Any, pl_module: LightningModule) -> None:
        """DeepSpeed takes gradients away as they come: they are doubled on their way."""
        if isinstance(trainer.strategy, ZeRO):
            for parameter in pl_module.parameters():
                parameter.register_hook(lambda grad: 2 * grad)

    def on_after_backward(self, trainer: Any, pl_module: LightningModule) -> None:
        """As if they had not been divided."""
        for parameter in pl_module.parameters():
            if parameter.grad is not None and not isinstance(trainer.strategy, ZeRO):
                parameter.grad = 2 * parameter.grad


def sgd(module: LightningModule) -> Any:
    """SGD with momentum in two groups: unlike Adam it shows a gradient of the wrong size."""
    return _two_groups(module, lambda groups: torch.optim.SGD(groups, lr=0.05, momentum=0.9))


def _two_groups(module: LightningModule, make: Callable[[Any], Any]) -> Any:
    trained = [p for p in module.parameters() if p.requires_grad]
    vectors, matrices = [p for p in trained if p.dim() < 2], [p for p in trained if p.dim() > 1]
    optimizer = make([{"params": matrices}, {"params": vectors, "weight_decay": 0.0}])
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 40)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def one_group(module: LightningModule) -> Any:
    """AdamW with a cosine, over what is trainable; torch cannot reload groups without tensors."""
    trained = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 40)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


OPTIMIZERS = {"adamw": adamw, "sgd": sgd, "one group": one_group}


class Reseed(Callback):
    """Adapters that are drawn now are the same, whatever numbers an engine drew before."""

    def on_train_batch_end(self, *_: Any) -> None:
        """Before the callback that injects."""
        torch.manual_seed(0)


class Sharded(User):
    """Shards its model by hand, as a user would."""

    def configure_model(self) -> None:
        """Blocks, then the rest; Lightning asks for it to do nothing the second time."""
        mesh = self.device_mesh["data_parallel"]
        if not isinstance(self.net, FSDPModule):
            for block in self.net.model.layers:
                fully_shard(block, mesh=mesh)
            fully_shard(self.net, mesh=mesh)


def on_ranks(name: str, world: int = 2, **settings: Any) -> list[dict[str, Any]]:
    """`fit` on several processes.

    Args:
        name: key of `STRATEGIES`.
        world: number of processes.
        settings: of `fit`.

    Returns:
        What each rank returned.
    """
    return run_ranks(lambda: fit_on(name, world, **settings), world)


def fit_on(name: str, world: int, **settings: Any) -> dict[str, Any]:
    """`fit` on one of several processes."""
    make, module = STRATEGIES[name]
    return fit(make(world), world=world, **{"module": module, **settings})


def alone(name: str, **settings: Any) -> dict[str, Any]:
    """`fit` on one process, with the numbers a strategy computes in."""
    module = Single if name.startswith("zero") else User
    return fit(**{"module": module, **settings})


class Single(User):
    """The same in float32: DeepSpeed keeps masters in nothing else."""

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **{"dtype": torch.float32, **more})


def _zero(stage: int) -> Any:
    """DeepSpeed divides only large tensors by default, which would hide mistakes here."""
    sizes = {"stage3_param_persistence_threshold": 0} if stage == 3 else {}
    zero = {"stage": stage, "overlap_comm": False, **sizes}
    config = {"zero_allow_untested_optimizer": True, "zero_optimization": zero}
    return ZeRO(config={"train_micro_batch_size_per_gpu": 1, **config})


STRATEGIES: dict[str, tuple[Callable[[int], Any], type[User]]] = {
    "ddp": (lambda world: "ddp", User),
    "fsdp2": (
        lambda world: ModelParallelStrategy(data_parallel_size=world, tensor_parallel_size=1),
        Sharded,
    ),
    "zero1": (lambda world: _zero(1), Single),
    "zero2": (lambda world: _zero(2), Single),
    "zero3": (lambda world: _zero(3), Single),
}


def fit(
    strategy: Any = "auto",
    *,
    world: int = 1,
    optimizer: str = "adamw",
    callbacks: Callable[[], list[Callback]] = lambda: [fitting.prune()],
    module: Callable[..., User] = User,
    rows: int = 64,
    global_batch: int = GLOBAL_BATCH,
    model: Mapping[str, Any] = MappingProxyType({}),
    **more: Any,
) -> dict[str, Any]:
    """Train, cut, and say what happened, in plain values.

    Args:
        strategy: of Lightning; a function makes one in the process that uses it.
        world: number of processes; the global batch is the same for every number.
        optimizer: key of `OPTIMIZERS`.
        callbacks: made in the process that uses them.
        module: class of the module.
        rows: of the training data.
        global_batch: rows of a batch, of all processes together.
        model: arguments of the module.
        more: arguments of the trainer, `ckpt_path` of fit.
    """
    made = list(callbacks())
    ckpt_path = more.pop("ckpt_path", None)
    strategy = strategy() if callable(strategy) else strategy
    trainer = fitting.trainer(
        made, strategy=strategy, devices=world, use_distributed_sampler=False, **more
    )
    user = module(optimizers=OPTIMIZERS[optimizer], **model)
    data = TokenLoader(fitting.blocks(rows), global_batch // world)
    trainer.fit(user, data, ckpt_path=ckpt_path)
    return outcome(trainer, user)


def outcome(trainer: Any, user: User) -> dict[str, Any]:
    """Losses of all ranks averaged, rates, plans, weights and moments."""
    pruner = next((c for c in trainer.callbacks if hasattr(c, "progressive")), None)
    losses = torch.tensor(user.losses, dtype=torch.float64)
    if trainer.world_size > 1:
        torch.distributed.all_reduce(losses)
    found: dict[str, Any] = {
        "losses": (losses / trainer.world_size).tolist(),
        "rates": user.rates,
        "steps": trainer.global_step,
        "weights": {name: digest(tensor) for name, tensor in user.net.named_parameters()},
    }
    if pruner is not None and pruner.progressive is not None:
        found["plans"] = [entry["plan"] for entry in pruner.progressive.history]
        found["widths"] = pruner.progressive.spec.widths()
    return found


def digest(tensor: Any) -> str:
    """Shape and hash of a tensor's bytes."""
    complete = whole(tensor).detach().cpu().contiguous()
    content = complete.reshape(-1).view(torch.uint8).numpy().tobytes()  # numpy knows no bfloat16
    return f"{list(complete.shape)} {hashlib.sha256(content).hexdigest()[:12]}"


def gap(one: dict[str, Any], other: dict[str, Any]) -> float:
    """Largest difference of two loss curves, relative to losses above 5."""
    assert len(one["losses"]) == len(other["losses"])
    scale = max(1.0, max(other["losses"]) / 5)
    return fitting.gap(one["losses"], other["losses"]) / scale


def everything(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors in the safetensors files below a folder."""
    files = sorted(folder.rglob("*.safetensors"))
    return {
        f"{f.parent.relative_to(folder)} {n}": t for f in files for n, t in load_file(f).items()
    }
