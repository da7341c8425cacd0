"""A method with a compensation: what is observed, written and left alone."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

import oracles
import tiny
from plprune.allocation import GlobalThreshold
from plprune.budget import Budget
from plprune.compensate import Compensation, LeastSquares, MeanBias
from plprune.count import count_params
from plprune.describe import describe
from plprune.drivers import compensated
from plprune.drivers.compensated import Compensated
from plprune.errors import BudgetError, PlanError
from plprune.lora import inject
from plprune.methods.base import Method
from plprune.methods.transact import TransAct
from plprune.plan import Keep, Plan, Write
from plprune.stats.gram import Gram
from plprune.surgery.apply import apply
from plprune.surgery.lower import lower
from plprune.surgery.written import bias_of, new_values, weight_of

BUDGET = Budget(widths={"mlp": 24})
MLP = TransAct(attention="none")
RIDGE = 0.05
REFIT = Compensated(method=MLP, compensation=LeastSquares(ridge=RIDGE))
DOWN = "model.layers.{}.mlp.down_proj"


def randomise(model: nn.Module) -> None:
    """Adapters that do something."""
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            generator = torch.Generator().manual_seed(len(name))
            with torch.no_grad():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)


def adapted(name: str = "llama-gqa", **config: Any) -> tuple[nn.Module, Any]:
    """A model with adapters on every linear."""
    model = tiny.model(name)
    injected = inject(model, {"r": 3, "lora_alpha": 6, **config})
    randomise(model)
    return model, injected


def lost(model: nn.Module, plan: Plan) -> list[float]:
    """Squared change of the output of every consumer on its dense inputs, relative."""
    spec, small = describe(model), copy.deepcopy(model)
    paths = sorted({m for (m, side) in lower(plan, spec) if side == "in"})
    with torch.no_grad(), oracles.recorded(model, paths) as inputs:
        for batch in tiny.batches():
            model(**batch)
    keeps = {m: keep for (m, side), keep in lower(plan, spec).items() if side == "in"}
    apply(small, plan, spec)
    found = []
    for path in paths:
        x = torch.cat([i.reshape(-1, i.shape[-1]) for i in inputs[path]])
        with torch.no_grad():
            before, after = (
                model.get_submodule(path)(x),
                small.get_submodule(path)(x[:, keeps[path]]),
            )
        found.append(float((before - after).square().sum() / before.square().sum()))
    return found


@pytest.mark.parametrize("name", list(tiny.VARIANTS))
def test_every_consumer_loses_less(name: str):
    model = tiny.model(name)
    method = TransAct()
    budget = Budget(keep=0.6, base="prunable", multiple_of={"mlp": 4})
    refit = Compensated(method=method, compensation=LeastSquares(ridge=1e-6))
    plain, better = (oracles.plan_by(m, model, budget) for m in (method, refit))
    keeps = [
        {e.axis: e.kept.tolist() for e in p.edits if isinstance(e, Keep)} for p in (plain, better)
    ]
    assert keeps[0] == keeps[1]
    losing = {m for (m, side), keep in lower(plain, describe(model)).items() if side == "in"}
    assert {e.module for e in better.edits if isinstance(e, Write)} == losing
    assert all(b < a for a, b in zip(lost(model, plain), lost(model, better), strict=True))
    assert plain.hash != better.hash


def test_names_and_settings_are_those_of_both():
    plan = oracles.plan_by(REFIT, tiny.model(), BUDGET)
    assert plan.method == REFIT.label == "TransAct + LeastSquares"
    assert plan.hyper == REFIT.hyper()
    assert plan.hyper["attention"] == "none"
    assert plan.hyper["compensation"] == {
        "class": "LeastSquares",
        "ridge": RIDGE,
        "add_bias": False,
        "drift": 0.0,
    }


def test_it_observes_only_what_can_lose_inputs():
    spec = describe(tiny.model())
    grams = [tap.module for tap in REFIT.taps(spec) if tap.stat is Gram]
    assert grams == [DOWN.format(0), DOWN.format(1)]
    both = Compensated(method=TransAct(skip_first_tokens=2), compensation=LeastSquares())
    assert len([tap for tap in both.taps(spec) if tap.stat is Gram]) == 4
    assert both.skip_first_tokens == 2


def test_what_is_kept_whole_is_not_touched():
    model = tiny.model()
    plan = oracles.plan_by(REFIT, model, Budget(widths={"mlp": tiny.FFN}))
    assert plan.empty
    plan = oracles.plan_by(REFIT, model, BUDGET)
    small = copy.deepcopy(model)
    apply(small, plan, describe(model))
    now = dict(small.named_parameters())
    for name, before in model.named_parameters():
        if ".mlp." not in name:
            assert torch.equal(now[name], before), name


def test_masked_is_cut_and_the_weights_are_the_written_ones():
    model = tiny.model("llama-gqa-bias")
    plan = oracles.plan_by(REFIT, model, BUDGET)
    spec = describe(model)
    written = copy.deepcopy(model)
    with torch.no_grad():
        for parameter, values in new_values(written, plan):
            parameter.copy_(values)
    keep_only = Plan(
        edits=tuple(e for e in plan.edits if isinstance(e, Keep)),
        fingerprint=plan.fingerprint,
        method="test",
    )
    expected, _ = oracles.assert_masked_equals_cut(written, keep_only)
    small = copy.deepcopy(model)
    apply(small, plan, spec)
    assert all(
        torch.equal(a, b)
        for a, b in zip(small.state_dict().values(), expected.state_dict().values(), strict=True)
    )
    assert len([e for e in plan.edits if isinstance(e, Write) and e.bias is not None]) == 2


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("llama-gqa", {}),
        ("llama-gqa", {"use_rslora": True}),
        ("llama-gqa-bias", {"lora_bias": True}),
    ],
)
def test_adapters_before_the_cut_are_adapters_merged(name: str, config: dict[str, Any]):
    """Refitted under its adapters, the model computes what the merged one does, refitted."""
    model, injected = adapted(name, **config)
    whole = copy.deepcopy(model)
    plan = oracles.plan_by(REFIT, model, BUDGET)
    apply(model, plan, describe(model))
    for module in whole.modules():
        if hasattr(module, "base_layer"):
            module.merge()
    spec = describe(whole)
    merged_plan = oracles.plan_by(REFIT, whole, BUDGET)
    apply(whole, merged_plan, spec)
    oracles.close(model(tiny.tokens()).logits, whole(tiny.tokens()).logits)
    del injected


def test_adapters_that_are_not_looked_at_are_noticed(monkeypatch: pytest.MonkeyPatch):
    """Negative control: refitting the base weights alone is something else."""
    model, _ = adapted()
    plan = oracles.plan_by(REFIT, model, BUDGET)
    monkeypatch.setattr("plprune.surgery.written._deltas", lambda module: iter(()))
    other = oracles.plan_by(REFIT, model, BUDGET)
    pairs = zip(plan.edits, other.edits, strict=True)
    far = [float((a.weight - b.weight).abs().max()) for a, b in pairs if isinstance(a, Write)]
    assert min(far) > 1e-3


def test_weights_and_biases_are_what_a_linear_computes_with():
    model, _ = adapted("llama-gqa-bias")
    layer = model.get_submodule(DOWN.format(0))
    x = torch.randn(7, tiny.FFN, dtype=torch.float64)
    oracles.close(x @ weight_of(layer).T + bias_of(layer), layer(x))
    layer.merge()
    oracles.close(x @ weight_of(layer).T + bias_of(layer), layer(x))


def test_transposed_weights_are_read_and_written_by_rows():
    from transformers.pytorch_utils import Conv1D

    layer = Conv1D(5, 3).double()
    rows_by_columns = weight_of(layer)
    assert rows_by_columns.shape == (5, 3)
    x = torch.randn(4, 3, dtype=torch.float64)
    oracles.close(x @ rows_by_columns.T + bias_of(layer), layer(x))
    edit = Write(module="0", weight=torch.arange(15.0).reshape(5, 3))
    plan = Plan(edits=(edit,), fingerprint="", method="test")
    ((parameter, values),) = new_values(nn.Sequential(layer), plan)
    assert parameter is layer.weight
    assert torch.equal(values, torch.arange(15.0, dtype=torch.float64).reshape(5, 3).T)


def test_dora_is_refused_with_the_way_out():
    model, _ = adapted(use_dora=True)
    plan, before = oracles.plan_by(REFIT, model, BUDGET), copy.deepcopy(model.state_dict())
    with pytest.raises(PlanError, match=r"DoRA adapters cannot be refitted.*use_dora.*after the"):
        apply(model, plan, describe(model))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_bfloat16_weights_get_rounded_values_and_stay_bfloat16():
    model = tiny.model(dtype=torch.bfloat16)
    plan = oracles.plan_by(REFIT, model, BUDGET)
    writes = [edit for edit in plan.edits if isinstance(edit, Write)]
    assert {edit.weight.dtype for edit in writes if edit.weight is not None} == {torch.float32}
    apply(model, plan, describe(tiny.model(dtype=torch.bfloat16)))
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("base", ["prunable", "blocks", "non_embedding", "model"])
@pytest.mark.parametrize("compensation", [MeanBias(), LeastSquares(add_bias=True)])
def test_biases_that_are_added_are_paid_for(compensation: Compensation, base: Any):
    keep = 0.97 if base == "model" else 0.7
    budget = Budget(keep=keep, base=base, multiple_of={"mlp": 1})

    def left(method: Method) -> float:
        model = tiny.model("llama-gqa")
        dense = count_params(describe(model)).of(base)
        plan = oracles.plan_by(method, model, budget)
        assert plan.asked == budget
        return count_params(apply(model, plan, describe(model)).spec).of(base) / dense

    method = TransAct(allocation=GlobalThreshold())
    found = left(Compensated(method=method, compensation=compensation))
    # Linears that lose nothing got no bias: some of the budget may be left, less than a unit more.
    assert keep - 0.03 < found <= keep
    assert left(method) <= keep


def test_biases_that_are_not_paid_for_are_noticed(monkeypatch: pytest.MonkeyPatch):
    """The test above sees them: this many exceed a budget that is met to the last unit."""
    monkeypatch.setattr(compensated, "less_biases", lambda *given: given[-1])
    model, small = tiny.model("llama-gqa"), tiny.model("llama-gqa")
    spec = describe(model)
    apply(small, oracles.plan_by(MLP, small, BUDGET), spec)
    most = count_params(describe(small)).prunable
    budget = Budget(
        keep=most / count_params(spec).prunable, base="prunable", multiple_of={"mlp": 1}
    )
    method = Compensated(method=MLP, compensation=MeanBias())
    found = apply(model, oracles.plan_by(method, model, budget), spec).spec
    assert count_params(found).prunable > most


def test_a_budget_below_the_biases():
    spec = describe(tiny.model("llama-gqa"))
    method = Compensated(method=MLP, compensation=MeanBias())
    with pytest.raises(BudgetError, match="the biases of the compensation alone exceed the budget"):
        method.widths(spec, Budget(keep=1e-4, base="prunable"))
