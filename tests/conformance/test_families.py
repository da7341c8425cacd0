"""What holds for every architecture: masked = cut, tensors = arithmetic, generation works.

Families are collected from `plprune.families`; a new one must come with variants in `tiny.py`.
"""

import copy
import json

import pytest
import torch

import oracles
import tiny
from plprune.count import count_params, tally
from plprune.describe import describe
from plprune.families import FAMILIES
from plprune.surgery.apply import apply, commit
from plprune.surgery.lower import lower
from plprune.surgery.rebuild import rebuild, structure_of

every_variant = pytest.mark.parametrize("name", list(tiny.VARIANTS))
every_family = pytest.mark.parametrize("name", tiny.ONE_PER_FAMILY)
NARROW = {"mlp": 24}


def widths(name: str) -> dict[str, int]:
    """Uniform widths that cut all that can be cut."""
    variant = tiny.VARIANTS[name]
    rep = variant.heads // variant.kv_heads
    return (
        NARROW
        | ({"kv_group": 2} if variant.kv_heads > 2 else {})
        | ({"query_in_group": 1} if rep > 1 else {})
    )


def test_every_family_has_variants():
    described = {kind for family in FAMILIES for kind in family.model_types}
    assert described == set(tiny.FAMILIES)
    assert {tiny.VARIANTS[name].family for name in tiny.ONE_PER_FAMILY} == described


@every_variant
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_masked_equals_cut(name: str, seed: int):
    model = tiny.model(name)
    oracles.assert_masked_equals_cut(model, oracles.random_plan(describe(model), seed))


@every_variant
def test_masked_equals_cut_at_equal_widths(name: str):
    model = tiny.model(name)
    small, applied = oracles.assert_masked_equals_cut(
        model, oracles.uniform_plan(describe(model), widths(name))
    )
    # Equal widths: the config follows, so that a stock class can be built from it.
    config, block = small.config, applied.spec.blocks[0]
    assert set(applied.spec.blocks) == {block}
    assert config.num_attention_heads == block.heads < tiny.VARIANTS[name].heads
    assert getattr(config, "ffn_dim" if name.startswith("opt") else "intermediate_size") == 24
    assert getattr(config, "num_key_value_heads", block.kv_heads) == block.kv_heads


@every_variant
def test_masked_then_committed_equals_cut(name: str):
    """Two plans, the second made on the masked model, then one commit = two cuts."""
    model = tiny.model(name)
    spec = describe(model)
    twice, once = copy.deepcopy(model), copy.deepcopy(model)
    first = apply(twice, oracles.random_plan(spec, 3), spec)
    second = oracles.random_plan(first.spec, 4)
    cut = apply(twice, second, first.spec)

    logical = spec.cut(lower(oracles.random_plan(spec, 3), spec), physical=False)
    assert logical.fingerprint == first.spec.fingerprint
    lowered = lower(second, logical)
    committed = commit(once, logical, lowered)
    assert committed.spec.fingerprint == cut.spec.fingerprint
    assert torch.equal(once(tiny.tokens()).logits, twice(tiny.tokens()).logits)
    oracles.close(
        oracles.masked_logits(model, {**_dead(logical), **lowered}, tiny.tokens()),
        once(tiny.tokens()).logits,
    )


def _dead(spec):
    return {entry: ~dead for entry, dead in spec.dead.items()}


@every_variant
def test_counts_from_tensors_equal_arithmetic(name: str):
    model = tiny.model(name)
    spec = describe(model)
    real = sum(p.numel() for p in model.parameters())
    assert count_params(spec).model == tally(model, spec).params.model == real
    for seed in range(3):
        plan, small = oracles.random_plan(spec, seed), copy.deepcopy(model)
        sizes = {edit.axis: len(edit.kept) for edit in plan.edits}
        logical = spec.cut(lower(plan, spec), physical=False)
        applied = apply(small, plan, spec)
        expected = tally(small, applied.spec)
        assert expected.params.model == sum(p.numel() for p in small.parameters())
        assert (
            expected.params
            == count_params(spec, sizes)
            == count_params(logical)
            == count_params(applied.spec)
        )
        seen = tally(model, logical)
        assert (seen.params, seen.flops, seen.kv_cache) == (
            expected.params,
            expected.flops,
            expected.kv_cache,
        )


@every_variant
def test_embedding_and_residual_stay(name: str):
    model = tiny.model(name)
    spec = describe(model)
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    assert (embedding is head) == tiny.VARIANTS[name].tied
    before = embedding.clone()
    applied = apply(model, oracles.random_plan(spec, 0), spec)
    assert model.get_input_embeddings().weight is embedding
    assert model.get_output_embeddings().weight is head
    assert torch.equal(embedding, before)
    assert not {"embed", "norm", "lm_head"} & {
        part for name in applied.table for part in name.split(".")[-2].split("_")
    }


def continuation(model, use_cache: bool):
    return model.generate(
        tiny.tokens(1, 6), max_new_tokens=5, min_new_tokens=5, do_sample=False, use_cache=use_cache
    )


@every_variant
@pytest.mark.parametrize("seed", [None, 0], ids=["equal widths", "other width in each block"])
def test_cache_does_not_change_generation(name: str, seed: int | None):
    model = tiny.model(name)
    spec = describe(model)
    plan = (
        oracles.uniform_plan(spec, widths(name))
        if seed is None
        else oracles.random_plan(spec, seed)
    )
    lowered = lower(plan, spec)
    with oracles.masked(model, lowered):
        expected = continuation(model, use_cache=False)
    apply(model, plan, spec)
    for use_cache in (False, True):
        assert torch.equal(continuation(model, use_cache=use_cache), expected)


@every_variant
def test_structure_rebuilds_the_model(name: str):
    """Cut twice -> structure -> JSON -> applied once to a dense model -> same logits."""
    model = tiny.model(name)
    dense = describe(model)
    spec = dense
    for seed in (0, 7):
        spec = apply(model, oracles.random_plan(spec, seed), spec).spec
    structure = json.loads(json.dumps(structure_of(spec, dense)))
    state, meta = model.state_dict(), tiny.meta(name)
    assert rebuild(meta, structure).spec.fingerprint == spec.fingerprint
    assert {n: p.shape for n, p in meta.state_dict().items()} == {
        n: p.shape for n, p in state.items()
    }
    other = tiny.model(name, seed=1)
    assert rebuild(other, structure).spec.fingerprint == spec.fingerprint
    assert not torch.equal(other(tiny.tokens()).logits, model(tiny.tokens()).logits)
    other.load_state_dict(state)
    assert torch.equal(other(tiny.tokens()).logits, model(tiny.tokens()).logits)


@every_family
def test_eager_attention(name: str):
    """Head counts that only the eager path reads are refreshed too; its softmax is float32."""
    model = tiny.model(name, attn_implementation="eager")
    spec = describe(model)
    plan = oracles.random_plan(spec, 0)
    expected = oracles.masked_logits(model, lower(plan, spec), tiny.tokens())
    assert model.config._attn_implementation == "eager"
    apply(model, plan, spec)
    torch.testing.assert_close(model(tiny.tokens()).logits, expected, rtol=1e-4, atol=1e-5)


@every_family
def test_meta_and_real_describe_alike(name: str):
    real, meta = describe(tiny.model(name)), describe(tiny.meta(name))
    assert real.fingerprint == meta.fingerprint
    assert count_params(real) == count_params(meta)
