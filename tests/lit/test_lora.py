"""LoRA between and after cuts: same losses masked or cut, merged, saved for peft alone."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fitting
import tiny
from fitting import User, fit, gap, hashes, prune, weights
from oracles import close
from plprune.callbacks import ExportHF, LoRARecovery
from plprune.describe import describe
from plprune.errors import ConfigError
from plprune.lit import guard
from plprune.lora import any_adapter
from plprune.lora_files import load_adapter
from plprune.surgery import apply
from tiny_tokenizer import tiny_tokenizer

ADAPTERS: dict[str, dict[str, Any]] = {
    "plain": {"r": 3},
    "dora": {"r": 3, "use_dora": True},
    "bias": {"r": 2, "lora_bias": True, "use_rslora": True},
    "some": {"r": 2, "target_modules": ["down_proj", "v_proj"], "rank_pattern": {"v_proj": 4}},
}


@pytest.mark.parametrize("start", ["fit", "last_cut"])
@pytest.mark.parametrize("name", ADAPTERS)
def test_masked_is_cut_with_adapters(name: str, start: Any) -> None:
    made = []
    # DoRA from the start is not trained on masked units, see below.
    for commit in ("every", 1 if (name, start) == ("dora", "fit") else "last"):
        torch.manual_seed(1)
        module, pruner = User(variant="llama-gqa-bias"), prune(commit=commit)
        trainable: list[int] = []
        probe = fitting.Probe(lambda _, m, seen=trainable: seen.append(trained(m)))
        fit(module, [pruner, LoRARecovery(ADAPTERS[name], start=start), probe])
        made.append((module, hashes(pruner)))
        # Plain again: no wrapper, no adapter tensor, everything trainable as before.
        assert not any_adapter(module)
        assert all(type(m) is nn.Linear for m in module.modules() if isinstance(m, nn.Linear))
        assert all(p.requires_grad for p in module.parameters())
        assert not any("lora" in key for key in module.state_dict())
        dense = len(list(module.parameters()))
        if start == "fit":
            assert len(set(trainable)) == 1
        else:
            assert trainable[:8] == [dense] * 8
        assert trainable[-1] != dense
    (now, one), (later, other) = made
    assert one == other
    assert gap(now.losses, later.losses) < 1e-9
    close(weights(now), weights(later))


def trained(module: nn.Module) -> int:
    """Number of trainable parameters."""
    return sum(p.requires_grad for p in module.parameters())


def test_dora_is_not_trained_on_masked_units() -> None:
    with pytest.raises(ConfigError) as caught:
        fit(User(), [prune(commit=2), LoRARecovery({"use_dora": True})])
    assert str(caught.value) == (
        "DoRA adapters cannot train on masked units: given use_dora: true, and cuts that are only "
        "masked; allowed smaller tensors at every cut: DoRA scales by a norm over all columns, "
        "masked or not; fix: set prune.commit: every"
    )


def test_dora_goes_through_cuts(monkeypatch: pytest.MonkeyPatch) -> None:
    compared = []
    monkeypatch.setattr(
        guard, "require_close", lambda masked, cut, _: compared.append((masked, cut))
    )
    fit(User(), [prune(), LoRARecovery({"r": 3, "use_dora": True})])
    assert len(compared) == 3
    assert all(abs(masked - cut) < 1e-12 for masked, cut in compared)
    # Without the rescaled magnitudes the function changes.
    monkeypatch.setattr(apply, "_rescale_dora", lambda *_: None)
    fit(User(), [prune(), LoRARecovery({"r": 3, "use_dora": True})])
    assert max(abs(masked - cut) for masked, cut in compared[3:]) > 1e-4


def test_frozen_parameters_stay_frozen_after_the_merge() -> None:
    module = User(
        optimizers=lambda m: torch.optim.SGD(
            [p for p in m.parameters() if p.requires_grad], lr=0.01
        )
    )
    module.net.model.embed_tokens.requires_grad_(False)
    before = weights(module)
    fit(module, [prune(), LoRARecovery({"r": 2}, start="last_cut")])
    frozen = [name for name, p in module.named_parameters() if not p.requires_grad]
    assert frozen == ["policy.model.embed_tokens.weight"]
    assert torch.equal(before[frozen[0]], weights(module)[frozen[0]])


def test_gradients_of_frozen_weights_are_freed() -> None:
    module = User()
    found = []
    probe = fitting.Probe(
        lambda _, m: found.append(
            sum(p.grad is not None for p in m.parameters() if not p.requires_grad)
        )
    )
    fit(module, [prune(), LoRARecovery({"r": 2}, start="last_cut"), probe])
    assert found[-1] == 0


def test_adapters_train_and_the_merge_keeps_the_function() -> None:
    torch.manual_seed(1)
    merged, kept = User(), User()
    for module, merging in ((merged, True), (kept, False)):
        torch.manual_seed(1)
        fit(module, [prune(), LoRARecovery({"r": 2}, merge=merging)])
    assert any_adapter(kept)
    assert merged.losses == kept.losses
    ids = tiny.tokens()
    close(merged.net.eval()(ids).logits, kept.net.eval()(ids).logits)


# --- saved adapters ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["plain", "dora"])
def test_saved_adapters_load_with_peft_alone(name: str, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    module, pruner = User(dtype=torch.float32), prune()
    adapters, pruned = tmp_path / "adapters", tmp_path / "pruned"
    bases: list[Any] = []

    def before(trainer: Any, _: Any) -> None:
        if trainer.global_step == 12:
            bases.append(_plain(module.net))

    fit(
        module,
        [prune(), LoRARecovery(ADAPTERS[name], adapter_dir=str(adapters)), fitting.Probe(before)],
    )
    bases[0].save_pretrained(pruned)
    base = AutoModelForCausalLM.from_pretrained(pruned)
    found = PeftModel.from_pretrained(base, adapters).eval()
    ids = tiny.tokens()
    with torch.no_grad():
        torch.testing.assert_close(
            found(ids).logits, module.net.eval()(ids).logits, rtol=1e-4, atol=1e-4
        )
        assert not torch.allclose(bases[0].eval()(ids).logits, module.net(ids).logits, atol=1e-3)
    again = bases[0]
    load_adapter(again, adapters, describe(again))
    with torch.no_grad():
        torch.testing.assert_close(
            again.eval()(ids).logits, found(ids).logits, rtol=1e-4, atol=1e-4
        )
    del pruner


def _plain(model: Any) -> Any:
    """The same model without its adapters."""
    from transformers import LlamaForCausalLM

    made = LlamaForCausalLM(model.config)
    state = {
        name.replace(".base_layer", ""): value
        for name, value in model.state_dict().items()
        if "lora_" not in name
    }
    made.load_state_dict(state)
    return made


def test_exports_of_a_run_with_adapters_are_plain(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    tiny_tokenizer(tmp_path / "tok")
    module = User(dtype=torch.float32)
    export = ExportHF(str(tmp_path / "out"), tokenizer=str(tmp_path / "tok"))
    fit(module, [prune(), LoRARecovery({"r": 2}), export])
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    ids = tiny.tokens()
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, module.net.eval()(ids).logits)
    assert export.written == tmp_path / "out"


@pytest.mark.parametrize("name", ["plain", "dora"])
def test_adapters_that_are_not_merged_are_exported_beside_their_base(
    name: str, tmp_path: Path
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    module, out = User(dtype=torch.float32), tmp_path / "out"
    export = ExportHF(str(out), tokenizer="none")
    fit(module, [prune(), LoRARecovery(ADAPTERS[name], merge=False), export])
    base = AutoModelForCausalLM.from_pretrained(out).eval()
    ids = tiny.tokens()
    with torch.no_grad():
        expected = module.net.eval()(ids).logits
        assert not torch.allclose(base(ids).logits, expected, atol=1e-3)
        found = PeftModel.from_pretrained(base, out / "adapter").eval()
        torch.testing.assert_close(found(ids).logits, expected, rtol=1e-4, atol=1e-4)
    assert "`adapter/`" in (out / "README.md").read_text()


@pytest.mark.parametrize("wrong", [{"rank": 3}, {"r": 0}, {"target_modules": ["nowhere"]}])
def test_what_peft_refuses_is_passed_on(wrong: dict[str, Any]) -> None:
    with pytest.raises(
        ConfigError, match=r"peft refused the LoRA config: .* fix: see peft\.LoraConfig"
    ):
        fit(User(), [LoRARecovery(wrong)])
