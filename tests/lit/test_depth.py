"""Depth inside `fit`: masked now and removed later is removed now; resumed, adapted, exported."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

import fitting
import oracles
from fitting import User, fit, gap, hashes, linear, prune, weights
from plprune.budget import Budget
from plprune.callbacks import ExportHF, LoRARecovery, PruneReport
from plprune.compensate import MeanBias
from plprune.count import count_params
from plprune.describe import describe
from plprune.errors import CheckpointError, ConfigError
from plprune.load import load_hf
from plprune.methods.depth import Depth

pytestmark = [
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed from"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used"),
]

DEEP: dict[str, Any] = {"num_hidden_layers": 5}
METHODS = {
    "blocks": (Depth(), 0.6),
    "sublayers": (Depth(units="sublayers"), 0.55),
    "loss": (Depth(criterion="loss", units="sublayers"), 0.55),
}
every_method = pytest.mark.parametrize("name", list(METHODS))


def pruner(name: str = "blocks", **more: Any) -> Any:
    """Two cuts, after steps 2 and 6."""
    method, keep = METHODS[name]
    settings = {"method": method, "budget": Budget(keep=keep, base="blocks"), **more}
    return prune(settings.pop("schedule", linear(2, 2, 6)), **settings)


def run(name: str = "blocks", callbacks: Any = (), **more: Any) -> tuple[User, Any]:
    module = User(**DEEP)
    made = pruner(name, **more)
    fit(module, [made, *callbacks], max_steps=9)
    return module, made


@every_method
def test_when_tensors_go_does_not_matter(name: str) -> None:
    now, one = run(name)
    later, other = run(name, commit="last")
    assert hashes(one) == hashes(other)
    assert len(set(hashes(one))) == 2
    assert gap(now.losses, later.losses) < 1e-9
    oracles.close(weights(now), weights(later))
    spec = one.progressive.spec
    assert [entry["committed"] for entry in other.progressive.history] == [False, True]
    real = sum(p.numel() for p in now.net.parameters())
    assert count_params(spec).model == real
    assert (
        count_params(spec).blocks <= METHODS[name][1] * count_params(one.progressive.dense).blocks
    )
    optimizer = now.optimizers().optimizer  # type: ignore[union-attr]
    held = {p for group in optimizer.param_groups for p in group["params"]}
    assert held == set(optimizer.state) == set(now.net.parameters())


def test_two_blocks_a_cut() -> None:
    module = User(num_hidden_layers=6)
    made = prune(linear(2, 2, 6), method=Depth(), budget=Budget(widths={"blocks": 2}))
    fit(module, [made], max_steps=9)
    after = [sum(entry["widths_after"]["mlp_sublayer"]) for entry in made.progressive.history]
    assert after == [4, 2]


def test_training_passes_as_statistics() -> None:
    _, made = run(source="training", window=2)
    assert len(made.progressive.spec.removed()) == 4
    with pytest.raises(ConfigError, match="losses cannot be measured"):
        run("loss", source="training", window=2)


def test_nothing_is_compensated() -> None:
    with pytest.raises(ConfigError, match="nothing to compensate"):
        pruner(compensation=MeanBias())


def saver(folder: Path) -> ModelCheckpoint:
    return ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)


def run_saved(folder: Path, name: str, **more: Any) -> tuple[User, Any]:
    """The same with a checkpoint of every step, or from one."""
    ckpt_path = more.pop("ckpt_path", None)
    module, made = User(**DEEP), pruner(name, **more)
    settings = {"max_steps": 9, "enable_checkpointing": True, "ckpt_path": ckpt_path}
    fit(module, [made, saver(folder)], **settings)
    return module, made


@every_method
@pytest.mark.parametrize("commit", ["every", "last"])
def test_resumed_is_uninterrupted(name: str, commit: str, tmp_path: Path) -> None:
    whole, one = run_saved(tmp_path, name, commit=commit)
    for step in (1, 4, 7):
        path = tmp_path / f"step={step}.ckpt"
        again, other = run_saved(tmp_path / "again", name, commit=commit, ckpt_path=path)
        assert hashes(one) == hashes(other)
        assert gap(whole.losses[step:], again.losses) < 1e-9
        oracles.close(weights(whole), weights(again))


def test_a_checkpoint_without_blocks_is_refused_by_a_dense_run(tmp_path: Path) -> None:
    run_saved(tmp_path, "blocks")
    with pytest.raises((CheckpointError, RuntimeError)):
        fit(User(**DEEP), [], ckpt_path=tmp_path / "step=7.ckpt", max_steps=9)


@pytest.mark.parametrize("start", ["fit", "last_cut"])
@pytest.mark.parametrize("commit", ["every", "last"])
def test_adapters(start: Any, commit: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    module, made = User(**DEEP), pruner("sublayers", commit=commit)
    lora = LoRARecovery({"r": 2}, start=start)
    export = ExportHF(tmp_path / "out", tokenizer="none")
    fit(module, [made, lora, export], max_steps=9)
    again = load_hf(tmp_path / "out", trust_remote_code=True)
    ids = fitting.tiny.tokens()
    torch.testing.assert_close(again.double()(ids).logits, module.net.eval()(ids).logits)
    assert not any("lora" in name for name, _ in module.net.named_parameters())


def test_adapters_beside_an_export_know_the_new_numbers(tmp_path: Path) -> None:
    from peft import PeftModel

    torch.manual_seed(0)
    first = pruner("blocks")
    fit(User(**DEEP, dtype=torch.float32), [first], max_steps=9)
    last = max(n for n, block in enumerate(first.progressive.spec.blocks) if block.heads)
    assert last > 2  # it gets another number
    module = User(**DEEP, dtype=torch.float32)
    pattern = {f"layers.{last}.mlp.down_proj": 3}
    lora = LoRARecovery({"r": 2, "rank_pattern": pattern}, start="last_cut", merge=False)
    export = ExportHF(tmp_path / "out", tokenizer="none")
    made = pruner("blocks")
    fit(module, [made, lora, export], max_steps=9)
    base = load_hf(tmp_path / "out")
    assert base.config.num_hidden_layers == 3
    again = PeftModel.from_pretrained(base, str(tmp_path / "out" / "adapter")).eval()
    assert again.base_model.model.model.layers[2].mlp.down_proj.r["default"] == 3
    ids = fitting.tiny.tokens()
    expected = module.net.eval()(ids, use_cache=False).logits
    torch.testing.assert_close(again(ids).logits, expected, rtol=1e-4, atol=1e-5)


@every_method
def test_export_and_report(name: str, tmp_path: Path) -> None:
    module = User(**DEEP, dtype=torch.float32)
    made = pruner(name)
    report = PruneReport(str(tmp_path / "report"))
    export = ExportHF(tmp_path / "out", tokenizer="none")
    fit(module, [made, report, export], max_steps=9)
    config = json.loads((tmp_path / "out" / "config.json").read_text("utf-8"))
    again = load_hf(tmp_path / "out", trust_remote_code="auto_map" in config)
    ids = fitting.tiny.tokens()
    torch.testing.assert_close(again(ids).logits, module.net.eval()(ids).logits)
    assert describe(again).blocks == tuple(
        block for block in made.progressive.spec.blocks if block.heads or block.ffn
    )
    text = (tmp_path / "report" / "report.md").read_text("utf-8")
    assert "attention" in text
    card = (tmp_path / "out" / "README.md").read_text("utf-8")
    assert "removed" in card
    if name == "blocks":
        assert config["architectures"] == ["LlamaForCausalLM"]
        assert config["num_hidden_layers"] == 3
