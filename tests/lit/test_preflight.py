"""What the command line refuses before loggers, processes and weights are touched."""

from pathlib import Path
from typing import Any

import pytest
import yaml

import fitting
from plprune.lit import preflight
from plprune.lit.cli import main
from plprune.lit.model import LitCausalLM
from plprune.lit.run_parts import Run

pytestmark = [
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed from"),
    pytest.mark.filterwarnings("ignore:Experiment logs directory .* exists and is not empty"),
]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fitting.saved(tmp_path_factory.mktemp("base"))


def written(base: Path, out: Path, *, steps: int = 6) -> str:
    """A run with cuts after steps 2 and 5, whose CSV logger has one folder for all runs."""
    values = fitting.run_values(base, out, steps=steps, last_cut=5)
    values["trainer"] |= {
        "log_every_n_steps": 1,
        "limit_val_batches": 0,
        "logger": {
            "class_path": "lightning.pytorch.loggers.CSVLogger",
            "init_args": {"save_dir": str(out), "name": "log", "version": ""},
        },
    }
    report = {"directory": str(out / "report"), "measure_speed": False, "prompts": []}
    values |= {"report": report, "export": {"directory": str(out / "model")}, "monitor": {}}
    out.mkdir(parents=True, exist_ok=True)
    file = out / "run.yaml"
    file.write_text(yaml.safe_dump(values), encoding="utf-8")
    return str(file)


@pytest.fixture(scope="module")
def done(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that ended; the tests below leave its folder as it is."""
    out = tmp_path_factory.mktemp("done")
    assert main(["fit", "--config", written(base, out)]) == 0
    return out


def below(folder: Path) -> dict[Path, bytes]:
    return {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}


TAYLOR = ["--prune.method", "plprune.methods.taylor.Taylor"]
FRESH = ["--report.directory", "OUT/r", "--export.directory", "OUT/m"]
REFUSED = {
    "the report exists": ([], "the target directory exists: given OUT/report"),
    "the export exists": (
        ["--report.directory", "OUT/r"],
        "the target directory exists: given OUT/model",
    ),
    "adapters exist": (
        [*FRESH, "--lora.adapter_dir", "OUT/model"],
        "the target directory exists: given OUT/model",
    ),
    "outputs share a folder": (
        ["--report.directory", "OUT/x", "--export.directory", "OUT/x"],
        "two outputs share a folder",
    ),
    "budget": ([*FRESH, "--prune.budget.keep", "0.01"], "no widths meet the budget"),
    "biases": (
        [*FRESH, "--prune.compensation", "plprune.compensate.MeanBias"],
        "gives linears a bias",
    ),
    "drift": (
        [
            *FRESH,
            "--prune.compensation",
            "plprune.compensate.LeastSquares",
            "--prune.compensation.drift",
            "0.5",
        ],
        "needs the dense model beside",
    ),
    "no tokenizer": ([*FRESH, "--data.tokenizer", "OUT/nothing"], "no such model folder"),
    "no tokenizer there": ([*FRESH, "--data.tokenizer", "OUT/log"], "no tokenizer in the folder"),
    "no model": ([*FRESH, "--model.pretrained", "OUT/nothing"], "no such model folder"),
    "no weights": ([*FRESH, "--model.pretrained", "OUT/log"], "config.json"),
    "cuts on one step": ([*FRESH, "--prune.schedule.init_args.cuts", "9"], "two cuts fall on one"),
    "Taylor": ([*FRESH, *TAYLOR, "--trainer.strategy", "fsdp2"], "given Taylor and a strategy"),
    "DoRA on divided weights": (
        [*FRESH, "--lora.config", "{use_dora: true}", "--trainer.strategy", "fsdp2"],
        "these adapters need complete weights: given use_dora: True, and a strategy",
    ),
    "masked DoRA": (
        [*FRESH, "--lora.config", "{use_dora: true}", "--prune.commit", "last"],
        "DoRA adapters cannot train on masked units",
    ),
    "past the end": (
        [*FRESH, "--ckpt_path", "OUT/ckpt/step=5.ckpt", "--trainer.max_steps", "4"],
        "the checkpoint is past the end of this run: given step 5",
    ),
    "no step for cuts": (
        [
            *FRESH,
            *("--ckpt_path", "OUT/ckpt/step=4.ckpt", "--trainer.max_steps", "4"),
            *("--prune.schedule.init_args.end", "3"),
        ],
        "the run has no step left for its cuts: given 1 of 2 cuts in the checkpoint of step 4",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_refused_run_touches_nothing(
    case: str,
    base: Path,
    done: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Neither the metrics of the run before, nor weights, nor any folder."""
    options, message = REFUSED[case]
    monkeypatch.setattr(LitCausalLM, "configure_model", lambda _: pytest.fail("loaded"))
    before = below(done)
    assert any(file.name == "metrics.csv" for file in before)
    given = [option.replace("OUT", str(done)) for option in options]
    assert main(["fit", "--config", str(done / "run.yaml"), *given]) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("plprune:")]
    assert len(said) == 1
    assert message.replace("OUT", str(done)) in said[0]
    assert below(done) == before


def test_without_the_look_the_metrics_of_the_run_before_are_gone(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lightning empties the logger's folder before any callback is asked."""
    from plprune.lit import outputs

    file = written(base, tmp_path, steps=6)
    assert main(["fit", "--config", file]) == 0
    assert (tmp_path / "log" / "metrics.csv").exists()
    monkeypatch.setattr(preflight, "require_possible", lambda *_: None)
    monkeypatch.setattr(outputs, "keep_metrics", lambda _: None)
    assert main(["fit", "--config", file]) == 2
    assert not (tmp_path / "log" / "metrics.csv").exists()


def test_a_second_run_keeps_the_metrics_of_the_first(
    base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file, log = written(base, tmp_path), tmp_path / "log"
    fresh = ["--report.overwrite", "true", "--export.overwrite", "true"]
    assert main(["fit", "--config", file]) == 0
    first = (log / "metrics.csv").read_text("utf-8")
    assert main(["fit", "--config", file, *fresh, "--model.learning_rate.peak", "0.02"]) == 0
    second = (log / "metrics.csv").read_text("utf-8")
    assert first != second
    resumed = ["--ckpt_path", str(tmp_path / "ckpt" / "step=4.ckpt")]
    assert main(["fit", "--config", file, *fresh, *resumed]) == 0
    assert (log / "metrics_1.csv").read_text("utf-8") == first
    assert (log / "metrics_2.csv").read_text("utf-8") == second
    assert len((log / "metrics.csv").read_text("utf-8").splitlines()) == 3, "two steps were left"


@pytest.mark.parametrize(
    "options",
    [
        ["--trainer.strategy", "ddp_spawn"],
        ["--trainer.strategy", "lightning.pytorch.strategies.FSDPStrategy"],
        ["--trainer.strategy", "{class_path: lightning.pytorch.strategies.DDPStrategy, "
         "init_args: {start_method: spawn}}"],
        ["--trainer.strategy", "zero4"],
        ["--trainer.max_epochs", "-3"],
        ["--prune.compensation", "plprune.compensate.MeanBias"],
        ["--prune.compensation", "{class_path: plprune.compensate.LeastSquares, init_args: {drift: 0.5}}"],
        ["--lora.config", "{use_dora: true}", "--trainer.strategy", "fsdp2"],
        ["--lora.config", "{init_lora_weights: pissa}", "--trainer.strategy", "fsdp2"],
        ["--lora.config", "{use_dora: true}", "--prune.commit", "last"],
        ["--lora.config", "{lora_bias: true}"],
        [*TAYLOR, "--trainer.strategy", "fsdp2"],
    ],
)  # fmt: skip
def test_plan_refuses_what_fit_refuses(
    options: list[str], base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = written(base, tmp_path / "out")

    def said(command: str) -> str:
        assert main([command, "--config", file, *options]) == 2
        lines = capsys.readouterr().err.splitlines()
        return "".join(line for line in lines if line.startswith("plprune:"))

    by_plan = said("plan")
    assert by_plan
    assert said("fit") == by_plan
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["run.yaml"]


@pytest.mark.parametrize(
    ("strategy", "name"),
    [
        ("auto", "single"),
        ("zero3_offload", "zero3"),
        ("deepspeed_stage_1", "zero1"),
        ("fsdp2", "fsdp"),
        (
            {"class_path": "plprune.lit.strategies.deepspeed.ZeRO", "init_args": {"stage": 3}},
            "zero3",
        ),
        ({"class_path": "plprune.lit.strategies.deepspeed.ZeRO"}, "zero2"),
        (
            {
                "class_path": "plprune.lit.strategies.deepspeed.ZeRO",
                "init_args": {"config": {"zero_optimization": {"stage": 3}}},
            },
            "zero3",
        ),
        ({"class_path": "plprune.lit.strategies.fully_shard.FullyShard"}, "fsdp"),
    ],
)
def test_what_a_strategy_divides_is_known_from_its_configuration(strategy: Any, name: str) -> None:
    run = Run(model=None, data=None, trainer={"strategy": strategy})
    assert run.strategy == name
    assert run.divided == (name in ("zero3", "fsdp"))
