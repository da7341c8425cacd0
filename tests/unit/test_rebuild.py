"""Structure as plain values: from a pruned model, through JSON, to a dense one."""

import copy
import json

import pytest
import torch

import oracles
import tiny
from plprune.describe import describe
from plprune.errors import PlanError, StructureError
from plprune.surgery.apply import apply
from plprune.surgery.rebuild import plan_for, rebuild, structure_of


def pruned(name: str = "llama-gqa", seeds: tuple[int, ...] = (0,)):
    model = tiny.model(name)
    dense = spec = describe(model)
    for seed in seeds:
        spec = apply(model, oracles.random_plan(spec, seed), spec).spec
    return model, json.loads(json.dumps(structure_of(spec, dense)))


def test_structure_is_readable():
    model = tiny.model()
    dense = describe(model)
    spec = apply(model, oracles.plan_of(dense, {"layers.0.kv_group": [0, 2]}), dense).spec
    structure = structure_of(spec, dense)
    assert structure["kept"] == {
        "layers.0.kv_group": [0, 2],
        "layers.0.query_in_group": [0, 1, 4, 5],
    }
    assert structure["dense_blocks"][0] == {"heads": 6, "kv_heads": 3, "head_dim": 8, "ffn": 40}
    assert structure["blocks"][0] == {"heads": 4, "kv_heads": 2, "head_dim": 8, "ffn": 40}
    assert (structure["format"], structure["family"]) == (1, "llama")


@pytest.mark.parametrize("name", tiny.GQA)
def test_crossing_axes_compose_over_two_cuts(name: str):
    """Cut twice = the final structure applied once to the dense model, weights included."""
    for seeds in ((0, 1), (2, 3), (4, 5, 6)):
        model, structure = pruned(name, seeds)
        once = tiny.model(name)
        applied = rebuild(once, structure)
        assert structure_of(applied.spec, describe(tiny.meta(name)))["kept"] == structure["kept"]
        assert torch.equal(once(tiny.tokens()).logits, model(tiny.tokens()).logits)


def test_loaded_weights_give_the_same_logits_on_real_and_meta():
    model, structure = pruned("qwen2-gqa", (0, 1))
    state, ids = copy.deepcopy(model.state_dict()), tiny.tokens()
    other = tiny.model("qwen2-gqa", seed=5)
    rebuild(other, structure)
    other.load_state_dict(state)
    assert torch.equal(other(ids).logits, model(ids).logits)
    meta = tiny.meta("qwen2-gqa")
    rebuild(meta, structure)
    assert {n: p.shape for n, p in meta.state_dict().items()} == {
        n: p.shape for n, p in state.items()
    }
    assert all(p.is_meta for p in meta.parameters())
    # Buffers that are no part of a state dict (rotary frequencies) come from a real model.
    for path, buffer in other.named_buffers():
        owner, _, leaf = path.rpartition(".")
        meta.get_submodule(owner)._buffers[leaf] = buffer
    meta.load_state_dict(state, assign=True)
    assert torch.equal(meta.eval()(ids).logits, model(ids).logits)


def test_a_dense_structure_changes_nothing():
    model = tiny.model()
    spec = describe(model)
    assert rebuild(model, structure_of(spec, spec)).swaps == ()
    assert plan_for(structure_of(spec, spec), spec).empty


MLP = "layers.0.mlp"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda s: s.pop("format"),
            r"not a plprune structure: given missing 'format'; allowed a dict written by plprune",
        ),
        (lambda s: s.pop("kept"), r"not a plprune structure: given missing 'kept'"),
        (lambda s: s.pop("fingerprint"), r"not a plprune structure: given missing 'fingerprint'"),
        (lambda s: s.update(kept=[1]), r"not a plprune structure"),
        (
            lambda s: s.update(format=2),
            r"unknown structure format: given 2; allowed 1; fix: update plprune",
        ),
        (
            lambda s: s.update(dense_fingerprint="0"),
            r"belongs to another base model: given dense fingerprint 0 \(2 blo",
        ),
        (
            lambda s: s.update(dense_fingerprint="0", dense_blocks=[{}]),
            r"belongs to another base model",
        ),
        (
            lambda s: s["kept"].update({"layers.7.mlp": [0]}),
            r"damaged structure at axis layers.7.mlp: given 1 kept units",
        ),
        (
            lambda s: s["kept"].update({MLP: []}),
            r"damaged structure at axis layers.0.mlp: given 0 kept units; allowed asc",
        ),
        (lambda s: s["kept"].update({MLP: [2, 1]}), r"damaged structure at axis layers.0.mlp"),
        (lambda s: s["kept"].update({MLP: [1, 1]}), r"damaged structure at axis layers.0.mlp"),
        (lambda s: s["kept"].update({MLP: [1, 40]}), r"damaged structure at axis layers.0.mlp"),
        (lambda s: s["kept"].update({MLP: [-1, 3]}), r"damaged structure at axis layers.0.mlp"),
        (lambda s: s["kept"].update({MLP: [0.5, 3]}), r"damaged structure at axis layers.0.mlp"),
        (lambda s: s["kept"].update({MLP: 3}), r"damaged structure at axis layers.0.mlp"),
        (
            lambda s: s["kept"][MLP].pop(),
            r"damaged structure: given fingerprint \w+; allowed \w+, what its kept units",
        ),
        (
            lambda s: s.update(fingerprint="0"),
            r"damaged structure: given fingerprint 0; allowed \w+, what its kept units",
        ),
    ],
)
def test_damage_is_refused_before_anything_is_cut(damage, message: str):
    _, structure = pruned()
    damage(structure)
    model = tiny.model()
    shapes = {name: p.shape for name, p in model.named_parameters()}
    with pytest.raises(StructureError, match=message):
        rebuild(model, structure)
    assert {name: p.shape for name, p in model.named_parameters()} == shapes


def test_uneven_groups_in_a_structure():
    _, structure = pruned("llama-gqa")
    structure["kept"] = {"layers.0.query_in_group": [0, 1, 2]}
    with pytest.raises((StructureError, PlanError), match="uneven groups"):
        rebuild(tiny.model("llama-gqa"), structure)


def test_the_structure_of_another_size():
    _, structure = pruned("llama-gqa")
    with pytest.raises(
        StructureError,
        match=r"\(2 blocks of 6/3 heads, FFN 40\); allowed \w+ \(2 blocks of 6/6 heads",
    ):
        rebuild(tiny.model("llama-mha"), structure)
