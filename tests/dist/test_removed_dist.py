"""Blocks and sublayers leave a run on several processes as they leave one on a single one."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint

import fitting
import strategy_runs as runs
from plprune.budget import Budget
from plprune.callbacks import LoRARecovery
from plprune.lit.strategies import base, fsdp2_groups
from plprune.methods.depth import Depth
from plprune.surgery import state
from ranks import RankError
from strategy_runs import TOLERANCE, on_ranks

pytestmark = [
    pytest.mark.world_size(2),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed from"),
    pytest.mark.filterwarnings("ignore:When saving the DeepSpeed Stage 3 checkpoint"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used"),
]
every_strategy = pytest.mark.parametrize("name", list(runs.STRATEGIES))
DEEP: dict[str, Any] = {"model": {"num_hidden_layers": 4}, "max_steps": 9}


def pruned(units: Any = "sublayers", criterion: Any = "influence", **more: Any) -> Any:
    """Two cuts, after steps 2 and 6."""
    method = Depth(units=units, criterion=criterion)
    budget = Budget(keep=0.5 if units == "blocks" else 0.55, base="blocks")
    return fitting.prune(fitting.linear(2, 2, 6), method=method, budget=budget, **more)


def adapted(start: Any) -> list[Callback]:
    return [pruned(), runs.Reseed(), LoRARecovery({"r": 2}, start=start, merge=False)]


CASES: dict[str, dict[str, Any]] = {
    "blocks": {"callbacks": lambda: [pruned("blocks")], "optimizer": "sgd"},
    "sublayers, masked first": {"callbacks": lambda: [pruned(commit="last")]},
    "by loss": {"callbacks": lambda: [pruned(criterion="loss")]},
    "adapters from the start": {"callbacks": lambda: adapted("fit"), "optimizer": "one group"},
    "adapters later": {"callbacks": lambda: adapted("last_cut"), "optimizer": "one group"},
}


@every_strategy
@pytest.mark.parametrize("settings", CASES.values(), ids=list(CASES))
def test_two_processes_are_one(name: str, settings: dict[str, Any]):
    alone = runs.alone(name, **DEEP, **settings)
    found = on_ranks(name, **DEEP, **settings)
    for rank in found:
        assert rank["plans"] == found[0]["plans"] == alone["plans"]
        assert rank["weights"] == found[0]["weights"]
        assert rank["weights"].keys() == alone["weights"].keys()
        assert runs.gap(rank, alone) < TOLERANCE
        assert rank["rates"] == alone["rates"]
    assert {0} & {width for widths in found[0]["widths"].values() for width in widths}


def saver(folder: Path) -> ModelCheckpoint:
    return ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)


@every_strategy
@pytest.mark.parametrize("commit", ["every", "last"])
def test_resumed_is_uninterrupted(name: str, commit: str, tmp_path: Path):
    """From inside the first phase after a removal, and from after the last one."""
    run = {**DEEP, "enable_checkpointing": True}
    make = lambda: [pruned(commit=commit), saver(tmp_path / "one")]  # noqa: E731
    again = lambda: [pruned(commit=commit), saver(tmp_path / "two")]  # noqa: E731
    whole = on_ranks(name, callbacks=make, **run)
    for step in (4, 7):
        path = tmp_path / "one" / f"step={step}.ckpt"
        found = on_ranks(name, callbacks=again, ckpt_path=path, **run)
        assert found[0]["plans"] == whole[0]["plans"]
        assert runs.gap(found[0], {"losses": whole[0]["losses"][step:]}) < TOLERANCE
        assert found[0]["weights"].keys() == whole[0]["weights"].keys()


@pytest.mark.parametrize(
    ("one", "other"), [("zero3", "fsdp2"), ("fsdp2", "ddp"), ("zero2", "zero3")]
)
def test_a_checkpoint_moves(one: str, other: str, tmp_path: Path):
    """Removed tensors are missed by no strategy; all in float32, as DeepSpeed's masters are."""
    model = {"num_hidden_layers": 4, "dtype": torch.float32}
    run = {**DEEP, "enable_checkpointing": True, "model": model}
    make = lambda: [pruned(), saver(tmp_path / "one")]  # noqa: E731
    again = lambda: [pruned(), saver(tmp_path / "two")]  # noqa: E731
    whole = on_ranks(one, callbacks=make, **run)
    found = on_ranks(other, callbacks=again, ckpt_path=tmp_path / "one" / "step=4.ckpt", **run)
    assert found[0]["plans"] == whole[0]["plans"]
    assert runs.gap(found[0], {"losses": whole[0]["losses"][4:]}) < 20 * TOLERANCE


def test_an_empty_group_left_on_is_noticed(monkeypatch: pytest.MonkeyPatch):
    """Negative control: FSDP cannot gather nothing."""
    alone = runs.alone("fsdp2", **DEEP, **CASES["blocks"])
    monkeypatch.setattr(fsdp2_groups, "_let_go", lambda *_: None)
    try:
        found = on_ranks("fsdp2", **DEEP, **CASES["blocks"])
    except RankError:
        return
    assert runs.gap(found[0], alone) > 50 * TOLERANCE


def test_parameters_an_optimizer_keeps_are_noticed(monkeypatch: pytest.MonkeyPatch):
    """Negative control: what is gone would stay in its groups."""

    def keeps(optimizer: Any, swaps: Any, *, gone: Any, reset: bool) -> None:
        del gone
        state.slice_optimizer(optimizer, swaps, reset=reset)

    monkeypatch.setattr(base, "slice_optimizer", keeps)
    with pytest.raises(RankError, match="the optimizer does not match the model"):
        on_ranks("ddp", **DEEP, **CASES["blocks"])


def by_layer(module: Any) -> Any:
    """One group a layer, as for rates that fall with depth."""
    groups: dict[str, list[Any]] = {}
    for name, parameter in module.named_parameters():
        groups.setdefault(name.partition("layers.")[2].partition(".")[0], []).append(parameter)
    optimizer = torch.optim.AdamW([{"params": own} for own in groups.values()], lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 40)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def test_groups_of_single_layers(monkeypatch: pytest.MonkeyPatch):
    """An empty group stays in torch's optimizers; DeepSpeed would drop it, and is refused."""
    monkeypatch.setitem(runs.OPTIMIZERS, "by layer", by_layer)
    settings = {**DEEP, "optimizer": "by layer", "callbacks": CASES["blocks"]["callbacks"]}
    assert runs.gap(on_ranks("fsdp2", **settings)[0], runs.alone("fsdp2", **settings)) < TOLERANCE
    with pytest.raises(RankError, match="an optimizer group would lose its last tensor"):
        on_ranks("zero2", **settings)
