"""Whole sublayers removed: masked is cut, counts are those of the tensors, caches count tokens."""

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import oracles
import tiny
from plprune.budget import Budget
from plprune.compensate import MeanBias
from plprune.count import count_flops, count_params, kv_cache_bytes, tally
from plprune.describe import describe
from plprune.drivers.compensated import Compensated
from plprune.errors import ConfigError, FamilyError, PlanError, StructureError
from plprune.export import save_hf
from plprune.load import load_hf
from plprune.masks import LogicalMasks
from plprune.methods.depth import Depth
from plprune.methods.flap import FLAP
from plprune.methods.transact import TransAct
from plprune.plan import Plan
from plprune.spec import Spec
from plprune.surgery import removal
from plprune.surgery.apply import apply
from plprune.surgery.lower import lower
from plprune.surgery.rebuild import plan_for, rebuild, structure_of
from plprune.surgery.state import slice_optimizer
from plprune.unwrap import family_of

A, M = "attention_sublayer", "mlp_sublayer"
REMOVED: dict[str, list[str]] = {
    "attention of the first": [f"layers.0.{A}"],
    "attention of the last": [f"layers.1.{A}"],
    "MLP": [f"layers.0.{M}"],
    "one of each": [f"layers.0.{M}", f"layers.1.{A}"],
    "block": [f"layers.1.{A}", f"layers.1.{M}"],
    "all but one attention": [f"layers.0.{A}", f"layers.0.{M}", f"layers.1.{M}"],
}
every_removal = pytest.mark.parametrize("names", REMOVED.values(), ids=list(REMOVED))
every_family = pytest.mark.parametrize("variant", tiny.ONE_PER_FAMILY)
EMPTY = torch.zeros(0, dtype=torch.int64)


def without(spec: Spec, names: Sequence[str], **kept: Sequence[int]) -> Plan:
    widths = {name.replace("__", "."): units for name, units in kept.items()}
    return oracles.plan_of(spec, {**dict.fromkeys(names, EMPTY), **widths})


def cut(model: nn.Module, names: Sequence[str]) -> tuple[nn.Module, Spec]:
    small = copy.deepcopy(model)
    spec = describe(small)
    return small, apply(small, without(spec, names), spec).spec


@pytest.mark.parametrize("variant", list(tiny.VARIANTS))
@every_removal
def test_masked_is_cut(variant: str, names: list[str]):
    model = tiny.model(variant)
    spec = describe(model)
    plan = without(spec, names)
    small, applied = oracles.assert_masked_equals_cut(model, plan)
    assert set(applied.gone) == {n for n, _ in model.named_parameters()} - {
        n for n, _ in small.named_parameters()
    }
    masked = spec.cut(lower(plan, spec), physical=False)
    masks = LogicalMasks()
    masks.attach(model, masked)
    oracles.close(model(tiny.tokens()).logits, small(tiny.tokens()).logits)
    masks.remove()
    # Masked, cut at once, and masked then cut: one model.
    later = masked.cut({}, physical=True)
    assert masked.fingerprint == applied.spec.fingerprint == later.fingerprint != spec.fingerprint
    assert masked.blocks == applied.spec.blocks == describe(small).blocks
    assert masked.structure() == applied.spec.structure() == {key: [] for key in names}


@pytest.mark.parametrize("variant", list(tiny.VARIANTS))
@every_removal
def test_counts_are_those_of_the_tensors(variant: str, names: list[str]):
    model = tiny.model(variant)
    spec = describe(model)
    small, after = cut(model, names)
    masked = spec.cut(lower(without(spec, names), spec), physical=False)
    real = sum(parameter.numel() for parameter in small.parameters())
    sizes = dict.fromkeys(names, 0)
    assert count_params(spec).model == sum(p.numel() for p in model.parameters())
    for one in (count_params(after), count_params(masked), count_params(spec, sizes)):
        assert one == tally(small, after).params == tally(model, masked).params
        assert one.model == real
    for count in (count_flops, kv_cache_bytes):
        assert count(after) == count(masked) == count(spec, sizes)


@every_family
@every_removal
def test_a_cache_changes_nothing(variant: str, names: list[str]):
    small, _ = cut(tiny.model(variant), names)
    ids = tiny.tokens(2, 16)
    first = small(ids[:, :7], use_cache=True)
    second = small(ids[:, 7:], past_key_values=first.past_key_values, use_cache=True)
    oracles.close(second.logits, small(ids, use_cache=False).logits[:, 7:])
    assert first.past_key_values.get_seq_length() == 16


TYPES = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]


@pytest.mark.parametrize("gone", [[0], [1], [0, 1], [0, 2], [1, 3], [0, 1, 2], [1, 2, 3]])
def test_sliding_and_full_layers_keep_their_kind_of_cache(gone: list[int]):
    model = tiny.model("gemma3-mqa", num_hidden_layers=4, layer_types=TYPES)
    small, _ = cut(model, [f"layers.{n}.{A}" for n in gone])
    ids = tiny.tokens(1, 16)
    first = small(ids[:, :9], use_cache=True)
    second = small(ids[:, 9:], past_key_values=first.past_key_values, use_cache=True)
    oracles.close(second.logits, small(ids, use_cache=False).logits[:, 9:])
    left = [layer for layer in small.model.layers if hasattr(layer.self_attn, "layer_idx")]
    caches = first.past_key_values.layers
    for layer in left:
        number = layer.self_attn.layer_idx
        assert caches[number].is_sliding == layer.self_attn.is_sliding


def test_layers_that_are_not_renumbered_are_noticed(monkeypatch: pytest.MonkeyPatch):
    """Negative control: a cache whose first layer is never filled counts no tokens."""
    from plprune.surgery import apply as surgery

    monkeypatch.setattr(surgery, "renumber", lambda *_: None)
    small, _ = cut(tiny.model(), [f"layers.0.{A}"])
    ids = tiny.tokens(2, 16)
    first = small(ids[:, :7], use_cache=True)
    second = small(ids[:, 7:], past_key_values=first.past_key_values, use_cache=True)
    assert (second.logits - small(ids, use_cache=False).logits[:, 7:]).abs().max() > 1e-3


def test_a_bias_that_stays_is_noticed(monkeypatch: pytest.MonkeyPatch):
    """Negative control: without inputs a linear still adds its bias."""
    from plprune import masks as module

    monkeypatch.setattr(module, "_silent", lambda _, args, out: out)
    model = tiny.model("llama-gqa-bias")
    spec = describe(model)
    plan = without(spec, [f"layers.0.{A}"])
    small, _ = cut(model, [f"layers.0.{A}"])
    masks = LogicalMasks()
    masks.attach(model, spec.cut(lower(plan, spec), physical=False))
    assert (model(tiny.tokens()).logits - small(tiny.tokens()).logits).abs().max() > 1e-3
    masks.remove()


def test_a_silenced_sublayer_stays_in_the_graph():
    """DDP waits for the gradient of every parameter; it is zero."""
    model = tiny.model("gemma3-gqa-tied")
    spec = describe(model)
    masks = LogicalMasks()
    masks.attach(model, spec.cut(lower(without(spec, REMOVED["block"]), spec), physical=False))
    oracles.loss_of(model, tiny.tokens()).backward()
    masks.remove()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert all(gradient is not None for gradient in gradients.values())
    assert not any(gradients[n].any() for n in gradients if n.startswith("model.layers.1."))
    assert all(gradients[n].any() for n in gradients if n.startswith("model.layers.0."))


@every_removal
def test_structure_round_trip(names: list[str]):
    model = tiny.model("phi3-gqa")
    dense = describe(model)
    small, after = cut(model, names)
    structure = json.loads(json.dumps(structure_of(after, dense)))
    again = tiny.model("phi3-gqa", seed=1)
    rebuild(again, structure)
    again.load_state_dict(small.state_dict())
    assert torch.equal(again(tiny.tokens()).logits, small(tiny.tokens()).logits)
    structure["kept"]["layers.0.mlp"] = []
    with pytest.raises(StructureError, match=r"layers\.0\.mlp"):
        plan_for(structure, dense)


def test_widths_and_depth_in_one_plan_and_one_after_the_other():
    model = tiny.model("qwen3-gqa", num_hidden_layers=3)
    spec = describe(model)
    plan = without(
        spec, [f"layers.1.{A}"], layers__0__kv_group=[0, 2], layers__1__mlp=[*range(8)],
        layers__1__kv_group=[1],
    )  # fmt: skip
    small, applied = oracles.assert_masked_equals_cut(model, plan)
    assert "layers.1.kv_group" not in applied.spec.structure()  # follows from its sublayer
    other = copy.deepcopy(model)
    one = apply(other, oracles.plan_of(spec, {"layers.0.kv_group": [0, 2]}), spec).spec
    two = apply(other, without(one, [f"layers.1.{A}"]), one).spec
    last = apply(other, oracles.plan_of(two, {"layers.1.mlp": [*range(8)]}), two).spec
    assert last.fingerprint == applied.spec.fingerprint
    assert all(
        torch.equal(p, dict(other.named_parameters())[n]) for n, p in small.named_parameters()
    )


@pytest.mark.parametrize("method", [TransAct(), FLAP()])
def test_a_model_with_gaps_is_cut_in_width(method: Any):
    model, _ = cut(
        tiny.model("llama-gqa-bias", num_hidden_layers=4), [f"layers.1.{A}", f"layers.2.{M}"]
    )
    spec = describe(model)
    budget = Budget(keep=0.6, base="prunable", multiple_of={"mlp": 4})
    plan = oracles.plan_by(method, model, budget)
    small, applied = oracles.assert_masked_equals_cut(model, plan)
    real = sum(p.numel() for n, p in small.named_parameters() if "proj" in n)
    assert count_params(applied.spec).prunable == real <= 0.6 * count_params(spec).prunable
    assert applied.spec.widths()["kv_group"][1] == applied.spec.widths()["mlp"][2] == 0


def test_what_is_removed_is_not_removed_again():
    model, spec = cut(tiny.model(), [f"layers.0.{M}"])
    for again in (spec, describe(model)):
        with pytest.raises(PlanError, match="not valid"):
            lower(without(again, [f"layers.0.{M}"]), again)
    with pytest.raises(PlanError, match="not valid"):
        lower(oracles.plan_of(spec, {"layers.1.mlp": EMPTY}), spec)


def test_a_dense_fingerprint_says_nothing_of_sublayers(monkeypatch: pytest.MonkeyPatch):
    """Structures written before sublayers could go still fit."""
    spec = describe(tiny.meta("llama-gqa"))
    assert spec.fingerprint == "05609c7c27e17601"


def test_norms_on_the_residual_stream_stay():
    model = tiny.model("opt-mha", do_layer_norm_before=False)
    assert not describe(model).of_kind(A)
    with pytest.raises(FamilyError, match="cannot be removed"):
        Depth().taps(describe(model))


def test_an_optimizer_forgets_what_is_gone():
    model = tiny.model()
    named = dict(model.named_parameters())
    groups = [{"params": [p]} for p in named.values()]
    optimizer = torch.optim.AdamW(groups, lr=0.1)
    oracles.loss_of(model, tiny.tokens()).backward()
    optimizer.step()
    spec = describe(model)
    applied = apply(model, without(spec, [f"layers.0.{A}"]), spec)
    slice_optimizer(optimizer, applied.swaps, gone=applied.gone.values())
    held = {p for group in optimizer.param_groups for p in group["params"]}
    assert held == set(optimizer.state) == set(model.parameters())
    assert len(optimizer.param_groups) == len(named)  # schedulers count them


def test_skipped_is_removed_and_put_back():
    model = tiny.model("gemma3-gqa-tied")  # whose norms have forwards of their own here
    spec, before = describe(model), model(tiny.tokens()).logits
    for names in REMOVED.values():
        small, _ = cut(model, names)
        with removal.skipped(model, family_of(model), [spec.axes[n] for n in names]):
            assert torch.equal(model(tiny.tokens()).logits, small(tiny.tokens()).logits)
    assert torch.equal(model(tiny.tokens()).logits, before)


def test_there_is_nothing_to_compensate():
    with pytest.raises(ConfigError, match="nothing to compensate"):
        Compensated(method=Depth(), compensation=MeanBias())


# --- export --------------------------------------------------------------------------------------


def exported(model: nn.Module, names: Sequence[str], folder: Path) -> tuple[Path, nn.Module]:
    dense = describe(model)
    small, after = cut(model, names)
    return save_hf(small, folder, spec=after, structure=structure_of(after, dense)), small


@every_family
@every_removal
def test_exports_load_and_generate(variant: str, names: list[str], tmp_path: Path):
    model = tiny.model(variant, dtype=torch.float32, num_hidden_layers=3, **types_of(variant))
    folder, small = exported(model, names, tmp_path / "out")
    custom = (folder / "modeling_plprune.py").is_file()
    assert custom == (names is not REMOVED["block"])
    again = load_hf(folder, trust_remote_code=custom)
    # A block of which nothing is left is not in the files.
    layers = 3 - (names in (REMOVED["block"], REMOVED["all but one attention"]))
    assert again.config.num_hidden_layers == layers
    ids = tiny.tokens(2, 9)
    torch.testing.assert_close(
        again(ids, use_cache=False).logits, small(ids, use_cache=False).logits
    )
    with_cache, without_cache = (
        again.generate(ids, max_new_tokens=8, do_sample=False, use_cache=use)
        for use in (True, False)
    )
    assert torch.equal(with_cache, without_cache)
    assert count_params(describe(again)).model == sum(p.numel() for p in small.parameters())


def types_of(variant: str) -> dict[str, Any]:
    return {"layer_types": TYPES[:3]} if variant.startswith("gemma3") else {}


@pytest.mark.parametrize("names", [REMOVED["block"], REMOVED["one of each"]])
def test_an_export_is_pruned_again(names: list[str], tmp_path: Path):
    model = tiny.model("llama-gqa", dtype=torch.float32, num_hidden_layers=4)
    first, _ = exported(model, names, tmp_path / "one")
    parent = load_hf(first, trust_remote_code=True)
    spec = describe(parent)
    plan = oracles.plan_by(Depth(), parent, Budget(keep=0.7, base="blocks"))
    applied = apply(parent, plan, spec)
    second = save_hf(
        parent, tmp_path / "two", spec=applied.spec, structure=structure_of(applied.spec, spec)
    )
    again = load_hf(second, trust_remote_code=True)
    torch.testing.assert_close(again(tiny.tokens()).logits, parent(tiny.tokens()).logits)
    sidecar = json.loads((second / "plprune_structure.json").read_text("utf-8"))
    assert sidecar["parents"][0]["kept"] == {key: [] for key in names}
