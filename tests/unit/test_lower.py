"""From kept units to kept entries."""

import dataclasses

import pytest
import torch

import oracles
import tiny
from plprune.describe import describe
from plprune.errors import PlanError
from plprune.surgery.lower import lower

SPEC = describe(tiny.meta("llama-gqa"))
ATTN = "model.layers.0.self_attn"


def kept(lowered, module: str, side: str) -> list[int]:
    return torch.nonzero(lowered[module, side])[:, 0].tolist()


def test_one_axis_touches_all_ends_it_covers():
    lowered = lower(oracles.plan_of(SPEC, {"layers.0.kv_group": [0, 2]}), SPEC)
    ends = {
        f"{ATTN}.{n}_proj": side
        for n, side in zip("kvqo", ("out", "out", "out", "in"), strict=True)
    }
    assert set(lowered) == set(ends.items())
    assert kept(lowered, f"{ATTN}.k_proj", "out") == [*range(8), *range(16, 24)]
    assert kept(lowered, f"{ATTN}.o_proj", "in") == [*range(16), *range(32, 48)]


def test_crossing_axes_are_anded_in_any_order():
    plan = oracles.plan_of(
        SPEC, {"layers.0.kv_group": [0, 2], "layers.0.query_in_group": [1, 2, 5]}
    )
    turned = dataclasses.replace(plan, edits=plan.edits[::-1])
    lowered = lower(plan, SPEC)
    # Heads 0, 1, 4, 5 survive with their KV heads; of them 1 and 5 are kept.
    assert kept(lowered, f"{ATTN}.q_proj", "out") == [*range(8, 16), *range(40, 48)]
    assert all(torch.equal(mask, lower(turned, SPEC)[entry]) for entry, mask in lowered.items())


def test_keeping_all_keeps_all():
    lowered = lower(oracles.plan_of(SPEC, {"layers.1.mlp": range(40)}), SPEC)
    assert all(bool(mask.all()) for mask in lowered.values())
    assert lower(oracles.plan_of(SPEC, {}), SPEC) == {}


def test_plan_on_a_masked_model_names_the_units_that_are_left():
    masked = SPEC.cut(
        lower(oracles.plan_of(SPEC, {"layers.0.mlp": [3, 5, 7, 9]}), SPEC), physical=False
    )
    lowered = lower(oracles.plan_of(masked, {"layers.0.mlp": [0, 3]}), masked)
    assert kept(lowered, "model.layers.0.mlp.down_proj", "in") == [3, 9]
    assert masked.cut(lowered, physical=False).structure() == {"layers.0.mlp": [3, 9]}


@pytest.mark.parametrize(
    ("axis", "units", "message"),
    [
        (
            "layers.9.mlp",
            [0],
            r"unknown axis: given layers.9.mlp; allowed layers.0.kv_group, layers.0.query_in_group",
        ),
        (
            "layers.0.mlp",
            [],
            r"kept units of layers.0.mlp are not valid: given 0 units; allowed 1..40 different un",
        ),
        ("layers.0.mlp", [0, 40], r"kept units of layers.0.mlp are not valid: given 2 units"),
        ("layers.0.mlp", [-1, 0], r"kept units of layers.0.mlp are not valid"),
        ("layers.0.mlp", [2, 1], r"kept units of layers.0.mlp are not valid"),
        ("layers.0.mlp", [1, 1], r"kept units of layers.0.mlp are not valid"),
    ],
)
def test_refused(axis: str, units: list[int], message: str):
    with pytest.raises(PlanError, match=message):
        lower(oracles.plan_of(SPEC, {axis: units}), SPEC)


def test_another_model():
    plan = dataclasses.replace(oracles.plan_of(SPEC, {"layers.0.mlp": [0]}), fingerprint="0" * 16)
    message = rf"made for another model: given fingerprint 0+; allowed {SPEC.fingerprint}; fix"
    with pytest.raises(PlanError, match=message):
        lower(plan, SPEC)
