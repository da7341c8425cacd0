"""What every method that removes units owes; a new file in `plprune/methods` is tested without a line here.

Numbers are those of the list in the architecture:

 2  keep = 1.0 gives an empty plan, the model stays bitwise equal
 3  the budget is met up to one multiple, and the plan says so
 4  the plan depends neither on batch split nor on sample order
 6  zero-masked model = cut model
 7  save -> rebuild -> load -> same logits
 9  dead and constant channels, fewer tokens than channels: finite; NaN: PlanError
10  MHA, GQA, MQA, biases, tied embeddings, fused projections
11  LoRA before the cut = LoRA after it; merge then cut = cut then merge
12  bf16 weights: float32 scores, the decisions of fp32 up to ties
13  docstrings: citation, formula, "Not for"; every field

Methods that set single weights to zero are in `test_sparse_methods.py`. 5 (two processes) is in `tests/dist`; 1, 8 and 14 are in `test_methods_outside.py`.
"""

import ast
import copy
import dataclasses
import importlib
import inspect
import json
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import oracles
import tiny
from oracles import DRIVERS, METHOD_FOLDER, METHODS, SPARSE, STRUCTURED, plan_by
from plprune import families
from plprune.allocate import sizes_of
from plprune.budget import Budget
from plprune.count import price, tally
from plprune.describe import describe
from plprune.errors import PlanError
from plprune.methods.base import Method
from plprune.methods.depth import Depth
from plprune.plan import Keep, Plan
from plprune.surgery.apply import apply
from plprune.surgery.rebuild import rebuild, structure_of

BUDGET = Budget(keep=0.6, base="prunable", multiple_of={"mlp": 4})
every_method = pytest.mark.parametrize(
    "kind", STRUCTURED, ids=[kind.__name__ for kind in STRUCTURED]
)
every_kind = pytest.mark.parametrize("kind", METHODS, ids=[kind.__name__ for kind in METHODS])


def planned(kind: type[Method], model: nn.Module, budget: Budget = BUDGET, batches: Any = None):
    return plan_by(kind(), model, budget, batches)


def test_every_file_holds_a_method_with_a_driver():
    modules = {kind.__module__.rpartition(".")[2] for kind in METHODS}
    assert modules == {path.stem for path in METHOD_FOLDER.glob("*.py")} - {"__init__", "base"}
    assert {kind.order for kind in STRUCTURED} <= set(DRIVERS)
    assert set(METHODS) == {*STRUCTURED, *SPARSE}


# --- 2, 3, 4 -------------------------------------------------------------------------------------


@every_method
@pytest.mark.parametrize("name", tiny.ONE_PER_FAMILY)
def test_02_keep_everything(kind: type[Method], name: str):
    model = tiny.model(name)
    before, logits = copy.deepcopy(model.state_dict()), model(tiny.tokens()).logits
    parameters = dict(model.named_parameters())
    plan = planned(kind, model, Budget(keep=1.0))
    assert plan.empty
    applied = apply(model, plan, describe(model))
    assert applied.swaps == ()
    assert all(p is parameters[n] for n, p in model.named_parameters())
    assert all(torch.equal(before[n], value) for n, value in model.state_dict().items())
    assert torch.equal(model(tiny.tokens()).logits, logits)


@every_method
@pytest.mark.parametrize("keep", [0.5, 0.7, 0.9])
@pytest.mark.parametrize("of", ["params", "flops"])
def test_03_budget_is_met(kind: type[Method], of: str, keep: float):
    model = tiny.model("llama-gqa-bias")
    spec, budget = (
        describe(model),
        Budget(keep=keep, of=of, base="prunable", multiple_of={"mlp": 4}, context=8),
    )
    plan = planned(kind, model, budget)
    assert plan.asked == budget
    assert all(isinstance(edit, Keep) for edit in plan.edits), (
        "say here how other edits meet a budget"
    )
    after = apply(model, plan, spec).spec
    counted = tally(model, after, context=8)
    real, target = getattr(counted, of).prunable, keep * price(spec, budget)
    assert real <= target * (1 + 1e-12)
    # The plan says what it did, and one more multiple of the finest kind would have been too much.
    widths = {axis_kind: list(per_block) for axis_kind, per_block in plan.got.items()}
    assert price(spec, budget, sizes_of(spec, widths)) == real
    if issubclass(kind, Depth):
        kept = list(zip(*widths.values(), strict=True))
        gone = [block for block, there in enumerate(kept) if there == (0, 0)]
        assert gone
        for block in gone:  # one block more would have been too much
            more = {k: [n or int(i == block) for i, n in enumerate(w)] for k, w in widths.items()}
            assert price(spec, budget, sizes_of(spec, more)) > target
        return
    finest = list(widths)[-1]
    wider = widths | {
        finest: [width + budget.multiple_of.get(finest, 1) for width in widths[finest]]
    }
    assert price(spec, budget, sizes_of(spec, wider)) > target


@every_method
def test_04_batches_and_order_do_not_matter(kind: type[Method]):
    model, batches = tiny.model("llama-gqa-bias"), tiny.batches(4)
    rows = [{"input_ids": row[None]} for batch in batches for row in batch["input_ids"]]
    packed = [{"input_ids": torch.cat([batch["input_ids"] for batch in batches])}]
    plans = [
        planned(kind, model, batches=b) for b in (batches, batches[::-1], rows, rows[::-1], packed)
    ]
    assert len({plan.hash for plan in plans}) == 1
    for plan in plans[1:]:
        for axis, score in plan.scores.items():
            torch.testing.assert_close(score, plans[0].scores[axis])


# --- 6, 7, 10 ------------------------------------------------------------------------------------


@every_method
@pytest.mark.parametrize("name", list(tiny.VARIANTS))
def test_06_07_10_masked_equals_cut_and_is_rebuilt(kind: type[Method], name: str):
    model = tiny.model(name)
    dense = describe(model)
    plan = planned(kind, model)
    assert not plan.empty
    small, applied = oracles.assert_masked_equals_cut(model, plan)
    structure = json.loads(json.dumps(structure_of(applied.spec, dense)))
    again = tiny.model(name, seed=1)
    rebuild(again, structure)
    again.load_state_dict(small.state_dict())
    assert torch.equal(again(tiny.tokens()).logits, small(tiny.tokens()).logits)


# --- 9 -------------------------------------------------------------------------------------------


def dead(model: nn.Module) -> None:
    """MLP channels and whole heads that are always zero."""
    for layer in model.model.layers:
        for module, rows in ((layer.mlp.up_proj, range(30)), (layer.self_attn.v_proj, range(16))):
            module.weight[list(rows)] = 0
            module.bias[list(rows)] = 0


def constant(model: nn.Module) -> None:
    """MLP channels that always say the same."""
    for layer in model.model.layers:
        for module in (layer.mlp.up_proj, layer.mlp.gate_proj):
            module.weight[:30] = 0


@every_method
@pytest.mark.parametrize("change", [dead, constant, None], ids=["dead", "constant", "few tokens"])
def test_09_poor_statistics_give_a_finite_result(kind: type[Method], change: Callable | None):
    model = tiny.model("llama-gqa-bias")
    batches = tiny.batches() if change else [{"input_ids": tiny.tokens(1, 2)}]
    if change:
        with torch.no_grad():
            change(model)
    plan = planned(kind, model, batches=batches)
    assert all(bool(torch.isfinite(score).all()) for score in plan.scores.values())
    apply(model, plan, describe(model))
    assert bool(torch.isfinite(model(tiny.tokens()).logits).all())


@every_method
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_09_nan_is_refused(kind: type[Method], value: float):
    model = tiny.model("llama-gqa-bias")
    if not kind().taps(describe(model)):
        pytest.skip("looks at nothing")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.up_proj.weight[3, 5] = value
    with pytest.raises(PlanError, match="not finite"):
        planned(kind, model)


# --- 11 ------------------------------------------------------------------------------------------

LORAS: dict[str, dict[str, Any]] = {
    "plain": {},
    "ranks, alphas, biases": {
        "rank_pattern": {"q_proj": 2, "down_proj": 5},
        "alpha_pattern": {"o_proj": 7},
        "bias": "all",
        "lora_bias": True,
        "use_rslora": True,
    },
    "dora": {"use_dora": True},
    "dora with ranks": {"use_dora": True, "rank_pattern": {"o_proj": 1, "gate_proj": 3}},
}


def adapted(name: str, options: dict[str, Any]) -> nn.Module:
    """A tiny model with random adapters on all linears of its blocks, in float64."""
    from peft import LoraConfig, get_peft_model

    model = tiny.model(name)
    targets = {linear.rpartition(".")[2] for linear in describe(model).linears}
    wrapped = get_peft_model(
        model, LoraConfig(r=4, lora_alpha=8, target_modules=sorted(targets), **options)
    )
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for path, parameter in wrapped.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            if "lora_magnitude_vector" in path:
                parameter.mul_(1 + 0.3 * noise)
            elif "lora_" in path:
                parameter.copy_(0.3 * noise)
    return wrapped.eval()


def assert_lora_survives(wrapped: nn.Module, plan: Plan) -> None:
    """Adapted and masked = adapted and cut; merging before the cut or after it is the same."""
    small, applied = oracles.assert_masked_equals_cut(wrapped, plan)
    assert any("lora_A" in name for name in (*applied.table, *applied.gone))
    assert any("lora_B" in name for name in (*applied.table, *applied.gone))
    for module in small.modules():
        if hasattr(module, "lora_A"):
            assert (module.out_features, module.in_features) == module.base_layer.weight.shape
    logits = oracles.masked_logits(small, {}, tiny.tokens())
    cut_then_merged = small.merge_and_unload()
    merged = copy.deepcopy(wrapped).merge_and_unload()
    merged_then_cut = apply(merged, plan, describe(merged))
    assert merged_then_cut.spec.fingerprint == applied.spec.fingerprint
    expected = dict(merged.named_parameters())
    for name, parameter in cut_then_merged.named_parameters():
        oracles.close(parameter.detach(), expected[name].detach(), name)
    oracles.close(cut_then_merged(tiny.tokens()).logits, logits)
    oracles.close(merged(tiny.tokens()).logits, logits)


@every_method
@pytest.mark.parametrize("options", LORAS.values(), ids=list(LORAS))
def test_11_lora_before_the_cut_is_lora_after_it(kind: type[Method], options: dict[str, Any]):
    wrapped = adapted("llama-gqa-bias", options)
    assert_lora_survives(wrapped, planned(kind, wrapped))


@pytest.mark.parametrize("name", [name for name in tiny.ONE_PER_FAMILY if name != "llama-gqa-bias"])
@pytest.mark.parametrize("options", [LORAS["plain"], LORAS["dora"]], ids=["lora", "dora"])
def test_11_lora_in_every_family(name: str, options: dict[str, Any]):
    wrapped = adapted(name, options)
    assert_lora_survives(wrapped, oracles.random_plan(describe(wrapped), 0))


def test_11_lora_at_layers_that_are_only_cut_on_one_side():
    wrapped = adapted("llama-gqa-bias", LORAS["dora"])
    assert_lora_survives(
        wrapped, oracles.plan_of(describe(wrapped), {"layers.1.mlp": range(5, 20)})
    )


def test_11_dora_needs_its_magnitudes_rescaled(monkeypatch: pytest.MonkeyPatch):
    """Negative control: dropping columns shrinks the row norms a magnitude is divided by."""
    from plprune.surgery import apply as surgery

    wrapped = adapted("llama-gqa-bias", LORAS["dora"])
    plan = oracles.plan_of(describe(wrapped), {"layers.1.mlp": range(5, 20)})
    monkeypatch.setattr(surgery, "_rescale_dora", lambda *_: None)
    with pytest.raises(AssertionError, match="logits"):
        oracles.assert_masked_equals_cut(wrapped, plan)


def test_11_factors_are_cut_at_the_same_entries(monkeypatch: pytest.MonkeyPatch):
    """Negative control: B cut at other rows than its linear."""
    from plprune.surgery import apply as surgery

    def with_a_slip(tensor, cuts, real=surgery.cut):
        turned = len(tensor) == 40 and tensor.shape[1:] == (4,)  # lora_B of gate and up
        return real(tensor.roll(1, 0) if turned else tensor, cuts)

    wrapped = adapted("llama-gqa-bias", LORAS["plain"])
    plan = oracles.plan_of(describe(wrapped), {"layers.1.mlp": range(5, 20)})
    monkeypatch.setattr(surgery, "cut", with_a_slip)
    with pytest.raises(AssertionError, match="logits"):
        oracles.assert_masked_equals_cut(wrapped, plan)


@pytest.mark.parametrize("dora", [False, True])
def test_11_two_adapters_on_transposed_weights(dora: bool, monkeypatch: pytest.MonkeyPatch):
    from peft import LoraConfig
    from peft.tuners.lora import LoraModel

    monkeypatch.setattr(families, "FAMILIES", (*families.FAMILIES, tiny.MICRO))
    targets = {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}
    configs = {name: LoraConfig(r=r, use_dora=dora, **targets) for name, r in (("a", 2), ("b", 3))}
    model = tiny.micro()
    tuner = LoraModel(model, configs, "a")
    tuner.inject_adapter(model, "b")
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if "lora_" in path and "magnitude" not in path:
                parameter.copy_(torch.randn(parameter.shape) * 0.3)
    spec = describe(model)
    plan = oracles.random_plan(spec, 0)
    for active in ("a", "b"):
        tuner.set_adapter(active)
        oracles.assert_masked_equals_cut(model, plan)


# --- 12, 13 --------------------------------------------------------------------------------------


@every_method
def test_12_bf16_decides_like_fp32(kind: type[Method]):
    half = tiny.model("llama-gqa-bias", dtype=torch.bfloat16)
    full = copy.deepcopy(half).float()
    plans = {dtype: planned(kind, model) for dtype, model in (("bf16", half), ("fp32", full))}
    assert all(s.dtype == torch.float32 for plan in plans.values() for s in plan.scores.values())
    assert plans["bf16"].got == plans["fp32"].got
    for one, two in zip(plans["bf16"].edits, plans["fp32"].edits, strict=True):
        score = plans["fp32"].scores[two.axis]
        moved = set(one.kept.tolist()) ^ set(two.kept.tolist())
        threshold = float(score[two.kept].min()) if len(two.kept) else float(score.max())
        # bf16 carries three digits: only units that close to the threshold may change sides.
        assert all(abs(float(score[unit]) - threshold) < 0.05 * threshold for unit in moved)


def undocumented(kind: type) -> list[str]:
    """Fields of a dataclass without a string below them."""
    (node,) = ast.parse(inspect.getsource(kind)).body
    missing = []
    for here, after in zip(node.body, [*node.body[1:], None], strict=True):
        if isinstance(here, ast.AnnAssign):
            value = after.value if isinstance(after, ast.Expr) else None
            if not (isinstance(value, ast.Constant) and isinstance(value.value, str)):
                missing.append(here.target.id)
    return missing


def card_errors(text: str) -> list[str]:
    """What the docstring of a method file lacks."""
    wanted = {
        "citation": r"arXiv \d{4}\.\d{4,5}|doi\.org/\S+",
        "formula": r"^ {4,}\S.* = ",
        "Not for": r"^Not for: \S",
    }
    return [name for name, pattern in wanted.items() if not re.search(pattern, text, re.MULTILINE)]


@every_kind
def test_13_method_card(kind: type[Method]):
    module = importlib.import_module(kind.__module__)
    assert card_errors(module.__doc__ or "") == []
    assert undocumented(kind) == []
    assert kind.__doc__
    assert not kind.__doc__.startswith(kind.__name__ + "("), (
        "the docstring dataclass makes up is not one"
    )
    assert kind.__dataclass_params__.frozen
    assert all(field.kw_only for field in dataclasses.fields(kind))
    json.dumps(kind().hyper())


def test_13_sees_what_is_missing():
    assert card_errors("Something.\n") == ["citation", "formula", "Not for"]
    assert undocumented(Undocumented) == ["b"]


class Undocumented:
    """For the negative control."""

    a: int = 0
    """Has one."""
    b: int = 0
    c: int = 0
    """Has one."""
