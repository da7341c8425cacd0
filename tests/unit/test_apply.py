"""Surgery: what changes, what does not, and that a refused plan changes nothing."""

import copy
import dataclasses

import pytest
import torch
from torch import nn

import oracles
import tiny
from plprune import families
from plprune.count import count_params, tally
from plprune.describe import describe
from plprune.errors import PlanError
from plprune.plan import Mask, Plan, Write
from plprune.surgery.apply import apply

UP = "model.layers.0.mlp.up_proj"
DOWN = "model.layers.0.mlp.down_proj"


def edited(spec, *edits) -> Plan:
    return Plan(edits=edits, fingerprint=spec.fingerprint, method="test")


def snapshot(model: nn.Module) -> dict[str, tuple[int, torch.Tensor]]:
    return {
        name: (id(p), p.detach().clone())
        for name, p in model.named_parameters(remove_duplicate=False)
    }


def assert_untouched(model: nn.Module, before: dict[str, tuple[int, torch.Tensor]]) -> None:
    now = snapshot(model)
    assert now.keys() == before.keys()
    for name, (identity, value) in now.items():
        assert identity == before[name][0], name
        assert torch.equal(value, before[name][1]), name


def test_only_cut_parameters_are_replaced():
    model = tiny.model("llama-gqa-bias")
    spec = describe(model)
    oracles.gradients(model, tiny.tokens())
    before = dict(model.named_parameters())
    grads = {name: p.grad.clone() for name, p in before.items()}
    model.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
    applied = apply(model, oracles.plan_of(spec, {"layers.0.mlp": range(0, 40, 4)}), spec)
    assert {swap.name for swap in applied.swaps} == set(applied.table)
    assert set(applied.table) == {
        f"model.layers.0.mlp.{n}"
        for n in (
            "up_proj.weight",
            "up_proj.bias",
            "gate_proj.weight",
            "gate_proj.bias",
            "down_proj.weight",
        )
    }
    for name, new in model.named_parameters():
        assert (new is before[name]) == (name not in applied.table)
        assert new.requires_grad == before[name].requires_grad
        assert torch.equal(new.grad, oracles.kept_part(grads[name], applied.table.get(name, ()))[0])
        assert new.is_contiguous()
    mlp = model.model.layers[0].mlp
    assert (mlp.up_proj.out_features, mlp.up_proj.in_features, mlp.down_proj.in_features) == (
        10,
        48,
        10,
    )
    assert mlp.intermediate_size == 10


def test_counters_follow_and_unequal_widths_leave_the_config():
    model = tiny.model("llama-gqa")
    spec = describe(model)
    applied = apply(model, oracles.plan_of(spec, {"layers.0.query_in_group": [0, 2, 4]}), spec)
    assert [block.self_attn.num_key_value_groups for block in model.model.layers] == [1, 2]
    assert model.config.num_attention_heads == 6
    apply(
        model, oracles.plan_of(applied.spec, {"layers.1.query_in_group": [1, 3, 5]}), applied.spec
    )
    assert (
        model.config.num_attention_heads,
        model.config.num_key_value_heads,
        model.config.head_dim,
    ) == (3, 3, 8)


def test_phi3_blocks_get_their_own_config():
    model = tiny.model("phi3-gqa")
    spec = describe(model)
    apply(model, oracles.plan_of(spec, {"layers.0.kv_group": [1]}), spec)
    assert [layer.self_attn.config.num_attention_heads for layer in model.model.layers] == [2, 6]
    assert model.config.num_attention_heads == 6


def test_conv1d_model(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(families, "FAMILIES", (*families.FAMILIES, tiny.MICRO))
    model = tiny.micro()
    for seed in range(4):
        small, applied = oracles.assert_masked_equals_cut(
            model, oracles.random_plan(describe(model), seed)
        )
        assert tally(small, applied.spec).params == count_params(applied.spec)
        for block, dims in zip(small.h, applied.spec.blocks, strict=True):
            assert (block.c_fc.nf, block.c_proj.nx, block.attn.c_proj.nx) == (
                dims.ffn,
                dims.ffn,
                dims.heads * 8,
            )


@pytest.mark.parametrize("name", ["llama-gqa-bias", "micro"])
def test_write_then_mask_then_keep(name: str, monkeypatch: pytest.MonkeyPatch):
    """In one plan, in coordinates of the model before it, whatever the order of the edits."""
    monkeypatch.setattr(families, "FAMILIES", (*families.FAMILIES, tiny.MICRO))
    model = tiny.micro() if name == "micro" else tiny.model(name)
    spec = describe(model)
    up = "h.0.c_fc" if name == "micro" else UP
    weight = torch.randn(40, spec.hidden, dtype=torch.float64)
    bias, keep = torch.randn(40, dtype=torch.float64), torch.rand(40, spec.hidden) < 0.5
    units = torch.arange(1, 40, 3)
    edits = (oracles.plan_of(spec, {"layers.0.mlp": units}).edits[0], Mask(module=up, keep=keep),
             Write(module=up, weight=weight, bias=bias))  # fmt: skip
    for order in (edits, edits[::-1]):
        small = copy.deepcopy(model)
        apply(small, edited(spec, *order), spec)
        module = small.get_submodule(up)
        got = module.weight.T if name == "micro" else module.weight
        assert torch.equal(got, (weight * keep)[units])
        assert torch.equal(module.bias, bias[units])


def test_a_bias_where_there_was_none_is_counted():
    model = tiny.model("llama-gqa")
    spec = describe(model)
    bias = torch.randn(48, dtype=torch.float64)
    applied = apply(model, edited(spec, Write(module=DOWN, bias=bias)), spec)
    assert torch.equal(model.get_submodule(DOWN).bias, bias)
    assert applied.spec.linears[DOWN].bias
    assert (
        count_params(applied.spec).model
        == count_params(spec).model + 48
        == tally(model, applied.spec).params.model
    )


def test_shared_tensors_are_cut_once_and_stay_shared():
    model = tiny.model("llama-gqa")
    layers = model.model.layers
    for role in ("up_proj", "gate_proj", "down_proj"):
        getattr(layers[1].mlp, role).weight = getattr(layers[0].mlp, role).weight
    spec = describe(model)
    small, applied = oracles.assert_masked_equals_cut(
        model, oracles.plan_of(spec, {f"layers.{i}.mlp": range(7) for i in range(2)})
    )
    assert small.model.layers[0].mlp.up_proj.weight is small.model.layers[1].mlp.up_proj.weight
    assert len(applied.swaps) == 3
    before = snapshot(model)
    message = r"two modules share a tensor but lose different entries: given \S+ and \S+; fix: unt"
    for other in ({"layers.1.mlp": range(1, 8)}, {}):
        plan = oracles.plan_of(spec, {"layers.0.mlp": range(7)} | other)
        with pytest.raises(PlanError, match=message):
            apply(model, plan, spec)
        assert_untouched(model, before)


def test_tied_embedding_survives_byte_for_byte():
    for name in ("llama-gqa-tied", "opt-mha-tied", "gemma3-gqa-tied"):
        model = tiny.model(name)
        weight = model.get_input_embeddings().weight
        before = weight.detach().clone()
        spec = describe(model)
        for seed in range(2):
            spec = apply(model, oracles.random_plan(spec, seed), spec).spec
        assert model.get_input_embeddings().weight is model.get_output_embeddings().weight is weight
        assert torch.equal(weight, before)
        assert tally(model, spec).params.model == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("edits", "message"),
    [
        (
            (Write(module="model.nowhere", bias=torch.ones(2)),),
            r"cannot edit model.nowhere: given no such linear",
        ),
        (
            (Write(module=UP, weight=torch.ones(48, 40)),),
            r"cannot edit \S+up_proj: given weight of shape \(48, 40\); all",
        ),
        (
            (Write(module=UP, bias=torch.ones(1)),),
            r"cannot edit \S+up_proj: given bias of shape \(1,\); allowed \(40,\)",
        ),
        (
            (Mask(module=UP, keep=torch.ones(40, 1)),),
            r"cannot edit \S+up_proj: given keep of shape \(40, 1\); allowed",
        ),
    ],
)
def test_edits_that_do_not_fit(edits: tuple, message: str):
    model = tiny.model("llama-gqa")
    spec, before = describe(model), snapshot(model)
    good = Write(module=DOWN, weight=torch.zeros(48, 40))
    with pytest.raises(PlanError, match=message):
        apply(model, edited(spec, good, *edits), spec)
    assert_untouched(model, before)


def test_a_refused_plan_changes_nothing():
    model = tiny.model("llama-gqa")
    spec, before = describe(model), snapshot(model)
    good = Write(module=DOWN, weight=torch.zeros(48, 40))
    bad = [
        edited(spec, good, *oracles.plan_of(spec, {"layers.0.mlp": [41]}).edits),
        edited(spec, good, *oracles.plan_of(spec, {"layers.0.query_in_group": [0]}).edits),
        dataclasses.replace(edited(spec, good), fingerprint="x"),
    ]
    for plan in bad:
        with pytest.raises(PlanError):
            apply(model, plan, spec)
        assert_untouched(model, before)
