"""Half precision, other optimizers and schedules: cuts keep the precise copies of the weights."""

import shutil
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback

import fitting
import strategy_runs as runs
from plprune.lit.strategies import zero, zero_state
from ranks import run_ranks
from strategy_runs import on_ranks

pytestmark = pytest.mark.world_size(2)
zeros = pytest.mark.parametrize("name", ["zero1", "zero2", "zero3"])


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed"])
@pytest.mark.parametrize("name", list(runs.STRATEGIES))
def test_half_precision_follows_one_process(name: str, precision: Any):
    settings = {"precision": precision, "module": runs.Single}
    if name == "fsdp2":
        settings["module"] = Sharded32
    found = on_ranks(name, **settings)
    expected = runs.fit(precision=precision, module=runs.Single)
    assert found[0]["plans"] == found[1]["plans"]
    assert found[0]["widths"] == expected["widths"]
    assert found[0]["rates"] == expected["rates"]
    assert runs.gap(found[0], expected) < 0.03, "three digits of a number, summed in another order"


class Sharded32(runs.Sharded, runs.Single):
    """Shards itself, in float32."""


class Masters(Callback):
    """Compares the precise copies before and after every cut."""

    def __init__(self) -> None:
        self.same: list[bool] = []
        self.rounded: list[bool] = []

    def look(self, trainer: Any) -> torch.Tensor:
        parameter = trainer.lightning_module.net.model.embed_tokens.weight
        return zero_state.complete(parameter, zero_state.MASTER).clone()


@zeros
@pytest.mark.parametrize("kept", [True, False], ids=["kept", "control"])
def test_masters_are_kept_in_full(name: str, kept: bool, monkeypatch: pytest.MonkeyPatch):
    """Made again from bfloat16 weights they would have lost most of their digits."""
    look = Masters()
    own, put_back = zero.ZeROAdapter.recut, zero.put_back

    def recut(self: Any, trainer: Any, *args: Any, **more: Any) -> Any:
        before = look.look(trainer)
        applied = own(self, trainer, *args, **more)
        after = look.look(trainer)
        look.same.append(torch.equal(before, after))
        look.rounded.append(torch.equal(after, after.bfloat16().float()))
        return applied

    monkeypatch.setattr(zero.ZeROAdapter, "recut", recut)
    if not kept:
        monkeypatch.setattr(zero, "put_back", lambda *_: None)
    else:
        monkeypatch.setattr(zero, "put_back", put_back)

    def run() -> Any:
        runs.fit_on(name, 2, precision="bf16-true", optimizer="one group", max_steps=9)
        return look.same, look.rounded

    for same, rounded in run_ranks(run, 2):
        assert same == [kept] * 3
        assert rounded == [not kept] * 3


compiles = pytest.mark.skipif(
    shutil.which("ninja") is None or shutil.which("c++") is None, reason="compiles an extension"
)


@compiles
@pytest.mark.parametrize("name", ["zero2", "zero3"])
def test_deepspeeds_own_adam_is_cut_like_torchs(name: str, monkeypatch: pytest.MonkeyPatch):
    def cpu_adam(module: Any) -> Any:
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        trained = [p for p in module.parameters() if p.requires_grad]
        return DeepSpeedCPUAdam(trained, lr=3e-3, weight_decay=0.0)

    def torch_adam(module: Any) -> Any:
        trained = [p for p in module.parameters() if p.requires_grad]
        return torch.optim.AdamW(trained, lr=3e-3, weight_decay=0.0)

    monkeypatch.setitem(runs.OPTIMIZERS, "cpu adam", cpu_adam)
    monkeypatch.setitem(runs.OPTIMIZERS, "torch adam", torch_adam)
    # Compiled once, before two processes wait for each other's lock.
    run_ranks(_compile, 1, timeout=400)
    found = on_ranks(name, optimizer="cpu adam")
    expected = runs.alone(name, optimizer="torch adam")
    assert found[0]["plans"] == expected["plans"]
    assert runs.gap(found[0], expected) < 2e-5


def _compile() -> None:
    from deepspeed.ops.op_builder import CPUAdamBuilder

    CPUAdamBuilder().load()


SCHEDULES = {
    "one cycle": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, max_lr=3e-3, total_steps=12),
    "steps": lambda o: torch.optim.lr_scheduler.StepLR(o, step_size=3, gamma=0.5),
    "warm restarts": lambda o: torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(o, T_0=5),
}


@pytest.mark.parametrize("kind", list(SCHEDULES))
@pytest.mark.parametrize("name", ["fsdp2", "zero2", "zero3"])
def test_schedules_go_on_through_cuts(name: str, kind: str, monkeypatch: pytest.MonkeyPatch):
    def scheduled(module: Any) -> Any:
        optimizer = torch.optim.AdamW(module.parameters(), lr=3e-3)
        made = SCHEDULES[kind](optimizer)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": made, "interval": "step"}}

    monkeypatch.setitem(runs.OPTIMIZERS, kind, scheduled)
    found, expected = on_ranks(name, optimizer=kind), runs.alone(name, optimizer=kind)
    assert found[0]["rates"] == expected["rates"]
    assert len(set(expected["rates"])) > 2
    assert runs.gap(found[0], expected) < runs.TOLERANCE


