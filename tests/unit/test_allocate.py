"""Budget to widths: never above the budget, at most one multiple below it."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import oracles
import tiny
from plprune.allocate import fixed_widths, sizes_of, uniform, units_per_group
from plprune.budget import Budget
from plprune.count import count_params, price
from plprune.describe import describe
from plprune.errors import BudgetError
from plprune.spec import Spec
from plprune.surgery.apply import apply

BASES = ("prunable", "blocks", "non_embedding", "model")
KINDS = ("kv_group", "mlp")


def spec_of(heads: int, rep: int, ffn: int, hidden: int, blocks: int, bias: bool) -> Spec:
    dims = {"hidden_size": hidden, "intermediate_size": ffn, "num_hidden_layers": blocks}
    dims |= {"num_attention_heads": heads * rep, "num_key_value_heads": heads}
    return describe(tiny.meta("qwen3-gqa", **dims, attention_bias=bias))


SPEC = spec_of(4, 2, 48, 32, 2, True)


def at(spec: Spec, budget: Budget, widths: dict[str, list[int]]) -> float:
    return float(price(spec, budget, sizes_of(spec, widths)))


def smallest(spec: Spec, budget: Budget, kinds: tuple[str, ...]) -> dict[str, list[int]]:
    least = {k: min(budget.multiple_of.get(k, 1), units_per_group(spec, k)[0]) for k in kinds}
    fixed = fixed_widths(spec, budget)
    return fixed | {k: [n] * len(spec.blocks) for k, n in least.items() if k not in fixed}


def check(
    spec: Spec, budget: Budget, kinds: tuple[str, ...] = KINDS
) -> dict[str, list[int]] | None:
    """The promise of `uniform`; None when nothing fits and it says so."""
    target = budget.keep * price(spec, budget) * (1 + 1e-12)
    if at(spec, budget, smallest(spec, budget, kinds)) > target:
        with pytest.raises(BudgetError, match=r"no widths meet the budget|exceed the budget"):
            uniform(spec, budget, kinds)
        return None
    widths = uniform(spec, budget, kinds)
    assert at(spec, budget, widths) <= target
    free = [kind for kind in kinds if kind not in budget.widths]
    for kind in kinds:
        most, step = units_per_group(spec, kind)[0], budget.multiple_of.get(kind, 1)
        if kind in budget.widths:
            assert widths[kind] == fixed_widths(spec, budget)[kind]
            continue
        width = widths[kind][0]
        assert widths[kind] == [width] * len(spec.blocks)
        assert 1 <= width <= most
        assert width % step == 0 or width == most
    if free:
        last = free[-1]
        most, step = units_per_group(spec, last)[0], budget.multiple_of.get(last, 1)
        if widths[last][0] < most:
            wider = widths | {last: [min(most, widths[last][0] + step)] * len(spec.blocks)}
            assert at(spec, budget, wider) > target, "a wider model fits the budget"
    return widths


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    dims=st.tuples(
        st.integers(1, 6), st.integers(1, 4), st.integers(2, 96), st.sampled_from([16, 48]),
        st.integers(1, 3), st.booleans(),
    ),
    keep=st.floats(0.05, 1.0),
    of=st.sampled_from(["params", "flops", "kv_cache"]),
    base=st.sampled_from(BASES),
    multiples=st.tuples(st.integers(1, 3), st.integers(1, 33)),
    kinds=st.sampled_from([KINDS, ("query_in_group", "mlp"), ("mlp",), ("kv_group",)]),
    context=st.sampled_from([0, 2048]),
)  # fmt: skip
def test_within_the_budget_by_at_most_one_multiple(dims, keep, of, base, multiples, kinds, context):
    multiple_of = {"kv_group": multiples[0], "query_in_group": multiples[0], "mlp": multiples[1]}
    check(
        spec_of(*dims),
        Budget(keep=keep, of=of, base=base, multiple_of=multiple_of, context=context),
        kinds,
    )


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("of", ["params", "flops"])
@pytest.mark.parametrize("keep", [0.4, 0.55, 0.8])
def test_every_base_and_quantity_is_met(of: str, base: str, keep: float):
    budget = Budget(keep=keep, of=of, base=base, multiple_of={"mlp": 4})
    widths = check(SPEC, budget)
    if widths is None:
        # Embeddings are half of this model: a small share of all of it cannot be reached.
        assert (base, keep) == ("model", 0.4)
        return
    assert widths != {"kv_group": [4, 4], "mlp": [48, 48]}


def test_bases_differ():
    found = {
        base: str(uniform(SPEC, Budget(keep=0.7, base=base, multiple_of={}), KINDS))
        for base in BASES
    }
    assert len(set(found.values())) >= 3


def test_attention_and_mlp_lose_the_same_share():
    widths = uniform(SPEC, Budget(keep=0.5, base="prunable", multiple_of={"mlp": 1}), KINDS)
    assert widths["kv_group"] == [2, 2]
    assert widths["mlp"] in ([23, 23], [24, 24])


def test_attention_is_rounded_up_and_the_mlp_makes_up_for_it():
    widths = uniform(SPEC, Budget(keep=0.6, base="prunable", multiple_of={"mlp": 1}), KINDS)
    assert widths["kv_group"] == [3, 3]
    assert widths["mlp"][0] < 0.6 * 48


def test_kv_cache_leaves_the_mlp_alone():
    assert uniform(SPEC, Budget(keep=0.6, of="kv_cache"), KINDS) == {
        "kv_group": [2, 2],
        "mlp": [48, 48],
    }


@pytest.mark.parametrize("of", ["params", "flops", "kv_cache"])
def test_keep_everything(of: str):
    model = tiny.model("llama-gqa-bias")
    spec, before = describe(model), copy.deepcopy(model.state_dict())
    widths = uniform(spec, Budget(keep=1.0, of=of), ("kv_group", "query_in_group", "mlp"))
    assert widths == {kind: units_per_group(spec, kind) for kind in widths}
    # Every unit is kept, so surgery replaces nothing.
    plan = oracles.plan_of(
        spec, {name: range(size) for name, size in sizes_of(spec, widths).items()}
    )
    pointers = {name: p.data_ptr() for name, p in model.named_parameters()}
    applied = apply(model, plan, spec)
    assert applied.swaps == ()
    assert applied.spec.fingerprint == spec.fingerprint
    assert pointers == {name: p.data_ptr() for name, p in model.named_parameters()}
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("widths", "expected"),
    [
        ({"kv_group": 2}, [2, 2]),
        ({"kv_group": [1, 4]}, [1, 4]),
    ],
)
def test_fixed_widths_are_honoured(widths: dict, expected: list[int]):
    budget = Budget(keep=0.6, widths=widths, multiple_of={"mlp": 2})
    assert check(SPEC, budget)["kv_group"] == expected
    assert uniform(SPEC, Budget(widths=widths | {"mlp": [5, 7]}), KINDS) == {
        "kv_group": expected,
        "mlp": [5, 7],
    }


def test_a_multiple_larger_than_the_model_keeps_all_or_refuses():
    assert uniform(SPEC, Budget(keep=0.9, multiple_of={"mlp": 64}), KINDS)["mlp"] == [48, 48]
    with pytest.raises(BudgetError, match=r"no widths meet the budget: .*multiple_of"):
        uniform(SPEC, Budget(keep=0.5, multiple_of={"mlp": 64}), ("mlp",))


def test_attention_multiples_hold_and_never_exceed_the_model():
    spec = spec_of(3, 1, 48, 32, 1, False)
    found = [
        check(spec, Budget(keep=k, multiple_of={"kv_group": 2, "mlp": 4}))
        for k in (0.3, 0.6, 0.7, 0.95)
    ]
    assert found[0] is None
    assert [widths["kv_group"] for widths in found[1:]] == [[2], [3], [3]]


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        (
            Budget(widths={"head": 1}),
            r"unknown axis kind budget.widths.head: given head; allowed kv_group, query_in_group, mlp; fix: name one that the",
        ),
        (
            Budget(widths={"mlp": [1, 2, 3]}),
            r"budget.widths.mlp has the wrong length: given 3 numbers; allowed one number, or on",
        ),
        (
            Budget(widths={"mlp": 49}),
            r"mlp width 49 requested for block 0: given 49; allowed 1..48; fix: set budget.widths",
        ),
        (
            Budget(widths={"kv_group": [4, 5]}),
            r"kv_group width 5 requested for block 1: given 5; allowed 1..4",
        ),
        (
            Budget(keep=0.5, multiple_of={"mpl": 8}),
            r"unknown axis kind budget.multiple_of.mpl: given mpl; allowed kv_group, query_in_group, mlp; fix: did you mean mlp\?",
        ),
        (
            Budget(keep=0.5, widths={"kv_group": 4, "mlp": 48}),
            r"the stated widths exceed the budget: given 1.0000 of params \(non_embedding\); all",
        ),
        (
            Budget(keep=0.01),
            r"no widths meet the budget: given keep 0.01 of params \(non_embedding\); allowed at",
        ),
        (
            Budget(keep=0.1, of="kv_cache"),
            r"no widths meet the budget: given keep 0.1 of kv_cache \(non_embedding\); allowed",
        ),
    ],
)
def test_refused(budget: Budget, message: str):
    with pytest.raises(BudgetError, match=message):
        uniform(SPEC, budget, KINDS)


def test_the_floor_it_names_can_be_reached():
    with pytest.raises(BudgetError) as caught:
        uniform(SPEC, Budget(keep=0.01, multiple_of={}), KINDS)
    floor = float(caught.value.allowed.split()[2])
    assert uniform(SPEC, Budget(keep=math.nextafter(floor, 1) + 5e-5, multiple_of={}), KINDS) == {
        "kv_group": [1, 1],
        "mlp": [1, 1],
    }


def test_blocks_that_differ_need_widths():
    model = tiny.model("llama-gqa")
    spec = describe(model)
    cut = apply(model, oracles.plan_of(spec, {"layers.0.mlp": range(20)}), spec).spec
    with pytest.raises(
        BudgetError,
        match=r"blocks differ in mlp, a uniform budget cannot be split: given \[20, 40\]; fix",
    ):
        uniform(cut, Budget(keep=0.5), KINDS)
    assert uniform(cut, Budget(keep=0.9, widths={"mlp": [10, 20]}), KINDS)["mlp"] == [10, 20]


def test_sizes_count_all_groups():
    sizes = sizes_of(SPEC, {"query_in_group": [1, 2], "mlp": [3, 4]})
    assert sizes == {
        "layers.0.query_in_group": 4,
        "layers.1.query_in_group": 8,
        "layers.0.mlp": 3,
        "layers.1.mlp": 4,
    }
    assert count_params(SPEC, sizes).model < count_params(SPEC).model
