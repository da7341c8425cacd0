"""Zeros on several processes: the same ones as on one, and they stay, with clean moments."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback

import strategy_runs as runs
import tiny
from plprune.budget import Budget
from plprune.callbacks import KeepMasks, LoRARecovery, Prune, Statistics
from plprune import dist
from plprune.drivers.in_memory import prune_model
from plprune.drivers.job import Job
from plprune.drivers.one_shot import prune
from plprune.lit.kept_zeros import KeptZeros, count_zeros
from plprune.methods.base import Method
from plprune.methods.sparsegpt import SparseGPT
from plprune.methods.wanda import Wanda
from plprune.outliers import OutlierWeighed
from plprune.schedule import Linear
from ranks import RankError, run_ranks

every_strategy = pytest.mark.parametrize("name", list(runs.STRATEGIES))
HALF = Budget(keep=0.5, base="prunable")


class Counted(Callback):
    """Zeros at the end."""

    found: dict[str, int]

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Collective."""
        self.found = count_zeros(pl_module.net)


def sparse(method: Method) -> list[Callback]:
    statistics = Statistics(batches=tiny.batches(3))
    schedule = Linear(cuts=2, begin=2, end=5, unit="step")
    return [Prune(method, HALF, schedule, statistics=statistics)]


def train(name: str, world: int, callbacks: list[Callback], **settings: Any) -> dict[str, Any]:
    counted = Counted()
    if world == 1:
        found = runs.alone(name, callbacks=lambda: [*callbacks, counted], **settings)
    else:
        found = runs.fit_on(name, world, callbacks=lambda: [*callbacks, counted], **settings)
    return {**found, "zeros": counted.found}


@pytest.mark.world_size(2)
@every_strategy
@pytest.mark.parametrize("method", [Wanda(), SparseGPT()], ids=["wanda", "sparsegpt"])
def test_cuts_in_a_fit_are_those_of_one_process(name: str, method: Method):
    alone = run_ranks(lambda: train(name, 1, sparse(method)), 1)[0]
    found = run_ranks(lambda: train(name, 2, sparse(method)), 2)
    shapes = {n: p.numel() for n, p in tiny.model().named_parameters()}
    for rank in found:
        assert rank["plans"] == found[0]["plans"]
        assert rank["weights"] == found[0]["weights"]
        assert {n: z / shapes[f"{n}.weight"] for n, z in rank["zeros"].items()} == dict.fromkeys(
            rank["zeros"], 0.5
        )
        assert runs.gap(rank, alone) < runs.TOLERANCE


@pytest.mark.world_size(2)
@every_strategy
def test_blocks_lose_by_their_outliers_as_on_one_process(name: str):
    """Also where weights are divided: D is taken before the first cut, by all together."""
    method = Wanda(allocation=OutlierWeighed(threshold=2.5, spread=0.1))
    alone = run_ranks(lambda: train(name, 1, sparse(method)), 1)[0]
    found = run_ranks(lambda: train(name, 2, sparse(method)), 2)
    weights = sum(
        p.numel() for n, p in tiny.model().named_parameters() if n[: -len(".weight")] in alone["zeros"]
    )
    for rank in found:
        assert rank["plans"] == found[0]["plans"]
        assert rank["weights"] == found[0]["weights"]
        assert rank["zeros"] == alone["zeros"]
        assert sum(rank["zeros"].values()) == weights // 2
        assert runs.gap(rank, alone) < runs.TOLERANCE
    sizes = {n: p.numel() for n, p in tiny.model().named_parameters()}
    assert len({round(z / sizes[f"{n}.weight"], 2) for n, z in alone["zeros"].items()}) == 2


def pruned_folder(folder: str, target: str, count: int) -> str:
    """Of one rank with its share of the calibration set."""
    method = SparseGPT(allocation=OutlierWeighed(threshold=2.5, spread=0.1))
    share = tiny.batches(count)[dist.rank() :: dist.world_size()]
    done = prune(
        Job(folder=Path(folder), target=Path(target), method=method, budget=HALF, batches=share)
    )
    zeros = {name: done.read(name) == 0 for name in done.source.places}
    return hashlib.sha256(
        b"".join(zeros[name].numpy().tobytes() for name in sorted(zeros))
    ).hexdigest()


@pytest.mark.world_size(2)
def test_a_folder_is_pruned_by_its_outliers_as_by_one_process(tmp_path: Path):
    tiny.model("llama-gqa", num_hidden_layers=4).save_pretrained(tmp_path / "dense")
    dense = str(tmp_path / "dense")
    one = run_ranks(lambda: process(dense, str(tmp_path / "one"), 4), 1)[0]
    two = run_ranks(lambda: process(dense, str(tmp_path / "two"), 4), 2)
    assert two == [one, one]
    # Negative control: another calibration set makes other zeros.
    assert run_ranks(lambda: process(dense, str(tmp_path / "other"), 3), 1)[0] != one
    notes = [tmp_path / f".{name}.unfinished" / "notes.json" for name in ("one", "two")]
    first, second = (json.loads(path.read_text("utf-8")) for path in notes)
    assert first == pytest.approx(second, abs=1e-12)
    assert len(set(first)) > 1


def process(folder: str, target: str, count: int) -> str:
    """In a process group."""
    torch.distributed.init_process_group("gloo")
    try:
        return pruned_folder(folder, target, count)
    finally:
        torch.distributed.destroy_process_group()


class Pruned(Callback):
    """Zeros before anything is wrapped."""

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """The model is complete on every process."""
        prune_model(pl_module.net, Wanda(), HALF, tiny.batches(2))


@pytest.mark.world_size(2)
@every_strategy
def test_a_pruned_model_is_tuned_around_its_zeros(name: str):
    settings = {"optimizer": "sgd", "gradient_clip_val": 0.1, "accumulate_grad_batches": 2}
    alone = run_ranks(lambda: train(name, 1, [Pruned(), KeepMasks()], **settings), 1)[0]
    found = run_ranks(lambda: train(name, 2, [Pruned(), KeepMasks()], **settings), 2)
    assert found[0]["zeros"] == found[1]["zeros"] == alone["zeros"]
    assert sum(alone["zeros"].values()) > 0
    assert runs.gap(found[0], alone) < runs.TOLERANCE


@pytest.mark.world_size(2)
@every_strategy
def test_gradients_that_are_not_cleared_are_noticed(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(KeptZeros, "clear", lambda self: None)
    monkeypatch.setattr(KeptZeros, "_hook", lambda self: None)
    with pytest.raises(RankError, match="zeros did not stay"):
        run_ranks(lambda: train(name, 2, [Pruned(), KeepMasks()]), 2)


@pytest.mark.world_size(2)
@every_strategy
def test_adapters_leave_zeros(name: str):
    def callbacks() -> list[Callback]:
        return [*sparse(Wanda()), runs.Reseed(), LoRARecovery({"r": 2}, start="last_cut")]

    settings = {"optimizer": "one group"}
    alone = run_ranks(lambda: train(name, 1, callbacks(), **settings), 1)[0]
    found = run_ranks(lambda: train(name, 2, callbacks(), **settings), 2)
    assert found[0]["zeros"] == found[1]["zeros"] == alone["zeros"]
    if name != "zero3":  # there the weight is not at hand when the product of the factors is
        assert runs.gap(found[0], alone) < runs.TOLERANCE


def test_counts_are_of_tensors():
    model = tiny.model()
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[0, :3] = 0
    assert sum(count_zeros(model).values()) == 3
