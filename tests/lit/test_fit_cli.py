"""The whole chain of `plprune fit` on a tiny model, interrupted, resumed, tested and refused."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import fitting
import tiny
from plprune.errors import CheckpointError
from plprune.lit.cli import PlpruneCLI, main
from tiny_tokenizer import tiny_tokenizer

pytestmark = [
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed from"),
]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense model with a tokenizer, and a text."""
    return fitting.saved(tmp_path_factory.mktemp("base"))


def config(base: Path, out: Path, **changes: Any) -> dict[str, Any]:
    """A run of 8 steps with every part switched on; checkpoints of every step."""
    values = fitting.run_values(base, out, steps=8, last_cut=5)
    values["trainer"] |= {
        "val_check_interval": 3,
        "check_val_every_n_epoch": None,
        "num_sanity_val_steps": 0,
    }
    report = {"directory": str(out / "report"), "measure_speed": False, "prompts": ["the cat"]}
    parts = {
        "lora": {"config": {"r": 2, "lora_dropout": 0.1}},
        "monitor": {},
        "report": report,
        "export": {"directory": str(out / "model")},
    }
    return {**values, **parts, **changes}


def command(path: Path, name: str, values: dict[str, Any], *more: str) -> list[str]:
    """A command line whose config lies in a file."""
    path.mkdir(parents=True, exist_ok=True)
    file = path / "run.yaml"
    file.write_text(yaml.safe_dump(values), encoding="utf-8")
    return [name, "--config", str(file), *more]


def called(base: Path, out: Path, *more: str, **changes: Any) -> PlpruneCLI:
    return PlpruneCLI(command(out, "fit", config(base, out, **changes), *more))


@pytest.fixture(scope="module")
def whole(base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[PlpruneCLI, Path]:
    out = tmp_path_factory.mktemp("whole")
    return called(base, out), out


def test_every_part_ran(whole: tuple[PlpruneCLI, Path], base: Path) -> None:
    cli, out = whole
    kinds = [type(callback).__name__ for callback in cli.trainer.callbacks]
    order = ["Prune", "LoRARecovery", "SizeMonitor", "PruneReport", "ExportHF"]
    assert [kind for kind in kinds if kind in order] == order
    report = json.loads((out / "report" / "report.json").read_text("utf-8"))
    assert [cut["step"] for cut in report["cuts"]] == [2, 5]
    assert report["sizes"]["params_model"]["pruned"] == sum(
        p.numel() for p in cli.model.parameters()
    )
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(out / "model").eval()
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, cli.model.model.eval()(ids).logits)
    assert (out / "plprune_config.yaml").is_file()


@pytest.mark.parametrize("step", [1, 2, 4, 7])
def test_a_resumed_command_ends_where_the_whole_one_did(
    whole: tuple[PlpruneCLI, Path], base: Path, tmp_path: Path, step: int
) -> None:
    cli, out = whole
    again = called(base, tmp_path, "--ckpt_path", str(out / "ckpt" / f"step={step}.ckpt"))
    expected, found = cli.model.state_dict(), again.model.state_dict()
    assert expected.keys() == found.keys()
    assert all(torch.equal(value, found[name]) for name, value in expected.items())
    one, two = (
        json.loads((folder / "report" / "report.json").read_text("utf-8"))
        for folder in (out, tmp_path)
    )
    curves = [{curve["name"]: curve for curve in report["curves"]} for report in (one, two)]
    assert curves[0]["training"] == curves[1]["training"]
    assert curves[0]["training"]["step"] == list(range(1, 9))
    assert one["perplexity"] == two["perplexity"]
    assert one["samples"] == two["samples"]
    assert [cut["plan_hash"] for cut in one["cuts"]] == [cut["plan_hash"] for cut in two["cuts"]]


def test_test_evaluates_the_pruned_structure(
    whole: tuple[PlpruneCLI, Path], base: Path, tmp_path: Path
) -> None:
    cli, out = whole
    file = str(out / "ckpt" / "step=8.ckpt")
    tested = PlpruneCLI(command(tmp_path, "test", config(base, tmp_path), "--ckpt_path", file))
    assert tested.model.model.config.num_key_value_heads == 2
    merged = cli.trainer.test(cli.model, cli.datamodule, verbose=False)[0]["test_perplexity"]
    found = float(tested.trainer.callback_metrics["test_perplexity"])
    assert found == pytest.approx(merged, rel=1e-5)
    assert not (tmp_path / "model").exists()


def refused(capsys: pytest.CaptureFixture[str], args: list[str]) -> str:
    assert main(args) == 2
    return capsys.readouterr().err.splitlines()[-1]


def test_without_the_prune_key_the_command_is_named(
    whole: tuple[PlpruneCLI, Path], base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = config(base, tmp_path, lora=None)
    del values["prune"]
    file = str(whole[1] / "ckpt" / "step=8.ckpt")
    for name in ("fit", "test"):
        message = refused(capsys, command(tmp_path, name, values, "--ckpt_path", file))
        assert message == (
            "plprune: the checkpoint is of a pruned model: given a checkpoint with 4 heads, 2 KV "
            "heads and FFN 28 "
            "in block 0; allowed 6 heads, 3 KV heads and FFN 40 in block 0, as the model in "
            "memory; fix: use the "
            "config of the run with its `prune` key: plprune test --config RUN.yaml --ckpt_path "
            "FILE (in a script: "
            "give the Trainer the same Prune callback)"
        )


def test_without_the_lora_key_the_key_is_named(
    whole: tuple[PlpruneCLI, Path], base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = config(base, tmp_path, lora=None)
    file = str(whole[1] / "ckpt" / "step=8.ckpt")
    message = refused(capsys, command(tmp_path, "test", values, "--ckpt_path", file))
    assert message.startswith(
        "plprune: the checkpoint has LoRA adapters: given a model without; fix: use the config"
    )


def test_another_base_model_is_refused(
    whole: tuple[PlpruneCLI, Path], base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    tiny_tokenizer(other)
    tiny.model(dtype=torch.float32, vocab_size=256, intermediate_size=48).save_pretrained(other)
    values = config(base, tmp_path, model={"pretrained": str(other)})
    file = str(whole[1] / "ckpt" / "step=8.ckpt")
    message = refused(capsys, command(tmp_path, "fit", values, "--ckpt_path", file))
    assert message.startswith(
        "plprune: the structure belongs to another base model: given dense fingerprint"
    )


def test_a_truncated_checkpoint_is_refused_in_one_line(
    whole: tuple[PlpruneCLI, Path], base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = (whole[1] / "ckpt" / "step=8.ckpt").read_bytes()
    file = tmp_path / "cut.ckpt"
    file.write_bytes(content[: len(content) // 2])
    args = command(tmp_path, "fit", config(base, tmp_path), "--ckpt_path", str(file))
    message = refused(capsys, args)
    assert message.startswith(f"plprune: the checkpoint is damaged: given {file}: ")
    assert message.endswith("fix: resume from the checkpoint before it")
    file.unlink()
    assert refused(capsys, args).startswith("plprune: there is no such checkpoint: given")


def test_existing_targets_are_refused_before_anything_is_loaded(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, key in (("report", "report"), ("model", "export")):
        (tmp_path / name).mkdir()
        message = refused(capsys, command(tmp_path, "fit", config(base, tmp_path)))
        assert message == (
            f"plprune: the target directory exists: given {tmp_path / name}; allowed a directory "
            "that does not exist "
            f"yet; fix: choose another one, or replace it with {key}.overwrite: true"
        )
        (tmp_path / name).rmdir()
    assert not (tmp_path / "ckpt").exists()


def test_the_module_checks_without_a_trainer(whole: tuple[PlpruneCLI, Path], base: Path) -> None:
    from plprune.lit.model import LitCausalLM

    with pytest.raises(CheckpointError, match="the checkpoint is of a pruned model"):
        LitCausalLM.load_from_checkpoint(
            whole[1] / "ckpt" / "step=8.ckpt", pretrained=str(base), weights_only=True
        )


def resumed(
    whole: tuple[PlpruneCLI, Path],
    base: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    step: int,
    **changes: Any,
) -> str:
    file = str(whole[1] / "ckpt" / f"step={step}.ckpt")
    values = config(base, tmp_path, **changes)
    return refused(capsys, command(tmp_path, "fit", values, "--ckpt_path", file))


def test_a_base_that_is_tied_otherwise_is_refused(
    whole: tuple[PlpruneCLI, Path], base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    tiny_tokenizer(other)
    tiny.model("llama-gqa-tied", dtype=torch.float32, vocab_size=256).save_pretrained(other)
    message = resumed(whole, base, tmp_path, capsys, 3, model={"pretrained": str(other)})
    assert message.startswith(
        "plprune: the checkpoint is of a model whose output head is tied otherwise: given a model "
        "with a tied head; allowed a separate one"
    )


def test_another_optimizer_is_refused(
    whole: tuple[PlpruneCLI, Path], base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = config(base, tmp_path)
    sgd = {"class_path": "torch.optim.SGD", "init_args": {"momentum": 0.9, "lr": 0.1}}
    model = {**values["model"], "optimizer": sgd}
    message = resumed(whole, base, tmp_path, capsys, 3, model=model)
    assert message.startswith("plprune: the checkpoint was written with another optimizer: given")
    assert "momentum" in message
    assert "betas" in message


def test_a_budget_above_what_is_left_is_refused(
    whole: tuple[PlpruneCLI, Path], base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prune = copy.deepcopy(config(base, tmp_path)["prune"])
    prune["budget"] = {"keep": 0.95, "widths": {"kv_group": 3}, "multiple_of": {"mlp": 1}}
    message = resumed(whole, base, tmp_path, capsys, 3, prune=prune)
    assert message.startswith(
        "plprune: the budget asks for more than earlier cuts have left: given"
    )
