"""Depth: influence against its formula, greedy against brute force, budgets, what is refused."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import oracles
import tiny
from plprune.budget import Budget
from plprune.count import count_flops, count_params, kv_cache_bytes, price
from plprune.describe import describe
from plprune.drivers.removals import losses_of
from plprune.drivers.whole import calibrate, decide, view_of
from plprune.errors import BudgetError, ConfigError, PlanError
from plprune.methods.depth import Depth
from plprune.plan import Plan
from plprune.skeleton import shrink
from plprune.spec import SUBLAYERS
from plprune.stats.base import fold
from plprune.stats.cosine import Cosine
from plprune.surgery.apply import apply

HALF = Budget(keep=0.5, base="blocks")


def deep(variant: str = "llama-gqa-bias", layers: int = 5, **more: Any) -> nn.Module:
    if variant.startswith("gemma3"):
        more["layer_types"] = ["sliding_attention", "full_attention"] * layers
        more["layer_types"] = more["layer_types"][:layers]
    return tiny.model(variant, num_hidden_layers=layers, **more)


def planned(model: nn.Module, method: Depth, budget: Budget = HALF, batches: Any = None) -> Plan:
    batches = tiny.batches() if batches is None else batches
    spec = describe(model)
    seen = calibrate(model, spec, method, batches)
    return decide(model, spec, method, budget, seen, losses_of(model, spec, batches))


def gone(plan: Plan) -> set[str]:
    return {edit.axis for edit in plan.edits}


# --- influence -----------------------------------------------------------------------------------


def streams(model: nn.Module, ids: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Residual stream in front of and behind every block, by hand."""
    seen: dict[int, dict[str, Tensor]] = {}
    spec = describe(model)
    handles = []
    for number, block in enumerate(model.get_submodule(spec.stack)):
        into = seen.setdefault(number, {})

        def entered(_: Any, args: Any, kwargs: Any, into: Any = into) -> None:
            into["in"] = args[0] if args else kwargs["hidden_states"]

        def left(_: Any, args: Any, out: Any, into: Any = into) -> None:
            into["out"] = out[0] if isinstance(out, tuple) else out

        handles += [
            block.register_forward_pre_hook(entered, with_kwargs=True),
            block.register_forward_hook(left),
        ]
    model(ids, use_cache=False)
    for handle in handles:
        handle.remove()
    return [(one["in"].detach(), one["out"].detach()) for one in seen.values()]


def influence(enters: Tensor, leaves: Tensor) -> float:
    return 1 - float(
        torch.cosine_similarity(enters.double(), leaves.double(), dim=-1, eps=0).mean()
    )


@pytest.mark.parametrize("variant", tiny.ONE_PER_FAMILY)
def test_influence_of_blocks_is_its_formula(variant: str):
    model = deep(variant)
    plan = planned(model, Depth(), batches=[{"input_ids": tiny.tokens(3, 12)}])
    for number, (enters, leaves) in enumerate(streams(model, tiny.tokens(3, 12))):
        for kind in SUBLAYERS:
            score = float(plan.scores[f"layers.{number}.{kind}"])
            assert score == pytest.approx(influence(enters, leaves), rel=1e-6)


@pytest.mark.parametrize("variant", [*tiny.ONE_PER_FAMILY, "gpt_neox-mha-tied"])
def test_influence_of_sublayers_is_its_formula(variant: str):
    """The stream between two sublayers is what leaves a block without the second."""
    model, ids = deep(variant), tiny.tokens(3, 12)
    plan = planned(model, Depth(units="sublayers"), batches=[{"input_ids": ids}])
    spec = describe(model)
    parallel = bool(getattr(model.config, "use_parallel_residual", False))
    for number in range(5):
        small = copy.deepcopy(model)
        empty = torch.zeros(0, dtype=torch.int64)
        apply(small, oracles.plan_of(spec, {f"layers.{number}.mlp_sublayer": empty}), spec)
        enters, middle = streams(small, ids)[number]
        leaves = streams(model, ids)[number][1]
        attention = float(plan.scores[f"layers.{number}.attention_sublayer"])
        assert attention == pytest.approx(influence(enters, middle), rel=1e-6)
        before = enters if parallel else middle
        after = enters + (leaves - middle) if parallel else leaves
        mlp = float(plan.scores[f"layers.{number}.mlp_sublayer"])
        assert mlp == pytest.approx(influence(before, after), rel=1e-6)


def test_padding_and_first_tokens_are_left_out():
    model = deep()
    ids, mask = tiny.tokens(2, 12), torch.ones(2, 12, dtype=torch.int64)
    mask[1, :5] = 0
    batch = {"input_ids": ids, "attention_mask": mask}
    spec, method = describe(model), Depth(skip_first_tokens=2)
    stats, _ = calibrate(model, spec, method, [batch])
    assert {float(stat.n) for stat in stats.values()} == {10 + 5}


def test_cosines_add_and_hold_at_the_edges():
    x = torch.randn(50, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    whole = fold(Cosine.zero(32), x)
    parts = fold(Cosine.zero(32), x[:20]) + fold(Cosine.zero(32), x[20:])
    oracles.close(whole.tensors(), parts.tensors())
    same = torch.cat([x[:, :16], 3 * x[:, :16]], dim=1)
    assert float(fold(Cosine.zero(32), same).influence) == pytest.approx(0, abs=1e-15)
    turned = torch.cat([x[:, :16], -x[:, :16]], dim=1)
    assert float(fold(Cosine.zero(32), turned).influence) == pytest.approx(2)
    nothing = torch.zeros(4, 32)
    assert float(fold(Cosine.zero(32), nothing).influence) == 0
    nothing[:, 20] = 1
    assert float(fold(Cosine.zero(32), nothing).influence) == 1
    nothing[0, 3] = math.nan
    assert not torch.isfinite(fold(Cosine.zero(32), nothing).cosine)


def test_an_influence_close_to_zero_keeps_its_digits():
    """Of 1 - 1e-10 float32 would leave nothing."""
    x = torch.ones(100, 64)
    y = x.clone()
    y[:, 0] += 1e-4
    exact = 1 - float(torch.cosine_similarity(x.double(), y.double(), dim=-1).mean())
    found = float(fold(Cosine.zero(128), torch.cat([x, y], dim=1)).influence)
    assert 0 < found == pytest.approx(exact, rel=1e-4)


def test_the_lowest_go_and_of_equals_the_later():
    model = deep(layers=4)
    with torch.no_grad():
        for number in (1, 2):  # these do nothing: influence exactly 0
            for name in ("self_attn.o_proj", "mlp.down_proj"):
                linear = model.model.layers[number].get_submodule(name)
                linear.weight.zero_()
                linear.bias.zero_()
    one = planned(model, Depth(), Budget(keep=0.75, base="blocks"))
    two = planned(model, Depth(), Budget(keep=0.5, base="blocks"))
    assert {name.split(".")[1] for name in gone(one)} == {"2"}
    assert {name.split(".")[1] for name in gone(two)} == {"1", "2"}


# --- loss ----------------------------------------------------------------------------------------


def loss_without(model: nn.Module, names: Any) -> float:
    """By cutting a copy and adding up token by token."""
    small, spec = copy.deepcopy(model), describe(model)
    empty = torch.zeros(0, dtype=torch.int64)
    if names:
        apply(small, oracles.plan_of(spec, dict.fromkeys(names, empty)), spec)
    total = count = 0.0
    with torch.no_grad():
        for batch in tiny.batches():
            logits = small(batch["input_ids"]).logits[:, :-1].flatten(0, 1).float()
            ids = batch["input_ids"][:, 1:].flatten()
            losses = nn.functional.cross_entropy(logits, ids, reduction="none")
            total, count = total + float(losses.double().sum()), count + len(ids)
    return total / count


@pytest.mark.parametrize(
    "variant", ["llama-gqa-bias", "gemma3-gqa-tied", "opt-mha", "gpt_neox-mha"]
)
@pytest.mark.parametrize("units", ["blocks", "sublayers"])
def test_greedy_is_brute_force(variant: str, units: str):
    model = deep(variant, 4)
    method = Depth(criterion="loss", units=units)  # type: ignore[arg-type]
    plan = planned(model, method)
    spec = describe(model)
    candidates = [tuple(axis.name for axis in unit) for unit in method.units_of(spec)]
    removed: list[tuple[str, ...]] = []

    def left() -> float:
        sizes = {name: 0 for unit in removed for name in unit}
        return float(price(spec, HALF, sizes) / price(spec, HALF))

    while left() > 0.5:
        others = [unit for unit in candidates if unit not in removed]
        losses = [loss_without(model, [n for u in (*removed, unit) for n in u]) for unit in others]
        removed.append(others[losses.index(min(losses))])
    for unit in removed[::-1]:  # what still fits comes back
        removed.remove(unit)
        if left() > 0.5:
            removed.append(unit)
    assert gone(plan) == {name for unit in removed for name in unit}


def test_measured_again_after_each_removal_is_not_one_ranking():
    """Negative control: with the losses of the first round alone another set goes, somewhere."""
    differ = False
    for seed in range(6):
        model = deep("llama-gqa", 5, seed=seed)
        spec, method = describe(model), Depth(criterion="loss", units="sublayers")
        plan = planned(model, method, Budget(keep=0.4, base="blocks"))
        order = sorted(plan.scores, key=lambda name: float(plan.scores[name]))
        differ |= gone(plan) != set(order[: len(gone(plan))])
        assert len(plan.scores) == len(method.units_of(spec))
    assert differ


def test_losses_are_those_of_cut_models():
    model = deep(layers=3)
    spec = describe(model)
    units = [tuple(axis.name for axis in unit) for unit in Depth().units_of(spec)]
    measure = losses_of(model, spec, tiny.batches())
    singles = [(name,) for unit in units for name in unit]
    for first in ((), units[1]):
        tried = [unit for unit in (*units, *singles) if not set(unit) & set(first)]
        found = measure(first, tried)
        for unit, loss in zip(tried, found, strict=True):
            assert loss == pytest.approx(loss_without(model, (*first, *unit)), abs=1e-9)


def test_losses_without_batches_are_refused():
    model = deep()
    view = view_of(model, describe(model), ({}, ""))
    with pytest.raises(ConfigError, match="losses cannot be measured"):
        Depth(criterion="loss").plan(view, HALF)


def test_losses_that_are_not_finite_are_refused():
    model = deep()
    with torch.no_grad():
        model.model.norm.weight.fill_(math.nan)
    with pytest.raises(PlanError, match="not finite"):
        planned(model, Depth(criterion="loss"))


# --- budgets -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keep", "left"), [(1.0, 5), (0.99, 4), (0.8, 4), (0.79, 3), (0.6, 3), (0.2, 1)]
)
def test_never_above_and_no_block_too_few(keep: float, left: int):
    plan = planned(deep(), Depth(), Budget(keep=keep, base="blocks"))
    assert sum(plan.got["attention_sublayer"]) == sum(plan.got["mlp_sublayer"]) == left


@pytest.mark.parametrize("of", ["params", "flops", "kv_cache"])
@pytest.mark.parametrize("keep", [0.9, 0.7, 0.45, 0.25])
def test_sublayers_meet_every_quantity(of: str, keep: float):
    model = deep()
    spec = describe(model)
    budget = Budget(keep=keep, of=of, base="non_embedding", context=64)  # type: ignore[arg-type]
    plan = planned(model, Depth(units="sublayers"), budget)
    allowed = keep * price(spec, budget)
    now = dict.fromkeys(gone(plan), 0)
    assert price(spec, budget, now) <= allowed * (1 + 1e-12)
    for name in now:  # nothing that is gone would fit
        more = {other: 0 for other in now if other != name}
        assert price(spec, budget, more) > allowed
    if of == "kv_cache":
        assert not any("mlp" in name for name in now)


def test_a_number_of_blocks():
    plan = planned(deep(), Depth(), Budget(widths={"blocks": 2}))
    assert sum(plan.got["attention_sublayer"]) == 2
    single = planned(deep(), Depth(units="sublayers"), Budget(widths={"sublayers": 7}))
    assert sum(map(sum, single.got.values())) == 7


@pytest.mark.parametrize(
    "widths", [{"mlp": 8}, {"blocks": 6}, {"blocks": [1, 1]}, {"sublayers": 3}]
)
def test_other_widths_are_refused(widths: Any):
    with pytest.raises(BudgetError, match="widths cannot be met"):
        planned(deep(), Depth(), Budget(widths=widths))


@pytest.mark.parametrize("units", ["blocks", "sublayers"])
@pytest.mark.parametrize("criterion", ["influence", "loss"])
def test_one_attention_always_stays(units: Any, criterion: Any):
    method = Depth(units=units, criterion=criterion)
    with pytest.raises(BudgetError, match="does not meet the budget") as error:
        planned(deep(layers=2), method, Budget(keep=0.01, base="blocks"))
    assert "one attention left" in str(error.value)


@pytest.mark.parametrize(
    "wrong", [{"criterion": "size"}, {"units": "heads"}, {"skip_first_tokens": -1}]
)
def test_wrong_settings(wrong: Any):
    with pytest.raises(ConfigError):
        Depth(**wrong)


def test_what_is_gone_is_no_candidate():
    model = deep()
    plan = planned(model, Depth(units="sublayers"), Budget(keep=0.7, base="blocks"))
    apply(model, plan, describe(model))
    after = describe(model)
    there = {axis.name for unit in Depth(units="sublayers").units_of(after) for axis in unit}
    assert not there & gone(plan)
    for method in (Depth(), Depth(criterion="loss")):
        again = planned(model, method, Budget(keep=0.7, base="blocks"))
        assert gone(again) <= there
        assert gone(again)


# --- known before any data is read -----------------------------------------------------------------


@pytest.mark.parametrize(
    "budget",
    [Budget(keep=0.7, base="non_embedding"), Budget(widths={"blocks": 2}), Budget(keep=1.0)],
)
def test_sizes_are_those_of_any_result_where_blocks_are_alike(budget: Budget):
    model = deep()
    spec = describe(model)
    like = Depth().sizes_like(spec, budget)
    found = dict.fromkeys(gone(planned(model, Depth(), budget)), 0)
    assert like is not None
    assert len(like) == len(found)
    assert count_params(spec, like) == count_params(spec, found)
    assert count_flops(spec, like, context=64) == count_flops(spec, found, context=64)
    assert kv_cache_bytes(spec, like) == kv_cache_bytes(spec, found)
    small = apply(deep(), planned(model, Depth(), budget), spec).spec
    assert count_params(shrunk := describe(shrink(deep(), like))) == count_params(small)
    assert len(shrunk.axes) <= len(spec.axes)


def test_sizes_depend_on_data_where_blocks_differ():
    spec = describe(deep())
    assert Depth(units="sublayers").sizes_like(spec, HALF) is None
    narrow = describe(shrink(deep(), {spec.of_kind("mlp")[0].name: 4}))
    assert Depth().sizes_like(narrow, HALF) is None


@pytest.mark.parametrize("units", ["blocks", "sublayers"])
@pytest.mark.parametrize("budget", [Budget(keep=0.01, base="blocks"), Budget(widths={"mlp": 8})])
def test_impossible_budgets_are_refused_before_data_is_read(units: Any, budget: Budget):
    with pytest.raises(BudgetError):
        Depth(units=units).widths(describe(deep()), budget)
    assert Depth(units=units).widths(describe(deep()), HALF) is None
