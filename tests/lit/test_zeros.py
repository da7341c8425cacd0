"""Zeros inside `fit`: made block by block, kept by training, merged around by adapters."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import load_file

import fitting
import tiny
from plprune.budget import Budget
from plprune.callbacks import KeepMasks, LoRARecovery, Prune, Statistics
from plprune.drivers.in_memory import prune_model
from plprune.errors import ConfigError, PlanError
from plprune.lit.cli import main
from plprune.lit.kept_zeros import count_zeros
from plprune.methods.magnitude import Magnitude
from plprune.methods.sparsegpt import SparseGPT
from plprune.methods.wanda import Wanda
from plprune.outliers import OutlierWeighed

HALF = Budget(keep=0.5, base="prunable")
METHODS = [Magnitude(), Wanda(), SparseGPT(), Wanda(pattern="2:4")]
NAMES = ["magnitude", "wanda", "sparsegpt", "wanda 2:4"]


def sparse(method: Any = None, **settings: Any) -> Prune:
    """Cuts after steps 2 and 5."""
    known = {"statistics": Statistics(batches=tiny.batches(2)), "schedule": fitting.linear(2, 2, 5)}
    method = method or Wanda()
    budget = None if method.groups else HALF
    return Prune(method, budget, **{**known, **settings})


def shares(module: Any) -> set[float]:
    """Shares of zeros of all linears."""
    return {
        round(zeros / module.net.get_submodule(name).weight.numel(), 6)
        for name, zeros in count_zeros(module.net).items()
    }


@pytest.mark.parametrize("method", METHODS, ids=NAMES)
def test_a_cut_before_the_first_step_is_that_of_the_model_alone(method: Any) -> None:
    module, alone = fitting.User(), fitting.User()
    plans = prune_model(alone.net, method, method.own_budget() or HALF, tiny.batches(2))
    dense = fitting.weights(fitting.User())
    seen = fitting.Probe(lambda trainer, pl_module: fitting.weights(pl_module))
    fitting.fit(module, [sparse(method, schedule=None), seen], max_steps=1)
    assert len(plans) > 0
    found, wanted = seen.seen[0], fitting.weights(alone)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert any(not torch.equal(found[name], dense[name]) for name in wanted)


@pytest.mark.parametrize("method", METHODS[:3], ids=NAMES[:3])
def test_zeros_grow_and_stay(method: Any) -> None:
    module = fitting.User()
    pruner = sparse(method)
    before = fitting.weights(module)
    trainer = fitting.fit(module, [pruner])
    assert shares(module) == {0.5}
    assert pruner.progressive is not None
    counts = [sum(entry["zeros"].values()) for entry in pruner.progressive.history]
    assert counts == [counts[1] // 2, sum(count_zeros(module.net).values())]
    state = trainer.optimizers[0].state
    for name in count_zeros(module.net):
        weight = module.net.get_submodule(name).weight
        dead = weight == 0
        for key in ("exp_avg", "exp_avg_sq"):
            assert int((state[weight][key][dead] != 0).sum()) == 0
            assert int((state[weight][key][~dead] == 0).sum()) == 0
    moved = fitting.weights(module)
    assert not torch.equal(moved["policy.model.norm.weight"], before["policy.model.norm.weight"])


OWL = OutlierWeighed(threshold=2.5, spread=0.1)


@pytest.mark.parametrize("kind", [Magnitude, Wanda, SparseGPT])
def test_blocks_lose_by_the_outliers_of_the_dense_model_at_every_cut(kind: Any) -> None:
    """Later cuts go by D before the first: by that of a pruned model, zeros would have to go."""
    module = fitting.User()
    pruner = sparse(kind(allocation=OWL), schedule=fitting.linear(3, 2, 6))
    fitting.fit(module, [pruner])
    counts = count_zeros(module.net)
    total = sum(module.net.get_submodule(name).weight.numel() for name in counts)
    assert sum(counts.values()) == total // 2
    assert pruner.progressive is not None
    made = [sum(entry["zeros"].values()) for entry in pruner.progressive.history]
    assert made == [-(-total * part // 6) for part in (1, 2, 3)]
    notes = pruner.progressive.notes
    assert len(notes) == 2
    assert notes[0] != notes[1]
    by_block = [sum(z for n, z in counts.items() if f"layers.{b}." in n) for b in range(2)]
    assert (by_block[0] < by_block[1]) == (notes[0] > notes[1])
    assert abs(by_block[0] / total - 0.25) == pytest.approx(OWL.spread / 2, abs=1e-3)


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_a_killed_run_remembers_the_outliers(tmp_path: Path) -> None:
    def run(*callbacks: Any, **more: Any) -> tuple[fitting.User, Prune]:
        module, pruner = fitting.User(), sparse(Wanda(allocation=OWL))
        fitting.fit(module, [pruner, *callbacks], max_steps=8, **more)
        return module, pruner

    saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    whole, pruner = run(saver, enable_checkpointing=True)
    wanted = fitting.weights(whole)
    for step in (1, 2, 4, 5):
        again, other = run(ckpt_path=tmp_path / f"step={step}.ckpt")
        found = fitting.weights(again)
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)
        assert pruner.progressive is not None
        assert other.progressive is not None
        assert other.progressive.notes == pruner.progressive.notes


def test_a_config_can_ask_for_it(tmp_path: Path) -> None:
    base = fitting.saved(tmp_path / "base")
    values = fitting.run_values(base, tmp_path, steps=6, last_cut=4)
    allocation = {"class_path": "plprune.outliers.OutlierWeighed", "init_args": {"threshold": 2.5}}
    init = {"allocation": allocation}
    values["prune"]["method"] = {"class_path": "plprune.methods.wanda.Wanda", "init_args": init}
    values["prune"]["budget"] = {"keep": 0.5, "base": "prunable"}
    values["export"] = {"directory": str(tmp_path / "model")}
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(values), encoding="utf-8")
    assert main(["fit", "--config", str(file)]) == 0
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    linears = {name: tensor for name, tensor in tensors.items() if "proj" in name}
    zeros = {name: int((tensor == 0).sum()) for name, tensor in linears.items()}
    assert sum(zeros.values()) * 2 == sum(tensor.numel() for tensor in linears.values())
    assert len({round(zeros[name] / linears[name].numel(), 2) for name in zeros}) == 2


def pruned() -> fitting.User:
    module = fitting.User()
    prune_model(module.net, Wanda(), HALF, tiny.batches(2))
    return module


@pytest.mark.parametrize("settings", [{}, {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1}])
def test_a_pruned_model_is_tuned_around_its_zeros(settings: dict[str, Any]) -> None:
    module = pruned()
    fitting.fit(module, [KeepMasks()], **settings)
    assert shares(module) == {0.5}


def test_without_the_callback_zeros_are_filled() -> None:
    module = pruned()
    fitting.fit(module, [])
    assert shares(module) == {0.0}


def test_clipping_counts_what_is_trained_only() -> None:
    """The norm that clips is that of a model whose zeros are constants."""
    module, oracle = pruned(), pruned()
    masks = {p: p != 0 for name, p in oracle.net.named_parameters() if "proj" in name}
    for parameter, keep in masks.items():
        parameter.register_hook(lambda grad, keep=keep: grad * keep)
    settings = {"gradient_clip_val": 0.05, "max_steps": 6}
    fitting.fit(oracle, [], **settings)
    fitting.fit(module, [KeepMasks()], **settings)
    assert fitting.gap(module.losses, oracle.losses) == 0
    loose = pruned()
    fitting.fit(loose, [], **settings)
    assert fitting.gap(loose.losses, oracle.losses) > 1e-6


def test_a_dense_model_has_no_zeros_to_keep() -> None:
    with pytest.raises(ConfigError, match="there are no zeros to keep"):
        fitting.fit(fitting.User(), [KeepMasks()])


class Noisy(torch.optim.SGD):
    """Moves what has no gradient."""

    def step(self, closure: Any = None) -> Any:
        result = super().step(closure)
        with torch.no_grad():
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.add_(1e-4)
        return result


def test_an_optimizer_that_moves_zeros_is_noticed_after_one_step() -> None:
    module = pruned()
    module.optimizers_of = lambda m: Noisy(m.parameters(), lr=1e-3)
    with pytest.raises(PlanError, match="zeros did not stay"):
        fitting.fit(module, [KeepMasks()])
    assert len(module.losses) == 1


def test_training_passes_are_no_calibration_set() -> None:
    statistics = Statistics(source="training", window=2)
    with pytest.raises(ConfigError, match="cannot look at training passes"):
        fitting.fit(fitting.User(), [sparse(statistics=statistics)])


def test_adapters_before_the_last_cut_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"set lora\.start: last_cut"):
        fitting.fit(fitting.User(), [sparse(), LoRARecovery({"r": 2})])


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_a_killed_run_goes_on_bit_for_bit(tmp_path: Path) -> None:
    def run(*callbacks: Any, **more: Any) -> fitting.User:
        module = fitting.User()
        fitting.fit(module, [sparse(), *callbacks], max_steps=8, **more)
        return module

    saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    whole = run(saver, enable_checkpointing=True)
    for step in (1, 2, 4, 5, 7):
        again = run(ckpt_path=tmp_path / f"step={step}.ckpt")
        assert all(
            torch.equal(a, b)
            for a, b in zip(
                fitting.weights(again).values(), fitting.weights(whole).values(), strict=True
            )
        )
        assert shares(again) == {0.5}


def test_adapters_train_around_zeros_and_are_merged_as_they_were_trained() -> None:
    module = fitting.User()
    pruner = sparse()
    seen = fitting.Probe(lambda trainer, m: m.net.eval()(tiny.tokens()).logits.detach())
    fitting.fit(module, [pruner, LoRARecovery({"r": 2}, start="last_cut"), seen])
    assert shares(module) == {0.5}
    merged = module.net.eval()(tiny.tokens()).logits
    torch.testing.assert_close(merged, seen.seen[-1], rtol=1e-9, atol=1e-9)


def test_adapters_on_a_pruned_model_keep_its_zeros_without_being_told() -> None:
    module = pruned()
    fitting.fit(module, [LoRARecovery({"r": 2})])
    assert shares(module) == {0.5}
    filled = pruned()
    fitting.fit(filled, [LoRARecovery({"r": 2}, keep_zeros=False)])
    assert shares(filled) == {0.0}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"config": {"lora_dropout": 0.1}}, "lora.config.lora_dropout: 0.1, and a model"),
        ({"config": {"use_dora": True}}, "lora.config.use_dora: True, and a model"),
        ({"merge": False}, r"lora.merge: false, and 50.0 % zeros in the linears"),
    ],
)
def test_adapters_that_would_fill_zeros_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        fitting.fit(pruned(), [LoRARecovery(**settings)])


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_a_resumed_run_and_an_exported_checkpoint_keep_zeros_under_adapters(
    tmp_path: Path,
) -> None:
    base = fitting.saved(tmp_path / "base")
    values = fitting.run_values(base, tmp_path, steps=7, last_cut=4)
    values["prune"]["method"] = {"class_path": "plprune.methods.wanda.Wanda"}
    values["prune"]["budget"] = {"keep": 0.5, "base": "prunable"}
    values["lora"] = {"start": "last_cut", "config": {"r": 2}}
    values["export"] = {"directory": str(tmp_path / "model")}
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(values), encoding="utf-8")
    assert main(["fit", "--config", str(file)]) == 0
    whole = load_file(tmp_path / "model" / "model.safetensors")
    ckpt, again = tmp_path / "ckpt" / "step=5.ckpt", str(tmp_path / "again")
    command = ["fit", "--config", str(file), "--export.directory", again]
    assert main([*command, "--ckpt_path", str(ckpt)]) == 0
    resumed = load_file(tmp_path / "again" / "model.safetensors")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    out = str(tmp_path / "out")
    assert main(["export", "--ckpt_path", str(ckpt), "--out", out]) == 0
    exported = load_file(tmp_path / "out" / "model.safetensors")
    for tensors in (whole, exported):
        linears = [tensor for name, tensor in tensors.items() if "proj" in name]
        assert sum(int((t == 0).sum()) for t in linears) * 2 == sum(t.numel() for t in linears)
    assert any(not torch.equal(whole[name], exported[name]) for name in whole)
