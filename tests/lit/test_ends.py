"""How runs end: killed after the last step, stopped before the last cut, resumed, run again."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint

import fitting
import tiny
from fitting import User, fit, prune
from plprune import quickstart
from plprune.budget import Budget
from plprune.callbacks import ExportHF, LoRARecovery, PruneReport
from plprune.compensate import LeastSquares
from plprune.errors import CheckpointError, ConfigError, ExportError
from plprune.lit.cli import main
from plprune.load import load_hf
from plprune.lora import any_adapter
from plprune.schedule import Linear

pytestmark = pytest.mark.filterwarnings("ignore:Checkpoint directory")


class KilledError(Exception):
    """Stands for SIGKILL: nothing that would clean up may be needed."""


class Kill(Callback):
    """Dies when training is over, before what comes after it."""

    def on_train_end(self, *_: Any) -> None:
        """Right after the last step."""
        raise KilledError


def outputs(folder: Path) -> list[Callback]:
    return [
        prune(),
        LoRARecovery({"r": 2}, adapter_dir=str(folder / "adapter")),
        PruneReport(str(folder / "report"), prompts=[], measure_speed=False),
        ExportHF(str(folder / "model"), tokenizer="none"),
    ]


def weights_in(folder: Path) -> bytes:
    return (folder / "model" / "model.safetensors").read_bytes()


def test_a_run_killed_after_its_last_step_is_brought_to_its_end(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    fit(User(dtype=torch.float32), outputs(tmp_path / "whole"))
    torch.manual_seed(0)
    saver = ModelCheckpoint(tmp_path / "ckpt", filename="{step}", every_n_train_steps=12)
    callbacks = [saver, *outputs(tmp_path / "killed")]
    with pytest.raises(KilledError):
        fit(User(dtype=torch.float32), [Kill(), *callbacks], enable_checkpointing=True)
    assert not (tmp_path / "killed").exists()
    resumed = User(dtype=torch.float32)
    with caplog.at_level("INFO"):
        fit(
            resumed,
            [saver, *outputs(tmp_path / "killed")],
            enable_checkpointing=True,
            ckpt_path=tmp_path / "ckpt" / "step=12.ckpt",
        )
    assert "all 12 steps are done: what comes after training follows" in caplog.text
    assert resumed.losses == []
    assert not any_adapter(resumed)
    assert weights_in(tmp_path / "killed") == weights_in(tmp_path / "whole")
    assert sorted(os.listdir(tmp_path / "killed")) == ["adapter", "model", "report"]


@pytest.mark.parametrize("dies", ["after the adapters", "after the report"])
def test_a_run_killed_between_its_outputs_writes_the_rest(
    dies: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """What is there stays as it is: the run's own report and adapters are no obstacle."""
    folder, here = tmp_path / "killed", 2 if dies == "after the adapters" else 3
    saver = ModelCheckpoint(
        tmp_path / "ckpt", filename="{step}", every_n_train_steps=6, save_top_k=-1
    )
    callbacks = [saver, *outputs(folder)]
    torch.manual_seed(0)
    killed = [*callbacks[: here + 1], Kill(), *callbacks[here + 1 :]]
    with pytest.raises(KilledError):
        fit(User(dtype=torch.float32), killed, enable_checkpointing=True)
    left = {"adapter"} if dies == "after the adapters" else {"adapter", "report"}
    assert set(os.listdir(folder)) == left
    before = {file: file.stat().st_mtime_ns for file in folder.rglob("*") if file.is_file()}

    def resumed(step: int, where: Path) -> User:
        module = User(dtype=torch.float32)
        path = tmp_path / "ckpt" / f"step={step}.ckpt"
        again = [saver, *outputs(where)]
        fit(module, again, enable_checkpointing=True, ckpt_path=path)
        return module

    # In the middle of the run they are an obstacle still.
    with pytest.raises(ExportError, match=r"the target directory exists: given .*adapter; allowed"):
        resumed(6, folder)
    with caplog.at_level("INFO"):
        assert resumed(12, folder).losses == []
    said = "the report of this run is there already" in caplog.text
    assert said == (dies == "after the report")
    assert set(os.listdir(folder)) == {"adapter", "report", "model"}
    assert {file: file.stat().st_mtime_ns for file in before} == before
    resumed(12, tmp_path / "elsewhere")
    assert weights_in(folder) == weights_in(tmp_path / "elsewhere")


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used")
@pytest.mark.parametrize("left", ["adapter", "report"])
def test_outputs_of_another_run_are_an_obstacle(left: str, tmp_path: Path) -> None:
    """Same model, budget, and plans; other losses and other adapters."""
    for place, seed in (("one", 0), ("two", 1)):
        torch.manual_seed(seed)
        saver = ModelCheckpoint(tmp_path / f"{place}-ckpt", every_n_train_steps=12)
        fit(
            User(dtype=torch.float32),
            [saver, *outputs(tmp_path / place)],
            enable_checkpointing=True,
        )
    shutil.rmtree(tmp_path / "one" / "model")
    for name in {"adapter", "report"} - {left}:
        shutil.rmtree(tmp_path / "one" / name)
    path = next((tmp_path / "two-ckpt").glob("*.ckpt"))
    with pytest.raises(ExportError, match=f"directory exists|cannot write the {left}"):
        fit(User(dtype=torch.float32), outputs(tmp_path / "one"), ckpt_path=path)
    assert not (tmp_path / "one" / "model").exists()


def test_a_checkpoint_past_the_end_of_a_run_is_refused(tmp_path: Path) -> None:
    """Going on would export a model of which not all cuts were made."""
    saver = ModelCheckpoint(tmp_path / "ckpt", filename="{step}", every_n_train_steps=6)
    schedule = Linear(cuts=3, begin=0, end=0.9, unit="fraction")
    fit(User(dtype=torch.float32), [saver, prune(schedule)], enable_checkpointing=True)
    last = next((tmp_path / "ckpt").glob("*.ckpt"))
    saver = ModelCheckpoint(tmp_path / "ckpt", filename="{step}", every_n_train_steps=6)
    callbacks = [saver, prune(schedule), ExportHF(str(tmp_path / "model"), tokenizer="none")]
    more: dict[str, Any] = {"enable_checkpointing": True, "ckpt_path": last, "max_steps": 5}
    with pytest.raises(CheckpointError, match=r"step 12 in the checkpoint, trainer\.max_steps 5"):
        fit(User(dtype=torch.float32), callbacks, **more)
    assert not (tmp_path / "model").exists()


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used")
def test_a_run_that_has_no_step_left_for_its_cuts_is_refused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Cuts at steps 0, 6 and 11 of 12; the same schedule in a run of 6 steps ends at step 5."""
    schedule = Linear(cuts=3, begin=0, end=0.9, unit="fraction")
    saver = ModelCheckpoint(tmp_path / "ckpt", every_n_train_steps=6, save_top_k=-1)
    fit(User(dtype=torch.float32), [saver, prune(schedule)], enable_checkpointing=True)
    middle = next((tmp_path / "ckpt").glob("*step=6.ckpt"))
    callbacks = [prune(schedule), ExportHF(str(tmp_path / "model"), tokenizer="none")]
    with pytest.raises(
        CheckpointError, match=r"given 2 of 3 cuts in the checkpoint of step 6, the last of"
    ):
        fit(User(dtype=torch.float32), callbacks, ckpt_path=middle, max_steps=6)
    assert not (tmp_path / "model").exists()
    caplog.clear()
    with caplog.at_level("WARNING"):
        fit(User(dtype=torch.float32), callbacks, ckpt_path=middle, max_steps=7)
    assert "the timing of the cuts is not that of the checkpoint: [0, 3, 6] now, [0, 6, 1" in (
        caplog.text
    )
    assert (tmp_path / "model").exists()


def test_an_export_wider_than_its_base_is_announced(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A bfloat16 model trained as float32 would become larger on disk than it was."""
    tiny.model(dtype=torch.bfloat16).save_pretrained(tmp_path / "base")

    def said(dtype: Any, loaded: torch.dtype) -> bool:
        caplog.clear()
        module = User(dtype=torch.float32)
        module.policy = load_hf(tmp_path / "base", dtype=loaded).train()
        folder = str(tmp_path / f"{dtype}-{loaded}")
        fit(module, [ExportHF(folder, dtype=dtype, tokenizer="none")], max_steps=1)
        return "set export.dtype: bfloat16" in caplog.text

    assert said(None, torch.float32)
    assert not said("float32", torch.float32)  # asked for
    assert not said(None, torch.bfloat16)


def test_the_last_checkpoint_holds_what_was_trained(tmp_path: Path) -> None:
    """Written after the last step, it is not one of the merged model."""

    def saver() -> ModelCheckpoint:
        return ModelCheckpoint(tmp_path / "ckpt", every_n_train_steps=1000, save_last=True)

    torch.manual_seed(0)
    merged = User(dtype=torch.float32)
    trainer = fit(merged, [saver(), *outputs(tmp_path / "one")], enable_checkpointing=True)
    last = tmp_path / "ckpt" / "last.ckpt"
    names = torch.load(last, weights_only=True)["state_dict"]
    assert any("lora_A" in name for name in names)
    again = User(dtype=torch.float32)
    callbacks = [saver(), *outputs(tmp_path / "two")]
    fit(again, callbacks, enable_checkpointing=True, ckpt_path=last)
    assert again.losses == []
    assert weights_in(tmp_path / "one") == weights_in(tmp_path / "two")
    assert not any("lora" in name for name in merged.state_dict())
    trainer.save_checkpoint(tmp_path / "merged.ckpt")
    saved = torch.load(tmp_path / "merged.ckpt", weights_only=True)["state_dict"]
    assert saved.keys() == merged.state_dict().keys()


class Terminate(Callback):
    """Somebody ends the process after the third step."""

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        """A signal, as a batch system sends it."""
        if trainer.global_step == 3:
            os.kill(os.getpid(), signal.SIGTERM)


def test_a_terminated_command_does_not_look_complete(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    base = fitting.saved(tmp_path / "base")
    values = fitting.run_values(base, tmp_path, steps=6, last_cut=4)
    values["trainer"]["callbacks"].append({"class_path": f"{__name__}.Terminate"})
    values["export"] = {"directory": str(tmp_path / "model")}
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(values), encoding="utf-8")
    assert main(["fit", "--config", str(file)]) == 128 + signal.SIGTERM
    assert "plprune: stopped by SIGTERM before the end" in capfd.readouterr().err
    assert not (tmp_path / "model").exists()
    assert (tmp_path / "ckpt" / "step=3.ckpt").is_file()


@pytest.mark.parametrize("more", [{"limit_train_batches": 0}, {"max_epochs": 0, "max_steps": -1}])
def test_a_run_without_a_step_is_refused(more: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="the run has no training step: given max_steps"):
        fit(User(), [ExportHF(str(tmp_path / "out"), tokenizer="none")], **more)
    assert os.listdir(tmp_path) == []


class StopAt(Callback):
    """Ends training early."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        """As EarlyStopping or a time limit does."""
        trainer.should_stop = trainer.global_step >= self.step


@pytest.mark.parametrize("commit", ["last", 2])
def test_units_still_masked_at_an_early_end_are_cut(commit: Any, tmp_path: Path) -> None:
    module, pruner = User(dtype=torch.float32), prune(commit=commit)
    callbacks = [pruner, LoRARecovery({"r": 2}), ExportHF(str(tmp_path / "out"), tokenizer="none")]
    early = [fitting.Probe(lambda *_: None), StopAt(3)]
    fit(module, [*callbacks, *early])
    assert len(module.losses) == 3
    assert pruner.progressive is not None
    assert (pruner.progressive.done, pruner.progressive.pending) == (1, False)
    width = pruner.progressive.spec.blocks[0].ffn
    assert module.net.model.layers[0].mlp.down_proj.in_features == width < tiny.FFN
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    ids = tiny.tokens()
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, module.net.eval()(ids).logits)


def test_masked_units_of_a_resumed_run_that_stops_at_once_are_cut(tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path / "ckpt", filename="{step}", every_n_train_steps=3)
    fit(User(), [prune(commit="last"), saver, StopAt(3)], enable_checkpointing=True)
    # The checkpoint of step 3 holds masks: it was written before training ended.
    module, pruner = User(), prune(commit="last")
    path = tmp_path / "ckpt" / "step=3.ckpt"
    fit(module, [pruner, saver, StopAt(4)], ckpt_path=path, enable_checkpointing=True)
    assert len(module.losses) == 1
    assert pruner.progressive is not None
    assert not pruner.progressive.pending


def test_the_report_of_a_second_fit_still_knows_the_dense_model(tmp_path: Path) -> None:
    module = User(dtype=torch.float32)
    report = PruneReport(str(tmp_path / "report"), prompts=[], measure_speed=False, overwrite=True)
    callbacks = [prune(), report]
    found = []
    for steps in (12, 16):
        fit(module, callbacks, max_steps=steps)
        found.append(json.loads((tmp_path / "report" / "report.json").read_text()))
    assert found[0]["sizes"] == found[1]["sizes"]
    assert found[0]["sizes"]["params_model"]["dense"] > found[0]["sizes"]["params_model"]["pruned"]
    assert "not smaller" not in str(found[1]["verdict"])


# --- refused before training ---------------------------------------------------------------------


def refused(message: str, callbacks: list[Any], **more: Any) -> None:
    module = User(**more)
    with pytest.raises((ConfigError, Exception), match=message) as caught:
        fit(module, callbacks)
    assert isinstance(caught.value, ValueError), caught.value
    assert module.losses == []


@pytest.mark.parametrize(
    ("first", "second"), [("a", "a"), ("a", "a/b"), ("a/b", "a")], ids=["same", "inside", "around"]
)
def test_outputs_that_share_a_folder(first: str, second: str, tmp_path: Path) -> None:
    one, two = str(tmp_path / first), str(tmp_path / second)
    export = ExportHF(two, tokenizer="none", overwrite=True)
    refused("two outputs share a folder: given .*PruneReport.*ExportHF", [PruneReport(one), export])
    lora = LoRARecovery({"r": 2}, adapter_dir=one)
    refused("two outputs share a folder: given .*LoRARecovery.*ExportHF", [lora, export])
    assert os.listdir(tmp_path) == []


def test_a_stock_class_for_layers_that_differ(tmp_path: Path) -> None:
    budget = Budget(widths={"kv_group": 2, "mlp": [12, 28]})
    export = ExportHF(str(tmp_path / "m"), tokenizer="none", mode="plain")
    refused(
        r"no stock class can hold layers of different widths: given .*mlp widths \[12, 28\]",
        [prune(budget=budget), export],
    )


def test_an_export_before_its_report(tmp_path: Path) -> None:
    callbacks = [ExportHF(str(tmp_path / "m"), tokenizer="none"), PruneReport(str(tmp_path / "r"))]
    refused("ExportHF before PruneReport; allowed PruneReport first: its scores", callbacks)


@pytest.mark.parametrize("start", ["fit", "last_cut"])
@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_adapters_on_tied_embeddings(target: str, start: Any) -> None:
    config = {"r": 2, "target_modules": ["q_proj", target]}
    callbacks = [prune(), LoRARecovery(config, start=start)]
    message = f"tied embeddings cannot be merged: given .*{target}.*fix: leave {target} out"
    refused(message, callbacks, variant="llama-gqa-tied")


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_adapters_on_embeddings_that_are_not_tied_are_merged(target: str) -> None:
    config = {"r": 2, "target_modules": ["q_proj", target]}
    losses = []
    for merge in (True, False):
        torch.manual_seed(0)
        module = User()
        fit(module, [prune(), LoRARecovery(config, merge=merge)])
        losses.append(module.net.eval()(tiny.tokens()).logits)
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-9, atol=1e-9)


def test_adapter_biases_without_a_place() -> None:
    refused(
        "biases cannot be merged into linears without: given lora.config.lora_bias: true",
        [prune(), LoRARecovery({"r": 2, "lora_bias": True})],
    )


def test_dora_under_refits() -> None:
    refused(
        "under DoRA adapters cannot be refitted",
        [prune(compensation=LeastSquares()), LoRARecovery({"r": 2, "use_dora": True})],
    )


def test_training_statistics_before_the_first_step() -> None:
    refused(
        "no training pass comes before the first cut",
        [prune(fitting.linear(2, 0, 4), source="training")],
    )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ExportHF("x", dtype="int8"), "unknown export.dtype: given 'int8'; allowed None"),
        (lambda: ExportHF("x", mode="flat"), "unknown export.mode: given 'flat'; allowed auto"),
        (lambda: ExportHF(None), "export.directory is no folder: given None"),
        (lambda: PruneReport("x", context=0), "report.context out of range: given 0"),
        (lambda: PruneReport("x", prompts="hello"), "report.prompts is one text: given 'hello'"),
        (lambda: LoRARecovery(["q_proj"]), "lora.config is not a mapping: given .'q_proj'."),
    ],
)
def test_arguments_of_the_wrong_kind(make: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_adapters_that_change_their_base_are_exported_beside_it(start: str, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    module = User(dtype=torch.float32)
    lora = LoRARecovery({"r": 2, "init_lora_weights": start}, merge=False)
    fit(module, [prune(), lora, ExportHF(str(tmp_path / "out"), tokenizer="none")])
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    found = PeftModel.from_pretrained(base, tmp_path / "out" / "adapter").eval()
    ids = tiny.tokens()
    with torch.no_grad():
        expected = module.net.eval()(ids).logits
        torch.testing.assert_close(found(ids).logits, expected, rtol=1e-4, atol=1e-4)


def test_the_quickstart_keeps_its_folders(capsys: pytest.CaptureFixture[str]) -> None:
    for key in ("--report.directory=x", "--export=null"):
        assert quickstart.main([key]) == 2
        assert f"reads its report and its export: given {key}" in capsys.readouterr().err


def test_adapters_of_the_users_own_that_nobody_merges(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    module = User()
    peft = get_peft_model(module.net, LoraConfig(r=2, target_modules=["q_proj"]))
    setattr(module, module.hangs, peft)
    with pytest.raises(ExportError, match="nobody will merge the adapters of this model"):
        fit(module, [prune(), ExportHF(str(tmp_path / "m"), tokenizer="none")])
    assert module.losses == []


def test_a_stock_class_that_cannot_have_the_heads(tmp_path: Path) -> None:
    export = ExportHF(str(tmp_path / "m"), tokenizer="none", mode="plain")
    budget = Budget(widths={"kv_group": 4})
    refused("no stock class can hold the pruned model", [prune(budget=budget), export],
            variant="opt-mha")  # fmt: skip


def test_a_disk_that_is_full_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    export = ExportHF(str(tmp_path / "m"), tokenizer="none")
    refused("not enough space for the export: given 0.001 MB free", [prune(), export])


def test_templates_are_found_from_a_folder_that_has_the_packages_name(tmp_path: Path) -> None:
    (tmp_path / "plprune").mkdir()
    code = (
        "from plprune.export_config import modeling_source; modeling_source(); "
        "from importlib.resources import files; "
        "from plprune import report_html; "
        "assert files('plprune.templates').joinpath('report.html').is_file()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
