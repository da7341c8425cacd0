"""plan, evaluate, export and report, and what the parser says about mistakes."""

import contextlib
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import fitting
import tiny
from plprune.callbacks import Prune
from plprune.drivers.progressive import Progressive
from plprune.errors import ConfigError
from plprune.lit.cli import PlpruneCLI, main
from plprune.lit.data import LitTokens
from plprune.lit.export_command import read_settings
from plprune.lit.messages import readable

pytestmark = [
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
]
IDS = torch.arange(3, 20)[None]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense model with a tokenizer, and a text."""
    return fitting.saved(tmp_path_factory.mktemp("base"))


def config(base: Path, out: Path, **changes: Any) -> dict[str, Any]:
    """Six steps, cuts after 2 and 4, a checkpoint of every step; `a__b` changes key a.b."""
    values = fitting.run_values(base, out, steps=6, last_cut=4)
    values["trainer"]["limit_val_batches"] = 0
    for key, value in changes.items():
        *path, last = key.split("__")
        place = values
        for name in path:
            place = place.setdefault(name, {})
        place[last] = value
    return values


def written(path: Path, values: dict[str, Any]) -> str:
    path.mkdir(parents=True, exist_ok=True)
    file = path / "run.yaml"
    file.write_text(yaml.safe_dump(values), encoding="utf-8")
    return str(file)


@pytest.fixture(scope="module")
def fitted(base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[PlpruneCLI, Path]:
    """A run with adapters; its last checkpoint is from before they are merged."""
    out = tmp_path_factory.mktemp("fitted")
    values = config(base, out, lora__config={"r": 2}, lora__start="fit")
    values["report"] = {"directory": str(out / "report"), "measure_speed": False, "prompts": []}
    return PlpruneCLI(["fit", "--config", written(out, values)]), out


def planned(capsys: pytest.CaptureFixture[str], *args: str) -> dict[str, Any]:
    assert main(["plan", *args, "--json", "-"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def refused(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    capsys.readouterr()
    assert main(list(args)) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("plprune:")]
    assert len(lines) == 1
    return lines[0]


# -- plan ----------------------------------------------------------------------------------------


def test_plan_says_what_is_on_the_host_and_what_is_not_counted(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = written(tmp_path, config(base, tmp_path, trainer__devices=2))
    zero = ["--config", file, "--trainer.strategy"]
    plain, offloaded = (planned(capsys, *zero, name) for name in ("zero3", "zero3_offload"))
    for row, moved in zip(plain["memory"], offloaded["memory"], strict=True):
        assert moved == {**row, "host": row["weights"] + row["gradients"] + row["optimizer"]}
    assert any("not counted: the context of a GPU" in note for note in plain["notes"])
    only_state = of_class("plprune.lit.strategies.deepspeed.ZeRO", stage=3, offload_optimizer=True)
    for row in planned(capsys, "--config", file, *only_state)["memory"]:
        assert row["host"] == row["gradients"] + row["optimizer"]
    assert main(["plan", *zero, "zero3_offload"]) == 0
    assert "of that on the host" in capsys.readouterr().out


def test_plan_says_what_fit_did(
    fitted: tuple[PlpruneCLI, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    cli, out = fitted
    found = planned(capsys, "--config", str(out / "run.yaml"))
    pruner = next(c for c in cli.trainer.callbacks if isinstance(c, Prune))
    history = pruner.progressive.history
    assert [row["step"] for row in found["cuts"]] == [record["step"] for record in history]
    for row, record in zip(found["cuts"], history, strict=True):
        assert row["params"] == {k: int(v) for k, v in record["params_after"].items()}
        for kind in ("kv_group", "mlp"):
            assert row["widths"][kind] == record["widths_after"][kind]
    assert found["run"]["steps"] == cli.trainer.global_step == 6
    assert [row["steps"] for row in (found["dense"], *found["cuts"])] == [2, 2, 2]
    assert found["cuts"][-1]["tokens"] == 2 * 2 * 16
    assert found["cuts"][-1]["kept"] <= 0.7 < found["dense"]["kept"] == 1
    assert [p["name"] for p in found["memory"]][:3] == ["load", "observe", "cut"]


def test_plan_knows_how_many_blocks_go_but_not_which(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = config(base, tmp_path)
    values["prune"]["method"] = {"class_path": "plprune.methods.depth.Depth"}
    values["prune"]["budget"] = {"widths": {"blocks": 1}}
    found = planned(capsys, "--config", written(tmp_path, values))
    last, dense = found["cuts"][-1], found["dense"]
    assert last["widths"] is None
    assert (
        last["kv_cache_bytes_per_token"] * found["run"]["layers"]
        == dense["kv_cache_bytes_per_token"]
    )
    assert last["params"]["prunable"] * found["run"]["layers"] == dense["params"]["prunable"]
    memory = {phase["name"]: phase["weights"] for phase in found["memory"]}
    assert memory["train_pruned"] < memory["load"]
    values["prune"]["budget"] = {"keep": 0.7, "widths": {"kv_group": 1}}
    file = written(tmp_path, values)
    assert "cannot be met by removing blocks" in refused(capsys, "plan", "--config", file)


def test_plan_reads_no_text_if_the_steps_are_given(
    base: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    file = written(tmp_path, config(base, tmp_path))
    empty = tmp_path / "cwd"
    empty.mkdir()
    monkeypatch.chdir(empty)
    before = sorted(tmp_path.rglob("*"))
    read: list[bool] = []
    original = LitTokens.training
    monkeypatch.setattr(LitTokens, "training", lambda self: (read.append(True), original(self))[1])
    planned(capsys, "--config", file)
    assert not read
    by_epoch = planned(capsys, "--config", file, "--trainer.max_steps=-1", "--trainer.max_epochs=2")
    assert read
    blocks = len(PlpruneCLI(["--config", file], run=False).datamodule.training().blocks)
    assert by_epoch["run"]["steps"] == 2 * (blocks // 2)
    assert sorted(tmp_path.rglob("*")) == before


def test_plan_needs_the_config_of_the_model_only(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "config_only"
    folder.mkdir()
    shutil.copy(base / "config.json", folder)
    file = written(tmp_path, config(base, tmp_path))
    with_weights = planned(capsys, "--config", file)
    alone = planned(capsys, "--config", file, "--model.pretrained", str(folder))
    assert alone["cuts"] == with_weights["cuts"]
    assert alone["memory"] == with_weights["memory"]


def test_plan_of_a_dense_run(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = config(base, tmp_path)
    del values["prune"]
    found = planned(capsys, "--config", written(tmp_path, values))
    assert found["cuts"] == []
    assert [p["name"] for p in found["memory"]] == ["load", "train", "export"]


def test_plan_as_text(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "plan.json"
    file = written(tmp_path, config(base, tmp_path))
    assert main(["plan", "--config", file, "--json", str(target)]) == 0
    text = capsys.readouterr().out
    for title in ("Run", "Schedule", "Size", "Final widths", "Peak memory on one device"):
        assert f"{title}\n" in text
    assert json.loads(target.read_text("utf-8"))["run"]["steps"] == 6
    rows = text.split("Schedule\n")[1].split("\n\n")[0].splitlines()
    assert rows[0].split("  ")[0] == "cut"
    assert [row.split()[:2] for row in rows[1:]] == [["dense", "0"], ["1", "2"], ["2", "4"]]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"prune__budget__keep": 1.7}, "budget.keep out of range: given 1.7"),
        ({"prune__budget__keep": 0.01}, "no widths meet the budget"),
        ({"prune__budget__widths": {"kv_group": 9}}, "kv_group width 9 requested for block 0"),
        ({"prune__budget__widths": {"head": 1}}, "unknown axis kind budget.widths.head"),
        ({"prune__budget": None}, "a pruning method without a budget"),
        (
            {"prune__method__init_args": {"attention": "none"}},
            "budget.widths.kv_group is given, but the method does not cut kv_group",
        ),
        ({"trainer__max_steps": 3}, "a cut at step 4.0 lies outside the run"),
        ({"prune__schedule__init_args": {"cuts": 9}}, "two cuts fall on one optimizer step"),
    ],
)
def test_plan_and_fit_refuse_alike(
    base: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    change: dict[str, Any],
    text: str,
) -> None:
    file = written(tmp_path, config(base, tmp_path, **change))
    by_plan = refused(capsys, "plan", "--config", file)
    assert text in by_plan
    assert refused(capsys, "fit", "--config", file) == by_plan


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"model__pretrained": "org/nobody"}, "the shape of the model is not known here: given"),
        ({"model__pretrained": "."}, "no config.json in the folder: given ."),
        (
            {"trainer__max_steps": -1, "data__train": "some/hub-data"},
            "the length of the run is not known without reading from a hub: given some/hub-data",
        ),
        ({"trainer__max_steps": 0}, "the run has no known end"),
        ({"trainer__precision": "transformer-engine"}, "no memory estimate for this precision"),
    ],
)
def test_plan_refuses_what_it_cannot_know(
    base: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
    text: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    file = written(tmp_path, config(base, tmp_path, **changes))
    assert text in refused(capsys, "plan", "--config", file)


# -- parser --------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["fit", "plan"])
@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"trainer__max_stepz": 3}, ["unknown key: given trainer.max_stepz", "max_steps?"]),
        ({"data__seq_lenn": 3}, ["unknown key: given data.seq_lenn", "did you mean data.seq_len?"]),
        ({"prun": {"commit": "last"}}, ["unknown key: given prun", "did you mean prune"]),
        (
            {"prune__method__class_path": "plprune.methods.transact.TransAkt"},
            ["prune.method", "has no attribute 'TransAkt'", "check the spelling of class_path"],
        ),
        (
            {"prune__method__class_path": "plprune.methodz.x.Y"},
            ["prune.method", "No module named 'plprune.methodz'"],
        ),
        (
            {"prune__schedule__init_args": {"cutz": 3}},
            ["unknown key: given prune.schedule.init_args.cutz", "init_args.cuts?"],
        ),
        ({"data__seq_len": "long"}, ["data.seq_len"]),
    ],
)
def test_a_mistake_in_the_yaml_gets_one_line(
    base: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    command: str,
    change: dict[str, Any],
    parts: list[str],
) -> None:
    found = refused(
        capsys, command, "--config", written(tmp_path, config(base, tmp_path, **change))
    )
    assert [part for part in parts if part not in found] == []
    assert "plprune fit --help lists every key" in found


def test_mistakes_on_the_command_line(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = written(tmp_path, config(base, tmp_path))
    text = refused(capsys, "fit", "--config", file, "--trainer.max_stepz", "3")
    assert "unknown key: given trainer.max_stepz; fix: did you mean trainer.max_steps?" in text
    assert "unknown command: given fitt; allowed fit, " in refused(capsys, "fitt")


@pytest.mark.parametrize("command", ["fit", "plan", "export"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot read the configuration file: given {name} (No such file or directory)"),
        ("", "not a configuration: given {name}, an empty file; allowed a YAML mapping"),
        ("- model\n", "not a configuration: given {name}, a list; allowed a YAML mapping"),
        ("model: [\n", "not YAML: given {name}, line 2, column 1: expected the node content"),
    ],
    ids=["missing", "empty", "list", "broken"],
)
def test_mistakes_in_a_configuration_file_name_the_file(
    command: str,
    content: str | None,
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    name = str(tmp_path / "run.yaml")
    if content is not None:
        Path(name).write_text(content, encoding="utf-8")
    if command == "export":
        with pytest.raises(ConfigError, match=re.escape(message.format(name=name))):
            read_settings([name], {})
    else:
        assert message.format(name=name) in refused(capsys, command, "--config", name)


def test_a_pipe_is_no_configuration(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    assert f"given {pipe}, which can be read only once" in refused(
        capsys, "fit", "--config", str(pipe)
    )


def test_a_misspelled_section_is_not_ignored_by_export(tmp_path: Path) -> None:
    name = written(tmp_path, {"modle": {"pretrained": "base"}, "mine": {"key": 1}})
    with pytest.raises(ConfigError, match=r"unknown key: given modle in .* did you mean model"):
        read_settings([name], {})
    assert read_settings([written(tmp_path, {"mine": {"key": 1}})], {}) == {"mine": {"key": 1}}


def test_an_unknown_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert "unknown command: given fitt; allowed fit, " in refused(capsys, "fitt")


def of_class(path: str, **settings: Any) -> list[str]:
    return ["--trainer.strategy", json.dumps({"class_path": path, "init_args": settings})]


def zero(config: dict[str, Any]) -> list[str]:
    return of_class("plprune.lit.strategies.deepspeed.ZeRO", config=config)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--optimizer", "AdamW"], "unknown key: given optimizer"),
        (["--lr_scheduler", "CosineAnnealingLR"], "unknown key: given lr_scheduler"),
        (["--trainer.accumulate_grad_batches", "0"], "accumulate_grad_batches out of range"),
        (["--trainer.strategy", "fsdp"], "FSDP1 cannot be cut during fit: given trainer.strategy"),
        (
            ["--trainer.strategy", "zero4"],
            "unknown trainer.strategy: given zero4; allowed auto, ddp",
        ),
        (["--trainer.strategy", "zero_3"], "did you mean zero3?"),
        (of_class("lightning.pytorch.strategies.FSDPStrategy"), "FSDP1 cannot be cut during fit"),
        (
            of_class("lightning.pytorch.strategies.DeepSpeedStrategy"),
            "Lightning's DeepSpeed strategy",
        ),
        (
            of_class("lightning.pytorch.strategies.ModelParallelStrategy", tensor_parallel_size=2),
            "tensor parallelism cannot be cut during fit: given tensor_parallel_size 2",
        ),
        (zero({"zero_optimizaton": {"stage": 3}}), "names no ZeRO stage that can be cut"),
        (zero({"zero_optimization": {"stage": 0}}), "given zero_optimization.stage: 0"),
        (
            zero({"zero_optimization": {"stage": 2}, "optimizer": {"type": "AdamW"}}),
            "optimizer does not belong in the DeepSpeed config",
        ),
        (["--lora.config", "{lora_bias: true}"], "biases cannot be merged into linears without"),
        (["--export.dtype", "int8"], "export"),
        (["--prune.budget.context", "-1"], "budget.context out of range"),
    ],
)
def test_settings_that_cannot_work_leave_nothing_behind(
    options: list[str],
    text: str,
    base: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "out").mkdir()
    file = written(tmp_path, config(base, tmp_path / "out"))
    assert text in refused(capsys, "fit", "--config", file, *options)
    assert list((tmp_path / "out").iterdir()) == []


def test_more_processes_than_the_trainer_knows_are_refused(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each would train the whole run into the same folders."""
    (tmp_path / "out").mkdir()
    file = written(tmp_path, config(base, tmp_path / "out"))
    started = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "GROUP_RANK": "0"}
    started |= {"LOCAL_WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "none"}
    for name, value in started.items():
        monkeypatch.setenv(name, value)
    for options in ([], ["--trainer.strategy", "ddp", "--trainer.devices", "4"]):
        said = refused(capsys, "fit", "--config", file, *options)
        assert "the number of processes is not that of the trainer: given 2 processes" in said
    assert list((tmp_path / "out").iterdir()) == []


def test_errors_of_others_pass_through_unchanged() -> None:
    own = ConfigError("ours")
    wrapped = ValueError("theirs")
    wrapped.__cause__ = own
    assert readable(wrapped, "fit") is own


@pytest.mark.parametrize("command", ["plan", "evaluate", "export", "report"])
def test_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with contextlib.suppress(SystemExit):
        main([command, "--help"])
    assert f"usage: plprune {command}" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["evaluate", "export", "report"])
def test_unknown_options(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert f"see plprune {command} --help" in refused(capsys, command, "--nope")


# -- evaluate ------------------------------------------------------------------------------------


def evaluated(tmp_path: Path, *args: str) -> dict[str, Any]:
    target = tmp_path / "scores.json"
    assert main(["evaluate", *args, "--json", str(target)]) == 0
    found: dict[str, Any] = json.loads(target.read_text("utf-8"))
    return found


def test_evaluate_equals_the_plain_formula(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    text = base / "text.txt"
    found = evaluated(tmp_path, str(base), "--text", str(text), "--windows", "3", "--seq_len", "20")
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    rows = text.read_text("utf-8") + "\n"
    ids = torch.tensor(AutoTokenizer.from_pretrained(base)(rows)["input_ids"])
    losses = []
    with torch.no_grad():
        for window in ids[:60].reshape(3, 1, 20):
            logits = model(window).logits[0, :-1].float()
            losses.append(torch.nn.functional.cross_entropy(logits, window[0, 1:]))
    expected = float(torch.stack(losses).mean().exp())
    assert found["model"]["perplexity"] == pytest.approx(expected, rel=1e-6)
    protocol = found["model"]["protocol"]
    assert (protocol["windows"], protocol["seq_len"]) == (3, 20)
    assert found["model"]["sizes"]["params"]["model"] == sum(p.numel() for p in model.parameters())
    shown = capsys.readouterr().out
    assert f"{expected:.4f}" in shown
    assert protocol["token_sha256"] in shown
    assert "LlamaForCausalLM" in shown


def test_evaluate_against_a_dense_model(base: Path, tmp_path: Path) -> None:
    args = ("--text", str(base / "text.txt"), "--windows", "all", "--seq_len", "32")
    found = evaluated(tmp_path, str(base), *args, "--dense", str(base), "--dtype", "bfloat16")
    assert found["comparison"]["perplexity_ratio"] == 1
    assert set(found["comparison"]["params_kept"].values()) == {1.0}
    assert found["dense"]["protocol"]["dtype"] == "bfloat16"
    assert found["dense"]["protocol"]["windows"] > 40


@pytest.mark.parametrize(
    ("args", "text"),
    [
        (["{base}", "--text", "{base}/none.txt"], "text file or folder not found"),
        (["{base}/none", "--text", "{base}/text.txt"], "no such model folder"),
        (["{base}", "--text", "{base}/text.txt", "--windows", "0"], "--windows out of range"),
        (["{base}", "--text", "{base}/text.txt", "--seq_len", "1"], "evaluation windows out of"),
        (["{base}"], "the following arguments are required: --text"),
        (["{base}", "--text", "pydoc", "--dtype", "int8"], "invalid choice: 'int8'"),
        (
            ["{base}", "--text", "pydoc", "--windows", "1", "--json", "{base}/none/x.json"],
            "cannot write the JSON file",
        ),
        (
            ["{base}", "--text", "pydoc", "--device", "banana"],
            "--device cannot be used: given banana",
        ),
    ],
)
def test_evaluate_refuses(
    base: Path, capsys: pytest.CaptureFixture[str], args: list[str], text: str
) -> None:
    assert text in refused(capsys, "evaluate", *(arg.format(base=base) for arg in args))


def test_evaluate_does_not_ask_the_hub_for_a_misspelled_folder(
    base: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    for auto in (AutoModelForCausalLM, AutoTokenizer):
        monkeypatch.setattr(auto, "from_pretrained", lambda *a, **k: pytest.fail("asked the hub"))
    monkeypatch.chdir(base.parent)
    text = refused(capsys, "evaluate", f"{base.name}/nomodel", "--text", str(base / "text.txt"))
    assert f"no such model folder: given {base.name}/nomodel; allowed an existing folder" in text
    text = refused(capsys, "evaluate", str(base), "--text", "x", "--wind", "3")
    assert "unrecognized arguments: --wind 3" in text


# -- export --------------------------------------------------------------------------------------


def loaded(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        out: torch.Tensor = model(IDS).logits
    return out


def test_export_of_the_last_checkpoint_is_the_trained_model(
    fitted: tuple[PlpruneCLI, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cli, out = fitted
    file = out / "ckpt" / "step=6.ckpt"
    assert any("lora_A" in name for name in torch.load(file, weights_only=True)["state_dict"])
    assert main(["export", "--ckpt_path", str(file), "--out", str(tmp_path / "model")]) == 0
    assert "exported to" in capsys.readouterr().out
    made = loaded(tmp_path / "model")
    assert not any("lora" in name for name, _ in made.named_parameters())
    torch.testing.assert_close(logits(made), logits(cli.model.model.eval()))
    assert (tmp_path / "model" / "tokenizer.json").is_file()
    structure = json.loads((tmp_path / "model" / "plprune_structure.json").read_text("utf-8"))
    assert structure["training"] == "6 optimizer steps"
    assert structure["method"] == "TransAct"


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_export_of_adapters_that_began_with_the_weights(
    start: str, base: Path, tmp_path: Path
) -> None:
    values = config(base, tmp_path, lora__config={"r": 2, "init_lora_weights": start})
    cli = PlpruneCLI(["fit", "--config", written(tmp_path, values)])
    file = tmp_path / "ckpt" / "step=6.ckpt"
    assert main(["export", "--ckpt_path", str(file), "--out", str(tmp_path / "model")]) == 0
    made = loaded(tmp_path / "model")
    torch.testing.assert_close(logits(made), logits(cli.model.model.eval()), rtol=1e-4, atol=1e-4)


def test_export_of_a_dense_checkpoint(
    fitted: tuple[PlpruneCLI, Path], base: Path, tmp_path: Path
) -> None:
    _, out = fitted
    args = ["export", "--ckpt_path", str(out / "ckpt" / "step=1.ckpt"), "--mode", "per_layer"]
    assert main([*args, "--out", str(tmp_path / "model"), "--dtype", "bfloat16"]) == 0
    made = loaded(tmp_path / "model")
    assert next(made.parameters()).dtype == torch.bfloat16
    assert type(made).__name__ == "PlpruneLlamaForCausalLM"
    assert made.num_parameters() == loaded(base).num_parameters()


def test_masked_units_are_cut(base: Path, tmp_path: Path) -> None:
    values = config(base, tmp_path, prune__commit="last")
    values["prune"]["schedule"]["init_args"]["end"] = 5
    PlpruneCLI(["fit", "--config", written(tmp_path, values)])
    file = tmp_path / "ckpt" / "step=3.ckpt"
    content = torch.load(file, weights_only=True)
    dense = loaded(base)
    progressive = Progressive(dense)
    progressive.restore(content["plprune"]["prune"])
    assert progressive.pending
    weights = {n.removeprefix("model."): t for n, t in content["state_dict"].items()}
    dense.load_state_dict(weights)
    assert main(["export", "--ckpt_path", str(file), "--out", str(tmp_path / "model")]) == 0
    made = loaded(tmp_path / "model")
    assert made.num_parameters() < dense.num_parameters()
    torch.testing.assert_close(logits(made), logits(dense))


def test_export_finds_or_takes_the_base(
    fitted: tuple[PlpruneCLI, Path], base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, out = fitted
    lonely = tmp_path / "lonely" / "a" / "b" / "c"
    lonely.mkdir(parents=True)
    file = shutil.copy(out / "ckpt" / "step=6.ckpt", lonely)
    args = ["export", "--ckpt_path", str(file), "--out", str(tmp_path / "model")]
    assert main(args) == 0, "the checkpoint knows its base, its adapters and its configuration"
    assert "the target directory exists" in refused(capsys, *args, "--config", "x.yaml")
    assert main([*args, "--config", str(out / "run.yaml"), "--overwrite"]) == 0
    # A script has no configuration; the rest is there all the same.
    content = torch.load(file, weights_only=True)
    del content["plprune"]["config"]
    torch.save(content, file)
    assert main([*args, "--overwrite"]) == 0
    content["plprune"]["prune"]["base"] = ""
    torch.save(content, file)
    assert "the base model is not known" in refused(capsys, *args, "--overwrite")
    with_base = [*args, "--base", str(base), "--overwrite"]
    assert main(with_base) == 0
    # As by versions that did not say how the adapters are scaled.
    del content["plprune"]["lora"]["config"]
    torch.save(content, file)
    assert "LoRA adapters whose scale is not known" in refused(capsys, *with_base)


def test_export_refuses_another_scale(
    fitted: tuple[PlpruneCLI, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, out = fitted
    values = yaml.safe_load((out / "run.yaml").read_text("utf-8"))
    values["lora"]["config"]["lora_alpha"] = 400
    (tmp_path / "other.yaml").write_text(yaml.safe_dump(values))
    args = ["--ckpt_path", str(out / "ckpt" / "step=6.ckpt"), "--out", str(tmp_path / "model")]
    message = refused(capsys, "export", *args, "--config", str(tmp_path / "other.yaml"))
    assert message.startswith(
        "plprune: the adapters in the checkpoint are of another kind: given lora.config.lora_alpha"
        ": 400; allowed "
    )
    assert not (tmp_path / "model").exists()


def test_export_refuses(
    fitted: tuple[PlpruneCLI, Path],
    base: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    _, out = fitted
    good, target = out / "ckpt" / "step=6.ckpt", tmp_path / "model"

    def said(file: Path, *more: str) -> str:
        found = refused(capsys, "export", "--ckpt_path", str(file), "--out", str(target), *more)
        assert not target.exists()
        return found

    assert "there is no such checkpoint" in said(tmp_path / "none.ckpt")
    short = tmp_path / "short.ckpt"
    short.write_bytes(good.read_bytes()[:-2000])
    assert "the checkpoint is damaged" in said(short)
    assert "the checkpoint is not complete" in said(out), "a folder of something else"
    other = tmp_path / "other"
    tiny.model("llama-mha", dtype=torch.float32, vocab_size=256).save_pretrained(other)
    assert "the structure belongs to another base model" in said(good, "--base", str(other))
    content = torch.load(good, weights_only=True)
    del content["plprune"]
    bare = out / "ckpt" / "bare.ckpt"
    torch.save(content, bare)
    text = said(bare)
    assert "the base model is not known" in text
    text = said(bare, "--config", str(out / "run.yaml"))
    assert "the weights do not fit the base model" in text
    assert "no pruning structure in the checkpoint" in text
    content["state_dict"] = {"weight": torch.zeros(1)}
    torch.save(content, bare)
    text = said(bare, "--config", str(out / "run.yaml"))
    assert "need exactly one language model in the checkpoint" in text
    torch.save([1], bare)
    assert "this is no checkpoint of Lightning" in said(bare)
    bare.unlink()


def test_export_never_unpickles(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "code.ckpt"
    torch.save({"state_dict": {}, "code": Path}, file)
    args = ("export", "--ckpt_path", str(file), "--out", str(tmp_path / "x"), "--base", "x")
    assert "the checkpoint cannot be read" in refused(capsys, *args)


def test_export_keeps_foreign_folders(
    fitted: tuple[PlpruneCLI, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, out = fitted
    (tmp_path / "thesis.txt").write_text("mine", encoding="utf-8")
    args = ["--ckpt_path", str(out / "ckpt" / "step=6.ckpt"), "--out", str(tmp_path)]
    assert "will not overwrite" in refused(capsys, "export", *args, "--overwrite")
    assert (tmp_path / "thesis.txt").is_file()


# -- report --------------------------------------------------------------------------------------


def test_report_writes_the_same_pages(
    fitted: tuple[PlpruneCLI, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, out = fitted
    source = out / "report"
    assert main(["report", str(source / "report.json"), "--out", str(tmp_path / "again")]) == 0
    for name in ("report.html", "report.md", "report.json"):
        assert (tmp_path / "again" / name).read_bytes() == (source / name).read_bytes()
    # In its own folder nothing is lost, so nothing has to be allowed.
    (source / "report.html").write_text("old")
    assert main(["report", str(source / "report.json")]) == 0
    html = (tmp_path / "again" / "report.html").read_bytes()
    assert (source / "report.html").read_bytes() == html
    assert main(["report", str(source), "--out", str(source)]) == 0


def test_report_keeps_another_report(
    fitted: tuple[PlpruneCLI, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, out = fitted
    other = tmp_path / "other"
    args = ["report", str(out / "report"), "--out", str(other)]
    assert main(args) == 0
    (other / "report.html").write_text("theirs")
    message = refused(capsys, *args)
    assert message.startswith(f"plprune: cannot write the report: given {other} with report.html")
    assert "fix: add --overwrite " in message
    copy = other / "copy.json"
    copy.write_bytes((other / "report.json").read_bytes())
    assert "add --overwrite" in refused(capsys, "report", str(copy)), "not the pages' own json"
    assert (other / "report.html").read_text() == "theirs"
    assert main([*args, "--overwrite"]) == 0
    assert (other / "report.html").read_text() != "theirs"


def test_report_holds_the_whole_configuration(fitted: tuple[PlpruneCLI, Path]) -> None:
    _, out = fitted
    report = json.loads((out / "report" / "report.json").read_text("utf-8"))
    values, given = (
        yaml.safe_load(text) for text in (report["config"], (out / "run.yaml").read_text("utf-8"))
    )
    assert values["trainer"]["max_steps"] == given["trainer"]["max_steps"] == 6
    assert values["model"]["learning_rate"]["warmup"] == 0.1, "a default that nobody wrote"
    assert report["protocol"]["seed"] == given["seed_everything"] == 1
    assert report["protocol"]["data.seed"] == 0
    assert "<details><summary>" in (out / "report" / "report.html").read_text("utf-8")
    training = report["protocol"]["training"]
    assert training["learning_rate"]["peak"] == 0.01
    assert training["optimizer"] == ["AdamW betas (0.9, 0.95), eps 1e-08, weight_decay 0.0"]
    assert report["protocol"]["lora"] == {"start": "fit", "merged": True, "config": {"r": 2}}


def test_report_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "cannot read the report" in refused(capsys, "report", str(tmp_path / "none.json"))
    file = tmp_path / "report.json"
    file.write_text("[]", encoding="utf-8")
    assert "not a report: given" in refused(capsys, "report", str(file))
    file.write_text('{"loss": 1}', encoding="utf-8")
    assert "not a report: given" in refused(capsys, "report", str(file))
    file.write_text('{"format": "plprune.report/0", "verdict": []}', encoding="utf-8")
    assert "not a report of this version" in refused(capsys, "report", str(file))


@pytest.mark.parametrize("damage", [{"sizes": 3}, {"perplexity": [3]}, {"cuts": [1]}, {"speed": 2}])
def test_a_damaged_report_is_refused(
    damage: dict[str, Any],
    fitted: tuple[PlpruneCLI, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    whole = json.loads((fitted[1] / "report" / "report.json").read_text())
    file = tmp_path / "report.json"
    file.write_text(json.dumps({**whole, **damage}), encoding="utf-8")
    found = refused(capsys, "report", str(file))
    assert ": given" in found
    assert "the report is damaged" in found or "cannot read " in found
    assert list(tmp_path.iterdir()) == [file]


# -- paths ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("option", ["model", "--dense", "--tokenizer"])
def test_evaluate_checks_every_path_before_it_measures(
    option: str,
    base: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def slow(*_: Any, **__: Any) -> None:
        raise AssertionError("measured something first")

    monkeypatch.setattr("plprune.lit.evaluate_command._measure", slow)
    none = str(base / "none")
    more = ["--dense", str(base)] if option == "model" else [option, none]
    model = none if option == "model" else str(base)
    found = refused(capsys, "evaluate", model, "--text", str(base / "text.txt"), *more)
    assert "no such model folder" in found
