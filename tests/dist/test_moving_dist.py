"""A run goes on with another strategy, or on another number of processes, with its moments."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint

import fitting
import strategy_runs as runs
import tiny
from plprune.callbacks import LoRARecovery
from plprune.lit.cli import main
from plprune.errors import CheckpointError
from plprune.lit.readable import require_readable
from plprune.lit.saved import open_saved
from plprune.lit.saved import zero as zero_folder
from plprune.lit.strategies import fsdp2
from ranks import RankError
from strategy_runs import on_ranks
from tiny_tokenizer import tiny_tokenizer

pytestmark = [
    pytest.mark.world_size(3),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:When saving the DeepSpeed Stage 3 checkpoint"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used"),
]
STEP = 6  # cuts are made at 2, 5 and 8
BATCH = 12
MOVES = [
    ("zero3", 2, "alone", 1),
    ("zero3", 2, "fsdp2", 2),
    ("zero3", 2, "zero3", 3),
    ("zero2", 2, "zero2", 1),
    ("zero2", 3, "zero3", 2),
    ("zero1", 2, "zero2", 2),
    ("fsdp2", 2, "alone", 1),
    ("fsdp2", 2, "fsdp2", 3),
    ("fsdp2", 3, "zero3", 2),
    ("fsdp2", 2, "zero1", 3),
    ("alone", 1, "zero3", 2),
    ("alone", 1, "zero2", 2),
    ("alone", 1, "fsdp2", 2),
    ("ddp", 2, "zero3", 2),
    ("zero3", 2, "ddp", 2),
]


def pruned() -> list[Callback]:
    return [fitting.prune()]


def masked() -> list[Callback]:
    return [fitting.prune(commit="last")]


def adapted() -> list[Callback]:
    torch.manual_seed(0)  # the factors are drawn when the trainer starts
    return [fitting.prune(), LoRARecovery({"r": 2})]


def run(name: str, world: int, **settings: Any) -> dict[str, Any]:
    """All in float32: what one strategy saved the other takes as it is."""
    settings = {"global_batch": BATCH, "rows": 240, "module": runs.Single, **settings}
    if name == "alone":
        return runs.fit(**settings)
    if name == "fsdp2":
        settings["module"] = Sharded32
    return on_ranks(name, world, **settings)[0]


class Sharded32(runs.Sharded, runs.Single):
    """Shards itself, in float32."""


def saver(folder: Path) -> ModelCheckpoint:
    return ModelCheckpoint(folder, every_n_train_steps=STEP, save_top_k=-1, filename="{step}")


def start(name: str, world: int, folder: Path, **settings: Any) -> Path:
    """A run that leaves a checkpoint in the middle."""
    own = settings.pop("callbacks")
    callbacks = lambda: [*own(), saver(folder)]  # noqa: E731
    run(name, world, callbacks=callbacks, enable_checkpointing=True, **settings)
    return folder / f"step={STEP}.ckpt"


@pytest.fixture(scope="module")
def uninterrupted() -> Callable[..., dict[str, Any]]:
    known: dict[Any, dict[str, Any]] = {}

    def curve(**settings: Any) -> dict[str, Any]:
        key = tuple(settings.values())
        if key not in known:
            known[key] = run("alone", 1, **settings)
        return known[key]

    return curve


@pytest.mark.parametrize(
    ("make", "name", "world", "to", "there"),
    [(pruned, *move) for move in MOVES] + [(adapted, *move) for move in MOVES[::3]],
)
def test_a_run_moves(
    name: str,
    world: int,
    to: str,
    there: int,
    make: Callable[[], list[Callback]],
    tmp_path: Path,
    uninterrupted: Callable[..., dict[str, Any]],
):
    settings = {"callbacks": make, "optimizer": "one group" if make is adapted else "adamw"}
    whole = uninterrupted(**settings)
    path = start(name, world, tmp_path, **settings)
    found = run(to, there, ckpt_path=path, **settings)
    assert found["plans"] == whole["plans"]
    assert found["widths"] == whole["widths"]
    assert found["steps"] == whole["steps"]
    assert found["rates"][-1] == whole["rates"][-1]
    # Every micro-batch has its own loss; their mean is that of the global batch.
    assert runs.gap(found, {"losses": whole["losses"][STEP:]}) < 2e-5, "float32, other sums"


def test_without_its_moments_it_is_another_run(
    tmp_path: Path, uninterrupted: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
):
    """Negative control: weights alone do not give the curve."""
    settings = {"callbacks": pruned, "optimizer": "adamw"}
    path = start("zero3", 2, tmp_path, **settings)
    monkeypatch.setattr(fsdp2, "_fill_state", lambda *_: None)
    found = run("fsdp2", 2, ckpt_path=path, **settings)
    assert runs.gap(found, {"losses": uninterrupted(**settings)["losses"][STEP:]}) > 1e-3


def test_parameters_do_not_share_a_step(tmp_path: Path):
    """Optimizers count in place: a shared number would count every parameter."""
    saved = open_saved(start("zero2", 2, tmp_path, callbacks=pruned))
    one, other = saved.groups[0]["names"][:2]
    saved.numbers(one)["step"].add_(1)
    assert float(saved.numbers(other)["step"]) == STEP


def base(folder: Path) -> Path:
    tiny.model(dtype=torch.float32).save_pretrained(folder)
    return folder


def exported(checkpoint: Path, folder: Path, out: Path) -> dict[str, torch.Tensor]:
    args = ["--ckpt_path", str(checkpoint), "--out", str(out), "--base", str(folder)]
    assert main(["export", *args, "--to", "consolidated", "--tokenizer", str(folder)]) == 0
    return runs.everything(out)


@pytest.mark.parametrize("make", [pruned, masked, adapted])
def test_a_folder_becomes_what_a_file_becomes(
    make: Callable[[], list[Callback]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """In the middle of a run: units masked, adapters not merged."""
    tiny_tokenizer(base(tmp_path / "base"))
    settings = {"callbacks": make, "optimizer": "one group" if make is adapted else "adamw"}
    one = start("alone", 1, tmp_path / "one", **settings)
    whole = exported(one, tmp_path / "base", tmp_path / "from one")
    for name in ("fsdp2", "zero2", "zero3"):
        path = start(name, 2, tmp_path / name, **settings)
        found = exported(path, tmp_path / "base", tmp_path / f"from {name}")
        assert found.keys() == whole.keys()
        for key, tensor in whole.items():
            torch.testing.assert_close(found[key], tensor, rtol=1e-4, atol=1e-5, msg=f"{name} {key}")


@pytest.mark.parametrize("name", ["zero3", "fsdp2"])
def test_an_incomplete_folder_is_refused(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    path = start(name, 2, tmp_path, callbacks=pruned)
    out = tmp_path / "out"
    args = ["export", "--ckpt_path", str(path), "--base", str(base(tmp_path / "base"))]

    def said() -> str:
        assert main([*args, "--out", str(out)]) == 2
        assert not out.exists()
        return capsys.readouterr().err

    large = max(path.rglob("*1*optim_states.pt" if name == "zero3" else "__1_0.distcp"))
    content = large.read_bytes()
    large.write_bytes(content[: len(content) // 2])
    assert f"the checkpoint is incomplete: given {path} (" in said()
    large.unlink()
    assert f"the checkpoint is incomplete: given {path} (no {large.name}" in said()
    large.write_bytes(content)
    weights = "*rank_1*model_states.pt" if name == "zero3" else ".metadata"
    for file in (next(path.rglob(weights)), path / ("plprune.pt" if name == "zero3" else "meta.pt")):
        whole = file.read_bytes()
        file.write_bytes(whole[:10])
        assert "the checkpoint is incomplete" in said()
        file.unlink()
        if file.name != "plprune.pt":
            assert f"the checkpoint is incomplete: given {path} (no {file.name}" in said()
        file.write_bytes(whole)
    (path / "plprune.pt").unlink()
    assert "the checkpoint is not complete" in said()


@pytest.mark.parametrize("name", ["zero2", "zero3", "fsdp2"])
def test_a_damaged_folder_is_not_resumed(name: str, tmp_path: Path):
    """Found by its sizes, before anything is built for it."""
    path = start(name, 2, tmp_path, callbacks=pruned)
    large = max(path.rglob("*1*optim_states.pt" if name != "fsdp2" else "__1_0.distcp"))
    require_readable(path)
    content = large.read_bytes()
    for spoil in (lambda: large.write_bytes(content[:1000]), large.unlink):
        spoil()
        with pytest.raises(CheckpointError, match="the checkpoint is incomplete"):
            require_readable(path)
    with pytest.raises(RankError) as stopped:
        run(name, 2, ckpt_path=path, callbacks=pruned)
    assert str(stopped.value).count("CheckpointError: the checkpoint is incomplete") == 2


class ByName:
    """Written as Python 3.11.0 to 3.11.3 write members of enumerations."""

    def __init__(self, owner: Any, name: str) -> None:
        self.owner, self.name = owner, name

    def __reduce__(self) -> Any:
        return getattr, (self.owner, self.name)


def test_stages_that_older_pythons_wrote_are_read(tmp_path: Path):
    from deepspeed.runtime.zero.config import ZeroStageEnum

    file = tmp_path / "zero_pp_rank_0_mp_rank_00_optim_states.pt"
    torch.save({"stage": ByName(ZeroStageEnum, "weights")}, file)
    assert zero_folder._load(file) == {"stage": ZeroStageEnum.weights}
    # Nothing else is looked up by name.
    torch.save({"stage": ByName(torch.Tensor, "numpy")}, file)
    with pytest.raises(CheckpointError, match="the checkpoint cannot be read"):
        zero_folder._load(file)
