"""Pruning a folder block by block: like in memory, whatever happens on the way."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import tiny
from interrupted import Killed, killed_at
from plprune.allocation import GlobalThreshold, MeasuredLoss, Uniform
from plprune.budget import Budget
from plprune.compensate import LeastSquares, MeanBias
from plprune.describe import describe
from plprune.drivers.in_memory import prune_model
from plprune.drivers.job import Job, settings
from plprune.drivers.one_shot import Done, prune
from plprune.errors import BudgetError, DataError, ExportError, ModelError, PlanError, PlpruneError
from plprune.export import save_hf
from plprune.export_depth import Closed
from plprune.load import load_hf
from plprune.methods.depth import Depth
from plprune.methods.flap import FLAP
from plprune.methods.magnitude import Magnitude
from plprune.methods.random import Random
from plprune.methods.sparsegpt import SparseGPT
from plprune.methods.transact import TransAct
from plprune.methods.wanda import Wanda
from plprune.outliers import OutlierWeighed
from plprune.streaming.work import Work
from plprune.surgery.rebuild import structure_of
from plprune.unwrap import family_of

HALF = Budget(keep=0.5, base="prunable")
NARROW = Budget(keep=0.7, base="prunable", multiple_of={"mlp": 4})
SHALLOW = Budget(keep=0.55, base="blocks")
TINY = Budget(keep=0.001, base="blocks")
JOBS: dict[str, dict[str, Any]] = {
    "wanda": {"method": Wanda(), "budget": HALF},
    "sparsegpt": {"method": SparseGPT(true_sequential=True), "budget": HALF},
    "magnitude": {"method": Magnitude(pattern="2:4"), "budget": HALF},
    "flap": {"method": FLAP(), "budget": NARROW, "compensation": MeanBias()},
    "transact": {"method": TransAct(), "budget": NARROW, "compensation": LeastSquares()},
    "drift": {"method": TransAct(), "budget": NARROW, "compensation": LeastSquares(drift=0.5)},
    "random": {"method": Random(allocation=GlobalThreshold()), "budget": NARROW},
    "blocks": {"method": Depth(), "budget": SHALLOW},
    "sublayers": {"method": Depth(units="sublayers"), "budget": SHALLOW},
    "depth by loss": {"method": Depth(criterion="loss", units="sublayers"), "budget": SHALLOW},
}
every_job = pytest.mark.parametrize("name", list(JOBS))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("dense")
    tiny.model("llama-gqa", dtype=torch.float32, num_hidden_layers=5).save_pretrained(found)
    return found


def job(folder: Path, target: Path, name: str, **changed: Any) -> Job:
    settings = {"batches": tiny.batches(3), **JOBS[name], **changed}
    return Job(folder=folder, target=target, **settings)


def tensors(done: Done) -> dict[str, Tensor]:
    return {name: done.read(name) for name in done.source.places}


def exported(done: Done, target: Path) -> Path:
    structure = structure_of(done.source.spec, done.dense)
    save_hf(done.source.model, target, spec=done.source.spec, structure=structure, read=done.read)
    done.work.remove()
    return target


@pytest.mark.parametrize("name", ["wanda", "sparsegpt", "magnitude"])
def test_from_files_is_in_memory(folder: Path, tmp_path: Path, name: str):
    found = tensors(prune(job(folder, tmp_path / "out", name)))
    model = load_hf(folder)
    prune_model(model, JOBS[name]["method"], HALF, tiny.batches(3))
    expected = model.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[n], expected[n]) for n in expected)


@every_job
@pytest.mark.parametrize("on_disk", [False, True])
def test_export_loads_with_the_widths_and_zeros_that_were_counted(
    folder: Path, tmp_path: Path, name: str, on_disk: bool
):
    done = prune(job(folder, tmp_path / "out", name, hidden_on_disk=on_disk))
    facts, spec = done.facts, done.source.spec
    model = load_hf(exported(done, tmp_path / "out"), trust_remote_code=True)
    closed = Closed.of(spec, family_of(model))
    assert describe(model).blocks == closed.spec(spec).blocks
    for fact in facts:
        for linear, zeros in fact["zeros"].items():
            assert int((model.get_submodule(closed.name(linear)).weight == 0).sum()) == zeros
    assert bool(torch.isfinite(model(tiny.tokens()).logits).all())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


@every_job
@pytest.mark.parametrize("what", ["keep", "keep_stats"])
@pytest.mark.parametrize(("on_disk", "number"), [(True, 0), (True, 2), (True, 4), (False, 2)])
def test_a_run_goes_on_where_it_was_killed(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    on_disk: bool,
    what: str,
    number: int,
):
    if what == "keep_stats" and name not in ("flap", "transact", "drift", "blocks", "sublayers"):
        pytest.skip("looks at the whole model at no time")
    expected = tensors(prune(job(folder, tmp_path / "whole", name)))
    half = job(folder, tmp_path / "half", name, hidden_on_disk=on_disk)
    with monkeypatch.context() as patch:
        killed_at(patch, what, number)
        with pytest.raises(Killed):
            prune(half)
    worked: list[int] = []

    def counted(title: str) -> Any:
        return lambda done, total: worked.append(done)

    found = tensors(prune(replace(half, shown=counted)))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[n], expected[n]) for n in expected)
    if what == "keep" and on_disk and name in ("wanda", "sparsegpt"):
        assert worked == list(range(number + 1, 6)), "finished blocks are not run again"


def test_mean_biases_are_those_of_the_dense_model(folder: Path, tmp_path: Path):
    """As published: b' = b + W_D mean(x_D), x of the model without any cut."""
    given = job(folder, tmp_path / "out", "flap", method=Random(), dtype=torch.float64)
    done = prune(given)
    found, model = tensors(done), load_hf(folder).double().eval()
    inputs: dict[str, list[Tensor]] = {}
    checked: list[str] = []
    for name in done.dense.consumers():
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: inputs.setdefault(name, []).append(args[0].flatten(0, -2))
        )
    with torch.no_grad():
        for batch in given.batches:
            model(**batch)
    for name in done.dense.consumers():
        kept = torch.ones(done.dense.linears[name].cols, dtype=torch.bool)
        for axis in done.source.spec.axes.values():
            dense = done.dense.axes[axis.name]
            gone = torch.ones(dense.size, dtype=torch.bool)
            gone[axis.origin] = False
            for piece in dense.slices:
                if (piece.module, piece.side) == (name, "in"):
                    kept[piece.index[gone].flatten()] = False
        if bool(kept.all()):
            continue
        mean = torch.cat(inputs[name]).mean(0)
        bias = model.get_submodule(name).weight[:, ~kept] @ mean[~kept]
        torch.testing.assert_close(found[f"{name}.bias"].double(), bias, rtol=1e-5, atol=1e-7)
        checked.append(name)
    assert f"model.layers.{len(done.facts) - 1}.mlp.down_proj" in checked, "behind earlier cuts"


def test_a_rerun_after_the_last_block_only_exports(folder: Path, tmp_path: Path):
    given = job(folder, tmp_path / "out", "wanda")
    expected = tensors(prune(given))
    again = prune(replace(given, shown=lambda title: pytest.fail(title)))
    assert all(torch.equal(value, expected[n]) for n, value in tensors(again).items())


# --- what can go wrong ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "what"),
    [
        ({"budget": Budget(keep=0.6, base="prunable")}, "budget"),
        ({"method": Wanda(variable_rows=True)}, "hyper"),
        ({"batches": tiny.batches(2)}, "calibration"),
        ({"dtype": torch.bfloat16}, "dtype"),
    ],
)
def test_another_run_is_not_continued(folder: Path, tmp_path: Path, changed: dict, what: str):
    prune(job(folder, tmp_path / "out", "wanda"))
    with pytest.raises(ExportError, match=f"other settings is in the way: given {what}"):
        prune(job(folder, tmp_path / "out", "wanda", **changed))


def test_a_changed_model_is_not_continued(folder: Path, tmp_path: Path):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    prune(job(copy, tmp_path / "out", "wanda"))
    tiny.model("llama-gqa", dtype=torch.float32, num_hidden_layers=5, seed=3).save_pretrained(copy)
    with pytest.raises(ExportError, match="other settings is in the way: given files"):
        prune(job(copy, tmp_path / "out", "wanda"))


def test_no_calibration_is_refused(folder: Path, tmp_path: Path):
    with pytest.raises(DataError, match="empty calibration set"):
        prune(job(folder, tmp_path / "out", "wanda", batches=[]))
    assert not any(tmp_path.iterdir())
    prune(job(folder, tmp_path / "out", "magnitude", batches=[]))


def test_a_full_disk_keeps_what_was_finished(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    import safetensors.torch

    own = safetensors.torch.save_file

    def full(made: Any, path: str, metadata: Any) -> None:
        if "block-00002" in path:
            Path(path).write_bytes(b"half")
            raise OSError(28, "No space left on device")
        own(made, path, metadata)

    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    given = job(folder, tmp_path / "out", "wanda")
    with monkeypatch.context() as patch:
        patch.setattr(safetensors.torch, "save_file", full)
        with pytest.raises(ExportError, match=r"cannot be written.*No space left.*blocks are kept"):
            prune(given)
    assert Work(given.target, settings(given, *identity(given))).finished() == 2
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    prune(given)


def identity(given: Job) -> tuple[Any, str]:
    from plprune.drivers.batches import calibration_hash

    return describe(load_hf(given.folder)), calibration_hash(given.batches)


def test_a_truncated_shard_is_refused(folder: Path, tmp_path: Path):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(ModelError, match=r"model\.safetensors"):
        prune(job(copy, tmp_path / "out", "wanda"))
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]


@every_job
def test_nan_is_refused(folder: Path, tmp_path: Path, name: str):
    broken = load_hf(folder)
    with torch.no_grad():
        broken.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    broken.save_pretrained(tmp_path / "broken")
    if name == "random":  # looks at nothing: the export does
        with pytest.raises(PlpruneError, match="not finite"):
            exported(prune(job(tmp_path / "broken", tmp_path / "out", name)), tmp_path / "out")
    else:
        with pytest.raises(PlanError, match="not finite"):
            prune(job(tmp_path / "broken", tmp_path / "out", name))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("method", "budget"),
    [
        *((TransAct(allocation=a), TINY) for a in (Uniform(), GlobalThreshold(), MeasuredLoss())),
        (TransAct(allocation=OutlierWeighed()), TINY),
        (TransAct(allocation=GlobalThreshold()), Budget(widths={"mlp": 8})),
        (Depth(), TINY),
        (Depth(units="sublayers", criterion="loss"), TINY),
        (Depth(), Budget(widths={"mlp": 8})),
        (Wanda(), Budget(keep=0.001, base="model")),
    ],
)
def test_an_impossible_budget_is_refused_before_any_pass(
    folder: Path, tmp_path: Path, method: Any, budget: Budget
):
    shown: list[str] = []
    target = tmp_path / "out"
    wrong = job(folder, target, "flap", method=method, budget=budget, shown=shown.append)
    with pytest.raises(BudgetError):
        prune(wrong)
    assert shown == []
    assert list(tmp_path.iterdir()) == []


def test_settings_are_readable(folder: Path, tmp_path: Path):
    done = prune(job(folder, tmp_path / "out", "flap"))
    settings = json.loads((done.work.folder / "settings.json").read_text("utf-8"))
    assert settings["method"] == "FLAP"
    assert settings["hyper"]["allocation"] == {"class": "GlobalThreshold", "least": 0.0}
