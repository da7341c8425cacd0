"""`describe`, `Spec.cut` and the fingerprint."""

import copy
from types import MappingProxyType, SimpleNamespace

import pytest
import torch
from torch import nn

import oracles
import tiny
from plprune.describe import describe
from plprune.errors import FamilyError, PlanError, PlpruneError
from plprune.families import FAMILIES, LLAMA, Family, Projection, of
from plprune.spec import summary
from plprune.surgery.apply import apply
from plprune.surgery.lower import lower


def test_llama_in_numbers():
    spec = describe(tiny.meta("llama-gqa"))
    assert spec.widths() == {"kv_group": [3, 3], "query_in_group": [6, 6], "mlp": [40, 40]}
    assert (spec.hidden, spec.head_rows, len(spec.linears)) == (48, 64, 14)
    assert spec.embedding == 2 * 64 * 48
    assert (spec.block_rest, spec.outside_rest) == (0, 48)
    assert [axis.own for axis in spec.of_kind("mlp_sublayer")] == [48, 48]
    q = spec.linears["model.layers.1.self_attn.q_proj"]
    assert (q.rows, q.cols, q.bias, q.block, q.roles) == (48, 48, False, 1, ("q",))


def test_a_kv_group_owns_a_kv_head_and_the_query_heads_that_read_it():
    axis = describe(tiny.meta("llama-gqa")).axes["layers.0.kv_group"]
    tables = {piece.module.rpartition(".")[2]: piece.index for piece in axis.slices}
    assert tables["k_proj"][1].tolist() == tables["v_proj"][1].tolist() == list(range(8, 16))
    # Query heads 2 and 3 read KV head 1: consecutive, not modulo.
    assert tables["q_proj"][1].tolist() == tables["o_proj"][1].tolist() == list(range(16, 32))


def test_fused_rows():
    phi3 = describe(tiny.meta("phi3-gqa"))
    k, v, q, _ = phi3.axes["layers.0.kv_group"].slices
    assert (k.index[1, 0], v.index[1, 0], q.index[1, 0]) == (48 + 8, 48 + 24 + 8, 16)
    up, gate, _ = phi3.axes["layers.0.mlp"].slices
    assert (up.index[3, 0], gate.index[3, 0]) == (40 + 3, 3)
    neox = describe(tiny.meta("gpt_neox-mha"))
    k, v, q, _ = neox.axes["layers.0.kv_group"].slices
    # q, k, v of head 2 lie side by side.
    assert (q.index[2, 0], k.index[2, 0], v.index[2, 0]) == (48, 56, 64)


@pytest.mark.parametrize("name", tiny.ONE_PER_FAMILY)
@pytest.mark.parametrize("seed", range(3))
def test_fingerprint_is_the_same_masked_and_cut_and_differs_from_others(name: str, seed: int):
    spec = describe(tiny.meta(name))
    lowered = lower(oracles.random_plan(spec, seed), spec)
    masked, cut = spec.cut(lowered, physical=False), spec.cut(lowered, physical=True)
    assert masked.fingerprint == cut.fingerprint != spec.fingerprint
    assert masked.structure() == cut.structure()
    assert masked.widths() == cut.widths()
    assert masked.dead
    assert not cut.dead
    assert masked.linears == spec.linears
    other = spec.cut(lower(oracles.random_plan(spec, seed + 10), spec), physical=True)
    assert other.fingerprint != cut.fingerprint


def test_fingerprint_sees_which_units_stay_not_only_how_many():
    spec = describe(tiny.meta("llama-mha"))
    made = [
        spec.cut(lower(oracles.plan_of(spec, {"layers.0.kv_group": kept}), spec), physical=True)
        for kept in ([0, 1, 2], [0, 1, 3])
    ]
    assert made[0].widths() == made[1].widths()
    assert made[0].fingerprint != made[1].fingerprint


def test_cut_spec_has_the_coordinates_of_the_cut_tensors():
    """Shapes and tables of `Spec.cut` are those `describe` reads from the cut model."""
    for name in tiny.ONE_PER_FAMILY:
        model = tiny.model(name)
        spec = describe(model)
        after = apply(model, oracles.random_plan(spec, 0), spec).spec
        seen = describe(model)
        assert {n: (x.rows, x.cols) for n, x in after.linears.items()} == {
            n: (x.rows, x.cols) for n, x in seen.linears.items()
        }
        assert after.blocks == seen.blocks
        for axis in after.axes.values():
            for mine, fresh in zip(axis.slices, seen.axes[axis.name].slices, strict=True):
                assert torch.equal(mine.index, fresh.index), (name, axis.name)


@pytest.mark.parametrize(
    ("name", "kept"),
    [
        ("llama-gqa", {"layers.0.query_in_group": [0, 1, 2]}),  # 2, 1 and 0 heads of three groups
        (
            "llama-mha",
            {"layers.0.query_in_group": [0, 1, 2]},
        ),  # heads of one: their KV heads stay behind
    ],
)
def test_ragged_groups_are_refused(name: str, kept: dict[str, list[int]]):
    spec = describe(tiny.meta(name))
    with pytest.raises(
        PlanError, match=r"uneven groups.*layers\.0\.self_attn\.q_proj.*same number"
    ):
        lower(oracles.plan_of(spec, kept), spec)


def test_summary_is_plain():
    assert summary(describe(tiny.meta()))["blocks"][0] == {
        "heads": 6,
        "kv_heads": 3,
        "head_dim": 8,
        "ffn": 40,
    }


# --- refusals ------------------------------------------------------------------------------------


def test_error_says_given_allowed_fix():
    error = PlpruneError("wrong", given="1", allowed="2", fix="do 2")
    assert str(error) == "wrong: given 1; allowed 2; fix: do 2"
    assert str(PlpruneError("wrong")) == "wrong"
    assert isinstance(error, ValueError)


def test_unknown_architecture():
    with pytest.raises(
        FamilyError,
        match=r"unknown architecture: given model_type 'bert'; allowed llama, .*fix: .*",
    ):
        of(SimpleNamespace(model_type="bert"))
    with pytest.raises(FamilyError, match="given model_type None"):
        describe(nn.Linear(2, 2))
    assert of(SimpleNamespace(model_type="plprune", plprune_base_model_type="opt")).name == "opt"
    assert len({kind for family in FAMILIES for kind in family.model_types}) == len(FAMILIES)


def test_model_without_a_module():
    model = tiny.meta()
    del model.model.layers[1].mlp.up_proj
    with pytest.raises(
        FamilyError,
        match=r"module missing for family llama: given LlamaDecoderLayer without mlp.up_proj",
    ):
        describe(model)


def test_heads_that_do_not_fit():
    model = tiny.meta()
    model.model.layers[0].self_attn.head_dim = 7
    with pytest.raises(
        FamilyError,
        match=r"attention of block 0 does not fit family llama: given 6 query heads, 3 KV",
    ):
        describe(model)


def test_unknown_kind_of_linear():
    model = tiny.model()
    model.model.layers[0].mlp.up_proj = nn.Conv1d(3, 3, 1)
    with pytest.raises(
        FamilyError,
        match=r"cannot cut this kind of module: given Conv1d; allowed Linear, Conv1D.*fix",
    ):
        describe(model)


def test_explicit_family():
    model = tiny.meta()
    wrong = MappingProxyType({**LLAMA.roles, "up": Projection(path="mlp.nowhere")})
    family = Family(
        name="x",
        model_types=(),
        blocks="model.layers",
        attention="self_attn",
        roles=wrong,
        embed="e",
    )
    with pytest.raises(FamilyError, match="family x"):
        describe(model, family)
    assert LLAMA.gated


def test_describe_changes_nothing():
    model = tiny.model()
    before = copy.deepcopy(model.state_dict())
    describe(model)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
