"""What a run leaves besides its weights: its configuration, its adapters' settings, its target."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from fitting import User, fit, prune
from plprune.budget import Budget
from plprune.callbacks import ExportHF, LoRARecovery
from plprune.callbacks.export import require_writable
from plprune.errors import CheckpointError, ConfigError, ExportError, ModelError
from plprune.lit.run_config import _free


def test_no_configuration_is_written_over_another(tmp_path: Path) -> None:
    names = []
    for text in ("a", "b", "b", "a", "c"):
        target = _free(tmp_path, text)
        names.append(None if target is None else target.name)
        if target is not None:
            target.write_text(text, "utf-8")
    assert names == [
        "plprune_config.yaml",
        "plprune_config_2.yaml",
        None,
        None,
        "plprune_config_3.yaml",
    ]


# --- adapters of a checkpoint --------------------------------------------------------------------


def saved(folder: Path, **config: Any) -> str:
    keep = ModelCheckpoint(folder, save_last=True, every_n_train_steps=3)
    callbacks = [prune(), LoRARecovery({"r": 2, **config}), keep]
    fit(User(dtype=torch.float32), callbacks, enable_checkpointing=True, max_steps=9)
    return str(folder / "last.ckpt")


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used")
@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"r": 2, "lora_alpha": 400}, "given lora.config.lora_alpha: 400; allowed 4, as in the"),
        ({"r": 3, "lora_alpha": 4}, "given lora.config.r: 3; allowed 2, as in the checkpoint"),
        (
            {"r": 2, "lora_alpha": 4, "use_rslora": True},
            "given lora.config.use_rslora: True; allowed no such setting",
        ),
    ],
)
def test_adapters_of_another_kind_are_refused(
    config: dict[str, Any], message: str, tmp_path: Path
) -> None:
    file = saved(tmp_path, lora_alpha=4)
    with pytest.raises(CheckpointError, match=message):
        fit(User(dtype=torch.float32), [prune(), LoRARecovery(config)], ckpt_path=file)
    same = LoRARecovery({"lora_alpha": 4, "r": 2})
    fit(User(dtype=torch.float32), [prune(), same], ckpt_path=file, max_steps=10)


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used")
def test_a_script_that_forgets_the_adapters_is_refused(tmp_path: Path) -> None:
    file = saved(tmp_path)
    with pytest.raises(CheckpointError, match="the checkpoint has LoRA adapters: given a run with"):
        fit(User(dtype=torch.float32), [prune()], ckpt_path=file)


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used")
def test_a_recipe_that_changed_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = saved(tmp_path)
    more = {"ckpt_path": file, "max_steps": 10}
    fit(User(dtype=torch.float32), [prune(), LoRARecovery({"r": 2})], **more)
    assert "is not that of the checkpoint" not in caplog.text
    other = prune(budget=Budget(keep=0.5, multiple_of={"mlp": 4}), commit="last")
    fit(User(dtype=torch.float32), [other, LoRARecovery({"r": 2})], **more)
    assert "prune.budget is not that of the checkpoint: {'keep': 0.5" in caplog.text
    assert "prune.commit is not that of the checkpoint: last now, every then" in caplog.text
    assert "prune.schedule" not in caplog.text


def test_settings_a_checkpoint_cannot_hold_are_left_out(tmp_path: Path) -> None:
    file = saved(tmp_path, target_modules={"up_proj", "q_proj"}, loftq_config={})
    parts = torch.load(file, weights_only=True)["plprune"]
    assert parts["lora"]["config"]["target_modules"] == ["q_proj", "up_proj"]


# --- targets -------------------------------------------------------------------------------------


def test_an_export_without_a_tokenizer_is_refused_before_training(tmp_path: Path) -> None:
    for tokenizer, kind, message in (
        (None, ConfigError, "no tokenizer for the export: given a model that does not know where"),
        (str(tmp_path / "no"), ModelError, "no such model folder"),
    ):
        module = User(dtype=torch.float32)
        with pytest.raises(kind, match=message):
            fit(module, [prune(), ExportHF(str(tmp_path / "out"), tokenizer=tokenizer)])
        assert module.losses == []
    fit(User(dtype=torch.float32), [prune(), ExportHF(str(tmp_path / "out"), tokenizer="none")])
    assert (tmp_path / "out" / "model.safetensors").is_file()
    assert not (tmp_path / "out" / "tokenizer.json").exists()


def test_a_target_that_cannot_be_made_is_found_by_trying(tmp_path: Path) -> None:
    """Permissions say that root may write to /proc."""
    with pytest.raises(ExportError, match="cannot write the target directory: given /proc/x/y"):
        require_writable(Path("/proc/x/y"), overwrite=False, ours=lambda _: True)
    (tmp_path / "file").write_text("x")
    with pytest.raises(ExportError, match="cannot write the target directory"):
        require_writable(tmp_path / "file" / "y", overwrite=False, ours=lambda _: True)
    require_writable(tmp_path / "a" / "b", overwrite=False, ours=lambda _: True)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_callbacks_that_look_at_the_end_stand_after_the_one_that_merges(tmp_path: Path) -> None:
    module = User(dtype=torch.float32)
    callbacks = [prune(), ExportHF(str(tmp_path / "out"), tokenizer="none"), LoRARecovery()]
    with pytest.raises(
        ConfigError, match="callbacks stand in an order that cannot work: given Exp"
    ):
        fit(module, callbacks)
    assert module.losses == []
