"""Every oracle fails once: on wrong indices, wrong layouts, wrong sums."""

import dataclasses
from types import MappingProxyType

import pytest
import torch

import oracles
import tiny
from plprune import families
from plprune.describe import describe
from plprune.families import GPT_NEOX, PHI3, Family, Projection
from plprune.plan import Keep
from plprune.stats import Energy, Gram, Moments
from plprune.stats.base import fold
from plprune.surgery.apply import apply


def other_units(plan, spec):
    """The same widths, other units."""
    edits = []
    for edit in plan.edits:
        size = spec.axes[edit.axis].size
        edits.append(Keep(axis=edit.axis, kept=((edit.kept + 1) % size).sort().values))
    return dataclasses.replace(plan, edits=tuple(edits))


def test_masked_equals_cut_sees_wrong_units(monkeypatch: pytest.MonkeyPatch):
    model = tiny.model("llama-gqa")
    spec = describe(model)
    plan = oracles.plan_of(spec, {"layers.0.mlp": range(0, 40, 2)})
    oracles.assert_masked_equals_cut(model, plan)
    monkeypatch.setattr(oracles, "apply", lambda m, p, s: apply(m, other_units(p, s), s))
    with pytest.raises(AssertionError, match="logits"):
        oracles.assert_masked_equals_cut(model, plan)


def test_masked_equals_cut_sees_a_wrong_gradient(monkeypatch: pytest.MonkeyPatch):
    model = tiny.model("llama-gqa")
    plan = oracles.plan_of(describe(model), {"layers.0.mlp": range(0, 40, 2)})

    def with_a_slip(m, p, s):
        applied = apply(m, p, s)
        m.model.layers[0].mlp.up_proj.weight.register_hook(lambda grad: grad * (1 + 1e-6))
        return applied

    monkeypatch.setattr(oracles, "apply", with_a_slip)
    with pytest.raises(AssertionError, match=r"gradient of model\.layers\.0\.mlp\.up_proj\.weight"):
        oracles.assert_masked_equals_cut(model, plan)


def test_masked_equals_cut_sees_a_live_removed_entry(monkeypatch: pytest.MonkeyPatch):
    model = tiny.model("llama-gqa")
    plan = oracles.plan_of(describe(model), {"layers.0.mlp": range(0, 40, 2)})
    whole = {"grad": torch.ones(40, 48)}
    real = oracles.gradients

    def leaking(m, ids):
        grads = real(m, ids)
        name = "model.layers.0.mlp.up_proj.weight"
        if len(grads[name]) == 40:
            grads[name][1] = whole["grad"][1]
        return grads

    monkeypatch.setattr(oracles, "gradients", leaking)
    with pytest.raises(AssertionError, match="removed entries"):
        oracles.assert_masked_equals_cut(model, plan)


def wrong_neox() -> Family:
    """Rows of q, k and v taken as lying one after the other."""
    roles = {r: dataclasses.replace(p, interleaved=False) for r, p in GPT_NEOX.roles.items()}
    return dataclasses.replace(GPT_NEOX, roles=MappingProxyType(roles))


def wrong_phi3() -> Family:
    """k taken for q."""
    qkv = {r: Projection(path="self_attn.qkv_proj", parts=("k", "q", "v")) for r in "qkv"}
    return dataclasses.replace(PHI3, roles=MappingProxyType({**PHI3.roles, **qkv}))


@pytest.mark.parametrize(
    ("name", "wrong"), [("gpt_neox-mha", wrong_neox()), ("phi3-gqa", wrong_phi3())]
)
def test_masked_equals_cut_sees_a_wrong_layout(
    name: str, wrong: Family, monkeypatch: pytest.MonkeyPatch
):
    model = tiny.model(name)
    monkeypatch.setattr(families, "FAMILIES", (wrong,))
    plan = oracles.plan_of(describe(model), {"layers.0.kv_group": [0, 2]})
    with pytest.raises(AssertionError):
        oracles.assert_masked_equals_cut(model, plan)


@pytest.mark.parametrize("stat", [Energy, Moments, Gram])
def test_two_pass_sees_a_lost_row(stat: type):
    x = torch.randn(2, 5, 3, dtype=torch.float64)
    folded = fold(stat.zero(3), x)
    oracles.assert_two_pass(folded, [x])
    with pytest.raises(AssertionError):
        oracles.assert_two_pass(folded, [x[:, 1:]])
    with pytest.raises(AssertionError):
        oracles.assert_two_pass(folded, [x], [torch.ones(2, 5).triu()])


def test_masks_are_gone_after_the_context():
    model = tiny.model()
    before = oracles.masked_logits(model, {}, tiny.tokens())
    lowered = {("model.layers.0.mlp.down_proj", "in"): torch.arange(40) < 20}
    assert not torch.equal(oracles.masked_logits(model, lowered, tiny.tokens()), before)
    assert torch.equal(oracles.masked_logits(model, {}, tiny.tokens()), before)


def test_random_plans_differ_and_cross():
    spec = describe(tiny.meta("llama-gqa"))
    plans = [oracles.random_plan(spec, seed) for seed in range(20)]
    assert len({plan.hash for plan in plans}) > 15
    crossing = [
        {e.axis for e in p.edits} >= {"layers.0.kv_group", "layers.0.query_in_group"} for p in plans
    ]
    assert any(crossing)
