"""Bad inputs of a `plprune fit`: one message that says what was given, exit status 2, nothing written."""

import copy
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import fitting
from plprune.lit.cli import main

OUTPUTS = ("report", "model", "adapter", "ckpt")


@dataclass(kw_only=True)
class Case:
    """One way to get it wrong."""

    message: str
    """Must be part of what the user reads."""
    keys: dict[str, Any] = field(default_factory=dict)
    """Dotted keys that change the good config."""
    spoil: Callable[[Path], None] | None = None
    """Damages the copy of the base folder, or puts something in the way below it."""
    more: tuple[str, ...] = ()
    """More command-line arguments."""


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A good model with tokenizer and text."""
    return fitting.saved(tmp_path_factory.mktemp("dense"))


def good(base: Path) -> dict[str, Any]:
    """A config that works."""
    return {
        "seed_everything": 1,
        "model": {"pretrained": str(base)},
        "data": {
            "train": str(base / "text.txt"),
            "tokenizer": str(base),
            "seq_len": 16,
            "batch_size": 2,
            "calibration_samples": 4,
            "max_train_tokens": 400,
        },
        "prune": {
            "method": {"class_path": "plprune.methods.transact.TransAct"},
            "budget": {"keep": 0.7, "multiple_of": {"mlp": 4}},
            "schedule": {"class_path": "plprune.schedule.OneShot"},
        },
        "report": {"directory": str(base / "report"), "measure_speed": False, "prompts": []},
        "export": {"directory": str(base / "model")},
        "trainer": {
            "max_steps": 4,
            "accelerator": "cpu",
            "devices": 1,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "default_root_dir": str(base.parent / "root"),
        },
    }


def put(config: dict[str, Any], key: str, value: Any, base: Path) -> None:
    """Set a dotted key; `BASE` in strings is the folder of the run."""
    *path, last = key.split(".")
    for name in path:
        config = config.setdefault(name, {})
    config[last] = value.replace("BASE", str(base)) if isinstance(value, str) else value


def gpt2(base: Path) -> None:
    """A model nobody described."""
    from transformers import GPT2Config, GPT2LMHeadModel

    GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=256)).save_pretrained(
        base
    )


def with_nan(base: Path) -> None:
    """Put one NaN into a weight."""
    file = base / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(tensors, file, metadata={"format": "pt"})


def truncated(name: str) -> Callable[[Path], None]:
    """Cut the second half of a file off."""

    def spoil(base: Path) -> None:
        data = (base / name).read_bytes()
        (base / name).write_bytes(data[: len(data) // 2])

    return spoil


def removed(*names: str) -> Callable[[Path], None]:
    """Remove files."""
    return lambda base: [(base / name).unlink(missing_ok=True) for name in names] and None


def pickled(base: Path) -> None:
    """Weights that only unpickling could load."""
    torch.save(load_file(base / "model.safetensors"), base / "pytorch_model.bin")
    (base / "model.safetensors").unlink()


def text(name: str, content: str) -> Callable[[Path], None]:
    """A file beside the model."""
    return lambda base: (base / name).write_text(content, encoding="utf-8") and None


def folder(name: str) -> Callable[[Path], None]:
    """A folder in the way, with somebody's file in it."""

    def spoil(base: Path) -> None:
        (base / name).mkdir()
        (base / name / "precious").write_text("mine", encoding="utf-8")

    return spoil


LINEAR = "plprune.schedule.Linear"
CASES = {
    "unknown family": Case(
        message="unknown architecture: given model_type 'gpt2'; allowed llama, mistral", spoil=gpt2
    ),
    "missing model": Case(message="missing-model", keys={"model.pretrained": "BASE/missing-model"}),
    "model without config": Case(message="config.json", spoil=removed("config.json")),
    "truncated safetensors": Case(
        message="model.safetensors", spoil=truncated("model.safetensors")
    ),
    "missing weights": Case(message="safetensors", spoil=removed("model.safetensors")),
    "pickled weights": Case(message="pytorch_model.bin", spoil=pickled),
    "missing tokenizer": Case(
        message="tokenizer",
        spoil=removed("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    ),
    "unknown attention kernel": Case(
        message="cannot use model.attn_implementation: given foo",
        keys={"model.attn_implementation": "foo"},
    ),
    "unknown strategy": Case(
        message="unknown trainer.strategy: given foo; allowed auto, ddp, fsdp2",
        keys={"trainer.strategy": "foo"},
    ),
    "Lightning's DeepSpeed": Case(
        message="Lightning's DeepSpeed strategy cannot be cut during fit",
        keys={"trainer.strategy": "deepspeed_stage_2"},
    ),
    "no device": Case(message="the trainer cannot be set up", keys={"trainer.devices": 0}),
    "no seed": Case(message="seed_everything is out of range", keys={"seed_everything": -3}),
    "no calibration for a later cut": Case(
        message="no source of calibration batches",
        keys={
            "data.calibration_samples": 0,
            "prune.schedule": {
                "class_path": "plprune.schedule.OneShot",
                "init_args": {"at": 2},
            },
        },
    ),
    "unknown dtype": Case(message="float8", keys={"model.dtype": "float8"}),
    "NaN statistics": Case(
        message="statistics are not finite", spoil=with_nan, keys={"report": None}
    ),
    "keep above one": Case(
        message="budget.keep out of range: given 1.5", keys={"prune.budget.keep": 1.5}
    ),
    "keep zero": Case(
        message="budget.keep out of range: given 0.0", keys={"prune.budget.keep": 0.0}
    ),
    "keep NaN": Case(
        message="budget.keep out of range: given nan", keys={"prune.budget.keep": float("nan")}
    ),
    "unknown quantity": Case(message="latency", keys={"prune.budget.of": "latency"}),
    "unknown base": Case(message="embeddings", keys={"prune.budget.base": "embeddings"}),
    "empty budget": Case(message="empty budget", keys={"prune.budget": {"of": "params"}}),
    "method without budget": Case(message="without a budget", keys={"prune.budget": None}),
    "impossible budget": Case(
        message="no widths meet the budget", keys={"prune.budget.keep": 0.01}
    ),
    "more groups than there are": Case(
        message="kv_group width 9 requested for block 0: given 9; allowed 1..3",
        keys={"prune.budget.widths": {"kv_group": 9}},
    ),
    "no group left": Case(
        message="kv_group too small", keys={"prune.budget.widths": {"kv_group": 0}}
    ),
    "unknown axis": Case(message="unknown axis kind", keys={"prune.budget.widths": {"heads": 2}}),
    "widths for other blocks": Case(
        message="wrong length: given 3 numbers", keys={"prune.budget.widths": {"mlp": [8, 8, 8]}}
    ),
    "widths above the budget": Case(
        message="the stated widths exceed the budget",
        keys={"prune.budget.widths": {"kv_group": 3, "mlp": 40}, "prune.budget.keep": 0.5},
    ),
    "nothing to cut": Case(
        message="nothing to cut",
        keys={"prune.method.init_args": {"attention": "none", "mlp": False}},
    ),
    "unknown score": Case(
        message="head_score", keys={"prune.method.init_args": {"head_score": "l1"}}
    ),
    "cut after the end": Case(
        message="lies outside the run", keys={"prune.schedule.init_args": {"at": 40}}
    ),
    "two cuts on a step": Case(
        message="two cuts fall on one optimizer step",
        keys={"prune.schedule": {"class_path": LINEAR, "init_args": {"cuts": 9}}},
    ),
    "end before begin": Case(
        message="impossible schedule",
        keys={"prune.schedule": {"class_path": LINEAR, "init_args": {"begin": 0.5, "end": 0.1}}},
    ),
    "unknown unit": Case(message="tokens", keys={"prune.schedule.init_args": {"unit": "tokens"}}),
    "unknown commit": Case(message="commit", keys={"prune.commit": "sometimes"}),
    "unknown statistics": Case(
        message="gradients", keys={"prune.statistics": {"source": "gradients"}}
    ),
    "empty calibration set": Case(message="calibration", keys={"data.calibration_samples": 0}),
    "too much calibration": Case(message="calibration", keys={"data.calibration_samples": 4000}),
    "missing text": Case(message="missing.txt", keys={"data.train": "BASE/missing.txt"}),
    "text too short": Case(message="block", spoil=text("text.txt", "a cat")),
    "unknown kind of text": Case(
        message="text.csv", spoil=text("text.csv", "a,b"), keys={"data.train": "BASE/text.csv"}
    ),
    "jsonl without the field": Case(
        message="body",
        spoil=text("t.jsonl", '{"body": "a cat"}\n'),
        keys={"data.train": "BASE/t.jsonl"},
    ),
    "empty sequences": Case(message="seq_len", keys={"data.seq_len": 1}),
    "negative learning rate": Case(
        message="impossible learning rate", keys={"model.learning_rate": {"peak": -1.0}}
    ),
    "no end": Case(
        message="no known end", keys={"trainer.max_steps": -1, "trainer.max_epochs": -1}
    ),
    "averaged weights": Case(
        message="StochasticWeightAveraging cannot run together with pruning",
        keys={
            "trainer.callbacks": [
                {
                    "class_path": "lightning.pytorch.callbacks.StochasticWeightAveraging",
                    "init_args": {"swa_lrs": 0.01},
                }
            ]
        },
    ),
    "strategy": Case(
        message="model averaging cannot run together with pruning: given DDPStrategy",
        keys={
            "trainer.strategy": {
                "class_path": "lightning.pytorch.strategies.DDPStrategy",
                "init_args": {"model_averaging_period": 2},
            },
            "trainer.devices": 1,
        },
    ),
    "unknown LoRA argument": Case(message="rnak", keys={"lora": {"config": {"rnak": 4}}}),
    "LoRA after no cut": Case(
        message="last_cut without cuts", keys={"lora": {"start": "last_cut"}, "prune.method": None}
    ),
    "model directory exists": Case(message="the target directory exists", spoil=folder("model")),
    "report directory exists": Case(message="the target directory exists", spoil=folder("report")),
    "parent is a file": Case(
        message="cannot write the target directory",
        keys={"export.directory": "BASE/text.txt/model"},
    ),
    "unknown export mode": Case(message="onnx", keys={"export.mode": "onnx"}),
    "checkpoint missing": Case(message="none.ckpt", more=("--ckpt_path", "BASE/none.ckpt")),
    "checkpoint damaged": Case(
        message="bad.ckpt",
        spoil=text("bad.ckpt", "not a checkpoint"),
        more=("--ckpt_path", "BASE/bad.ckpt"),
    ),
    "typo in a key": Case(message="budgte", keys={"prune.budgte": {"keep": 0.5}}),
    "typo above a key": Case(
        message="given prune.bugdet.keep; fix: did you mean prune.budget.keep? ",
        more=("--prune.bugdet.keep", "0.5"),
    ),
    "typo in a key of a dataclass": Case(
        message="unknown key: given prune.budget.keeep; fix: did you mean prune.budget.keep? ",
        more=("--prune.budget.keeep", "0.5"),
    ),
    "unknown choice in a dataclass": Case(
        message="prune.budget.of: given parms; allowed 'params', 'flops', 'kv_cache'; fix",
        keys={"prune.budget.of": "parms"},
    ),
    "checkpoint of another kind": Case(
        message="model.safetensors, another kind of file; allowed what ModelCheckpoint",
        more=("--ckpt_path", "BASE/model.safetensors"),
    ),
    "typo in a key of a class": Case(
        message="fix: did you mean prune.method.init_args.attention? ",
        keys={"prune.method.init_args": {"atention": "none"}},
    ),
    "typo above a key of a dict": Case(
        message="fix: did you mean lora.config.r? ", more=("--lora.confg.r", "3")
    ),
    "an optimizer that takes matrices only": Case(
        message="the optimizer cannot be made: given model.optimizer (Muon only supports 2D",
        keys={"model.optimizer": {"class_path": "torch.optim.Muon"}},
    ),
    "a file as the root of the run": Case(
        message="cannot write below trainer.default_root_dir: given",
        keys={"trainer.default_root_dir": "BASE/text.txt"},
    ),
    "a root that nobody can make": Case(
        message="cannot write below trainer.default_root_dir: given /proc/x",
        keys={"trainer.default_root_dir": "/proc/x"},
    ),
    "a file of torch that is no checkpoint": Case(
        message="this is no checkpoint of Lightning: given",
        spoil=lambda base: torch.save({"a": 1}, base / "odd.ckpt"),
        keys={"ckpt_path": "BASE/odd.ckpt"},
    ),
    "adapters of another kind": Case(
        message="given lora.config.peft_type: VERA; allowed LORA",
        keys={"lora.config": {"peft_type": "VERA"}},
    ),
    "a rank in words": Case(
        message="peft refused the LoRA config: given lora.config {'r': 'four'}",
        keys={"lora.config": {"r": "four"}},
    ),
    "negative steps": Case(
        message="trainer.max_steps out of range: given -5; allowed 0 or more",
        keys={"trainer.max_steps": -5},
    ),
    "a share in per cent": Case(
        message="cannot use the setting prune.budget.keep: given 80%; allowed a number, null",
        more=("--prune.budget.keep", "80%"),
    ),
    "a choice that does not exist": Case(
        message="setting prune.commit: given sometimes; allowed 'every', 'last', a whole number",
        keys={"prune.commit": "sometimes"},
    ),
    "a tokenizer without a folder": Case(
        message="no such model folder: given nope; allowed an existing folder with tokenizer",
        keys={"data.tokenizer": "nope"},
    ),
    "modules that LoRA would train whole": Case(
        message="given lora.config.modules_to_save: ['lm_head']; allowed pairs of factors",
        keys={"lora.config": {"modules_to_save": ["lm_head"]}},
    ),
    "prefix of a key": Case(
        message="unknown key: given trainer.max_step; fix: did you mean trainer.max_steps? ",
        more=("--trainer.max_step", "3"),
    ),
    "short class that does not exist": Case(
        message="TransAkt; fix: did you mean plprune.methods.transact.TransAct? ",
        keys={"prune.method.class_path": "TransAkt"},
    ),
    "class of another module": Case(
        message="fix: did you mean plprune.schedule.Linear? ",
        keys={"prune.schedule": {"class_path": "plprune.schedules.Linear"}},
    ),
    "callback that does not exist": Case(
        message="did you mean lightning.pytorch.callbacks.model_checkpoint.ModelCheckpoint? ",
        keys={"trainer.callbacks": [{"class_path": "ModelChekpoint"}]},
    ),
    "typo in a callback": Case(
        message="fix: did you mean init_args.context? ",
        keys={
            "trainer.callbacks": [
                {"class_path": "plprune.callbacks.SizeMonitor", "init_args": {"contxt": 3}}
            ]
        },
    ),
    "typo in a section": Case(
        message="unknown key: given trainer.max_stepz; fix: did you mean trainer.max_steps? ",
        keys={"trainer.max_stepz": 3},
    ),
    "widths of what is not cut": Case(
        message="budget.widths.kv_group is given, but the method does not cut kv_group",
        keys={
            "prune.method.init_args": {"attention": "none"},
            "prune.budget.widths": {"kv_group": 2},
        },
    ),
    "class that does not exist": Case(
        message="fix: did you mean plprune.methods.transact.TransAct? ",
        keys={"prune.method.class_path": "plprune.methods.transact.TransAkt"},
    ),
}


def attempt(dense: Path, where: Path, case: Case) -> tuple[int | str | None, dict[str, bytes]]:
    """Run a spoiled copy; the exit status and the files that were there before."""
    base = where / "base"
    shutil.copytree(dense, base)
    if case.spoil is not None:
        case.spoil(base)
    config = copy.deepcopy(good(base))
    for key, value in case.keys.items():
        put(config, key, value, base)
    file = where / "run.yaml"
    file.write_text(yaml.safe_dump(config), encoding="utf-8")
    before = {str(p.relative_to(base)): p.read_bytes() for p in base.rglob("*") if p.is_file()}
    arguments = [argument.replace("BASE", str(base)) for argument in case.more]
    try:
        status: int | str | None = main(["fit", "--config", str(file), *arguments])
    except SystemExit as stop:
        status = stop.code
    finally:
        # Lightning starts the group of a distributed strategy before any callback can object.
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    return status, before


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", CASES)
def test_refused(dense: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], name: str):
    case = CASES[name]
    status, before = attempt(dense, tmp_path, case)
    said = capfd.readouterr().err
    assert status == 2, said
    assert case.message in said
    assert "Traceback" not in said
    base = tmp_path / "base"
    after = {str(p.relative_to(base)): p.read_bytes() for p in base.rglob("*") if p.is_file()}
    assert after == before, "something was written or changed"


@pytest.mark.parametrize("name", ["RANK", "LOCAL_RANK", "SLURM_PROCID"])
def test_of_several_processes_the_first_speaks(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, name: str
):
    for number, said in (("0", "plprune: unknown command: given fitt"), ("1", "")):
        monkeypatch.setenv(name, number)
        assert main(["fitt"]) == 2
        found = capfd.readouterr().err
        assert found.startswith(said)
        assert bool(found) == bool(said)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_good_config_runs(dense: Path, tmp_path: Path):
    """Control: what the cases spoil works, and writes what they must not."""
    status, before = attempt(dense, tmp_path, Case(message=""))
    assert status == 0
    written = {p.name for p in (tmp_path / "base").iterdir()} - {Path(n).parts[0] for n in before}
    assert written == {"report", "model"}
