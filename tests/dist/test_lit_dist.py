"""plprune's own module, data and command line on several processes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.strategies import ModelParallelStrategy
from strategy_runs import everything

import fitting
import strategy_runs as runs
import tiny
from plprune.callbacks import ExportHF, LoRARecovery
from plprune.lit.loader import TokenLoader
from plprune.lit.model import LearningRate, LitCausalLM
from ranks import RankError, run_ranks

pytestmark = [
    pytest.mark.world_size(2),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
]


class Losses(Callback):
    """Keeps the loss of every step."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, *_: Any) -> None:
        self.values.append(float(outputs["loss"]))


def fit(base: Path, out: Path, strategy: Any = "auto", world: int = 1, **model: Any) -> list[float]:
    seen = Losses()
    callbacks = [
        fitting.prune(),
        LoRARecovery({"r": 3}),
        seen,
        ExportHF(str(out), tokenizer="none"),
    ]
    strategy = strategy() if callable(strategy) else strategy
    trainer = fitting.trainer(callbacks, strategy=strategy, devices=world)
    module = LitCausalLM(str(base), learning_rate=LearningRate(peak=3e-3), **model)
    trainer.fit(module, TokenLoader(fitting.blocks(), runs.GLOBAL_BATCH // world))
    values = torch.tensor(seen.values, dtype=torch.float64)
    if world > 1:
        torch.distributed.all_reduce(values)
    return (values / world).tolist()


def fsdp2() -> ModelParallelStrategy:
    return ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)


def zero3() -> Any:
    return runs.STRATEGIES["zero3"][0](2)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    tiny.model(dtype=torch.float32).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("strategy", ["ddp", fsdp2, zero3])
@pytest.mark.parametrize("model", [{}, {"gradient_checkpointing": True}], ids=["", "checkpointed"])
def test_our_module_is_divided_by_itself(
    base: Path, tmp_path: Path, strategy: Any, model: dict[str, Any]
):
    torch.manual_seed(0)
    alone = fit(base, tmp_path / "one", **model)
    torch.manual_seed(0)
    found = run_ranks(lambda: fit(base, tmp_path / "two", strategy, 2, **model), 2)
    assert fitting.gap(found[0], alone) < 1e-5, "float32"
    one, two = everything(tmp_path / "one"), everything(tmp_path / "two")
    for key, tensor in one.items():
        torch.testing.assert_close(two[key], tensor, rtol=1e-4, atol=1e-5, msg=key)


def test_a_model_nobody_divided_is_refused():
    def run() -> Any:
        return runs.fit(fsdp2(), world=2, module=Whole)

    with pytest.raises(RankError, match="nothing of the model is sharded: given Whole without"):
        run_ranks(run, 2)


class Whole(fitting.User):
    """Forgets to shard."""

    def configure_model(self) -> None:
        """Does nothing, which Lightning accepts."""


@pytest.mark.parametrize("name", ["zero3", "fsdp2"])
def test_adapters_that_read_weights_are_refused_before_they_are_divided(name: str):
    settings = {"callbacks": lambda: [fitting.prune(), LoRARecovery({"use_dora": True})]}
    with pytest.raises(RankError) as stopped:
        runs.on_ranks(name, **settings)
    assert str(stopped.value).count("ConfigError: these adapters need complete weights") == 2


def test_strategies_have_names_in_a_script():
    def run() -> str:
        trainer = fitting.trainer(strategy="zero2", devices=2)
        trainer.fit(runs.Single(optimizers=runs.one_group), TokenLoader(fitting.blocks(), 2))
        return type(trainer.strategy).__name__

    assert run_ranks(run, 2) == ["ZeRO", "ZeRO"]


def test_the_logged_loss_is_that_of_all(tmp_path: Path):
    base = fitting.saved(tmp_path)

    def run() -> tuple[float, list[float]]:
        seen = Losses()
        trainer = fitting.trainer([seen], strategy="ddp", devices=2, max_steps=3)
        module = LitCausalLM(str(base), learning_rate=LearningRate(peak=3e-3))
        trainer.fit(module, TokenLoader(fitting.blocks(), 2))
        return float(trainer.callback_metrics["train_loss"]), seen.values

    (one, own), (other, others) = run_ranks(run, 2)
    assert own[-1] != others[-1]
    assert one == other == pytest.approx((own[-1] + others[-1]) / 2, rel=1e-6)
