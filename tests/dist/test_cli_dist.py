"""The `plprune` command itself on several processes: fit with report and export, then validate."""

import contextlib
import copy
import io
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from strategy_runs import everything

import fitting
from plprune.lit.cli import PlpruneCLI, main
from ranks import run_ranks

pytestmark = pytest.mark.filterwarnings("ignore:When saving the DeepSpeed Stage 3")
STRATEGIES = ["ddp", "fsdp2", "zero1", "zero2", "zero3", "zero3_offload"]
CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "strategies"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fitting.saved(tmp_path_factory.mktemp("base"))


def written(base: Path, out: Path, world: int) -> Path:
    out.mkdir()
    values = fitting.run_values(base, out, steps=4, last_cut=3)
    values["trainer"] |= {"val_check_interval": 2, "check_val_every_n_epoch": None}
    values["data"]["batch_size"] = 2 // world
    values["report"] = {"directory": str(out / "report"), "measure_speed": False}
    values["export"] = {"directory": str(out / "model")}
    file = out / "run.yaml"
    file.write_text(yaml.safe_dump(values), encoding="utf-8")
    return file


def run(command: list[str]) -> int:
    return main(command)


def command(file: Path, strategy: str) -> list[str]:
    stacked = ["--config", str(file), "--config", str(CONFIGS / f"{strategy}.yaml")]
    return [*stacked, "--trainer.accelerator", "cpu"]


def validated(args: list[str]) -> float:
    """Perplexity that `plprune validate` logs."""
    cli: Any = PlpruneCLI(["validate", *args])
    return float(cli.trainer.callback_metrics["val_perplexity"])


@pytest.fixture(scope="module")
def alone(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("alone") / "run"
    assert run_ranks(run, 1, ["fit", *command(written(base, out, 1), "single")]) == [0]
    return out


@pytest.mark.world_size(2)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_fit_report_export_and_validate(strategy: str, base: Path, alone: Path, tmp_path: Path):
    file = written(base, tmp_path / "run", 2)
    args = command(file, strategy)
    assert run_ranks(run, 2, ["fit", *args]) == [0, 0]
    one, two = everything(alone / "model"), everything(tmp_path / "run" / "model")
    assert one.keys() == two.keys()
    for name, value in two.items():
        torch.testing.assert_close(value, one[name], rtol=2e-4, atol=2e-5)
    assert (tmp_path / "run" / "report").is_dir()
    assert (tmp_path / "run" / "plprune_config.yaml").is_file()
    # Checkpoints of this strategy, and of one process, are measured by all of them.
    expected = run_ranks(
        validated, 1, [*command(alone / "run.yaml", "single"), *at(alone / "ckpt")]
    )[0]
    for folder in (tmp_path / "run", alone):
        its = command(folder / "run.yaml", strategy)
        found = run_ranks(validated, 2, [*its, *at(folder / "ckpt")])
        assert found == pytest.approx([expected] * 2, rel=1e-3)


@pytest.mark.world_size(2)
@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", "zero3"])
def test_a_run_killed_while_it_exported_writes_the_rest(
    strategy: str, base: Path, tmp_path: Path
) -> None:
    """Its report is no obstacle, and stays; the checkpoint says that all steps are done."""
    out = tmp_path / "run"
    args = ["fit", *command(written(base, out, 2), strategy)]
    assert run_ranks(run, 2, args) == [0, 0]
    whole, report = everything(out / "model"), out / "report" / "report.json"
    before = report.read_bytes()
    shutil.rmtree(out / "model")
    assert run_ranks(run, 2, args) == [2, 2], "without its checkpoint it is another run"
    middle = [*args, "--ckpt_path", str(out / "ckpt" / "step=3.ckpt")]
    assert run_ranks(run, 2, middle) == [2, 2], "that would train on"
    assert run_ranks(run, 2, [*args, *at(out / "ckpt")]) == [0, 0]
    assert report.read_bytes() == before
    again = everything(out / "model")
    assert whole.keys() == again.keys()
    assert all(torch.equal(value, again[name]) for name, value in whole.items())


def at(folder: Path) -> list[str]:
    return ["--ckpt_path", str(folder / "step=4.ckpt")]


@pytest.mark.world_size(2)
def test_fsdp2_counts_its_processes(base: Path, tmp_path: Path):
    file = written(base, tmp_path / "run", 1)
    values = yaml.safe_load(file.read_text("utf-8"))
    changed = copy.deepcopy(values)
    changed.pop("report")
    file.write_text(yaml.safe_dump(changed), encoding="utf-8")
    assert run_ranks(run, 1, ["fit", *command(file, "fsdp2"), "--trainer.devices", "1"]) == [0]
    assert everything(tmp_path / "run" / "model")


def refused(file: Path, mistake: list[str]) -> tuple[int, str]:
    """Exit status of the command, and what this process says."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        status = main(["fit", *command(file, "ddp"), *mistake])
    return status, "".join(line for line in said.getvalue().splitlines() if "plprune: " in line)


@pytest.mark.world_size(2)
@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        (["--prune.budget.keep", "7"], "keep"),  # before the processes meet
        (["--prune.attribute", "nowhere"], "nowhere"),  # all of them find it
        (["--export.directory", "{base}"], "exists"),  # the first finds it, the others hear of it
    ],
    ids=["early", "all", "first"],
)
def test_one_of_several_processes_says_what_is_wrong(
    mistake: list[str], message: str, base: Path, tmp_path: Path
):
    file = written(base, tmp_path / "run", 2)
    given = [word.format(base=base) for word in mistake]
    outcomes = run_ranks(refused, 2, file, given)
    assert [status for status, _ in outcomes] == [2, 2]
    said = [text for _, text in outcomes if text]
    assert len(said) == 1
    assert message in said[0]
