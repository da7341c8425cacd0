"""LoRA on a plain model: inject, merge, save, load."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

import tiny
from oracles import close, random_plan
from plprune.describe import describe
from plprune.errors import ConfigError, ExportError, StructureError
from plprune.lora import any_adapter, any_dora, inject, merge
from plprune.lora_config import target_modules
from plprune.lora_files import load_adapter, save_adapter
from plprune.surgery.apply import apply


def trained(name: str, config: dict[str, Any]) -> tuple[Any, Any]:
    """A model whose adapters do something."""
    model = tiny.model(name)
    torch.manual_seed(3)  # peft draws the first factors
    injected = inject(model, config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lora_" in key:
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.add_(0.2 * noise)
    return model, injected


@pytest.mark.parametrize("name", tiny.ONE_PER_FAMILY)
@pytest.mark.parametrize("config", [{"r": 2}, {"r": 2, "use_dora": True}])
def test_cut_then_merged_is_merged_then_cut(name: str, config: dict[str, Any]) -> None:
    one, injected = trained(name, config)
    other, second = trained(name, config)
    assert any_dora(one) is bool(config.get("use_dora"))
    ids = tiny.tokens()
    spec = describe(one)
    plan = random_plan(spec, 2, ("kv_group",))
    apply(one, plan, spec)
    before = one(ids).logits
    merge(injected)
    assert not any_adapter(one)
    close(one(ids).logits, before)
    # DoRA scales rows by norms of all columns: only rows may go for the two orders to agree.
    if "use_dora" not in config:
        merge(second)
        apply(other, plan, describe(other))
        close(one.state_dict(), other.state_dict())


def test_trainable_is_what_it_was() -> None:
    model = tiny.model()
    model.model.norm.weight.requires_grad_(False)
    before = {name for name, p in model.named_parameters() if p.requires_grad}
    injected = inject(model, {"r": 2})
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        name for name in model.state_dict() if "lora_" in name
    }
    merge(injected)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == before


def test_default_targets_are_all_linears_of_a_block() -> None:
    assert target_modules(tiny.model("llama-gqa")) == sorted(
        f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")
    )
    assert target_modules(tiny.model("phi3-gqa")) == [
        "down_proj",
        "gate_up_proj",
        "o_proj",
        "qkv_proj",
    ]


@pytest.mark.parametrize(
    "config", [{"r": 2}, {"r": 2, "use_dora": True, "lora_alpha": 5}, {"r": 3, "lora_bias": True}]
)
def test_saved_is_loaded(config: dict[str, Any], tmp_path: Path) -> None:
    model, injected = trained("llama-gqa-bias", config)
    spec = describe(model)
    apply(model, random_plan(spec, 2), spec)
    save_adapter(injected, tmp_path / "a", describe(model))
    again = tiny.model("llama-gqa-bias")
    apply(again, random_plan(spec, 2), describe(again))
    load_adapter(again, tmp_path / "a", describe(again))
    close(again(tiny.tokens()).logits, model(tiny.tokens()).logits)
    assert all(
        "plprune" not in key
        for key in json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    )
    with safe_open(tmp_path / "a" / "adapter_model.safetensors", framework="pt") as file:
        assert set(file.metadata()) == {"format", "plprune_structure"}
    with pytest.raises(ExportError, match="the adapter directory exists"):
        save_adapter(injected, tmp_path / "a", describe(model))
    save_adapter(injected, tmp_path / "a", describe(model), overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_damaged_adapters_are_refused(tmp_path: Path) -> None:
    model, injected = trained("llama-gqa", {"r": 2})
    folder = save_adapter(injected, tmp_path / "a", describe(model))
    file = folder / "adapter_model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-40])
    with pytest.raises(StructureError, match="not a readable adapter: given"):
        load_adapter(tiny.model(), folder, describe(model))
    file.unlink()
    with pytest.raises(StructureError, match="not a readable adapter: given"):
        load_adapter(tiny.model(), folder, describe(model))


def test_adapters_that_are_not_finite_are_not_saved(tmp_path: Path) -> None:
    model, injected = trained("llama-gqa", {"r": 2})
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.lora_A["default"].weight[0, 0] = float("nan")
    with pytest.raises(
        ExportError, match="adapter tensor is empty or not finite: given base_model"
    ):
        save_adapter(injected, tmp_path / "a", describe(model))
    assert list(tmp_path.iterdir()) == []


def test_adapters_of_another_structure_are_refused(tmp_path: Path) -> None:
    model = tiny.model()
    injected = inject(model, {"r": 2})
    save_adapter(injected, tmp_path / "a", describe(model))
    other = tiny.model(intermediate_size=36)
    with pytest.raises(StructureError) as caught:
        load_adapter(other, tmp_path / "a", describe(other))
    message = str(caught.value)
    assert message.startswith("the adapter belongs to another structure: given structure ")
    assert message.endswith(
        "the model in memory; fix: load the pruned model this adapter was trained on"
    )
    assert not any_adapter(other)


def test_a_merge_that_is_not_finite_is_refused_and_leaves_the_adapters() -> None:
    model = tiny.model()
    injected = inject(model, {"r": 2})
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.lora_B["default"].weight[3, 1] = float("inf")
    with pytest.raises(ExportError) as caught:
        merge(injected)
    assert str(caught.value) == (
        "cannot merge adapters: given NaN or infinity in model.layers.1.mlp.up_proj; allowed "
        "finite factors"
    )
    assert any_adapter(model)


def test_two_injections_are_refused() -> None:
    model = tiny.model()
    inject(model, {})
    with pytest.raises(
        ConfigError, match="the model has LoRA adapters already: given two injections"
    ):
        inject(model, {})
