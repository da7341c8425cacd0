"""Losses of single cuts against the loss of the cut model; budgets spent where they say."""

import copy
from dataclasses import dataclass

import pytest
import torch

import oracles
import tiny
from plprune.allocation import GlobalThreshold, MeasuredLoss
from plprune.budget import Budget
from plprune.compensate import Compensation, LeastSquares, MeanBias
from plprune.count import price
from plprune.describe import describe
from plprune.drivers import looks
from plprune.drivers.batches import some
from plprune.drivers.compensated import Compensated
from plprune.drivers.looks import costs
from plprune.errors import ConfigError
from plprune.methods.base import Method, View
from plprune.methods.transact import TransAct
from plprune.plan import Keep, Plan
from plprune.select import top_units
from plprune.sensitivity import Setting, curves
from plprune.spec import Spec
from plprune.stats.base import Tap
from plprune.stats.losses import LossCurve, marginal_losses
from plprune.streaming.blocks import Held
from plprune.surgery.apply import apply

BATCHES = tiny.batches(2)


@dataclass(frozen=True)
class Chosen(Method):
    """Keeps given units of one axis."""

    axis: str
    kept: torch.Tensor
    looked_at: list
    skip_first_tokens: int = 2

    def taps(self, spec: Spec) -> tuple[Tap, ...]:
        return tuple(self.looked_at)

    def plan(self, view: View, budget: Budget) -> Plan:
        return Plan(
            edits=(Keep(axis=self.axis, kept=self.kept),),
            fingerprint=view.spec.fingerprint,
            method="x",
        )


def loss_of(model: torch.nn.Module, batches: list) -> float:
    total, count = 0.0, 0
    for batch in batches:
        mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
        with torch.no_grad():
            logits = model(**batch, use_cache=False).logits[:, :-1]
        logits = logits.float().flatten(0, 1)
        each = torch.nn.functional.cross_entropy(
            logits, batch["input_ids"][:, 1:].flatten(), reduction="none"
        )
        counts = (mask[:, 1:] & mask[:, :-1]).flatten().bool()
        total, count = total + float(each[counts].double().sum()), count + int(counts.sum())
    return total / count


def padded() -> list:
    mask = torch.ones_like(BATCHES[0]["input_ids"])
    mask[0, -3:] = 0
    return [{**BATCHES[0], "attention_mask": mask}, *BATCHES[1:]]


@pytest.mark.parametrize("name", ["llama-gqa", "phi3-gqa", "opt-mha", "gpt_neox-mha"])
def test_a_loss_is_that_of_the_cut_model(name: str):
    model = tiny.model(name).eval()
    spec = describe(model)
    generator = torch.Generator().manual_seed(0)
    scores = {
        axis.name: torch.rand(axis.size, generator=generator)
        for axis in spec.axes.values()
        if axis.kind in ("kv_group", "mlp")
    }
    seen: list[tuple[int, int]] = []
    found = curves(Held(model), padded(), scores, (0.5,), progress=lambda *at: seen.append(at))
    assert seen == [(1, 2), (2, 2)]
    assert found.keys() == scores.keys()
    for axis_name, curve in found.items():
        units = int(curve.units_G[0])
        kept = top_units(scores[axis_name], units)
        plan = Plan(
            edits=(Keep(axis=axis_name, kept=kept),), fingerprint=spec.fingerprint, method="x"
        )
        small = copy.deepcopy(model)
        apply(small, plan, spec)
        wanted = loss_of(small, padded()) - loss_of(model, padded())
        assert float(curve.increase_G()[0]) == pytest.approx(wanted, abs=2e-6)


@pytest.mark.parametrize("name", ["llama-gqa", "opt-mha"])
@pytest.mark.parametrize("compensation", [LeastSquares(), MeanBias()])
def test_a_compensated_loss_is_that_of_the_compensated_model(name: str, compensation: Compensation):
    model = tiny.model(name).eval()
    spec = describe(model)
    generator = torch.Generator().manual_seed(0)
    kinds = ("kv_group", "mlp")
    scores = {
        axis.name: torch.rand(axis.size, generator=generator)
        for axis in spec.axes.values()
        if axis.kind in kinds
    }
    setting = Setting(compensation=compensation, skip_first=2)
    found = curves(Held(model), padded(), scores, (0.5,), setting=setting)
    bare = curves(Held(model), padded(), scores, (0.5,))
    consumers = [Tap(module=n, stat=compensation.stat) for n in spec.consumers(kinds)]
    for axis_name, curve in found.items():
        method = Chosen(axis_name, top_units(scores[axis_name], int(curve.units_G[0])), consumers)
        plan = oracles.plan_by(
            Compensated(method=method, compensation=compensation), model, Budget(keep=0.5), padded()
        )
        small = copy.deepcopy(model)
        apply(small, plan, spec)
        wanted = loss_of(small, padded()) - loss_of(model, padded())
        assert float(curve.increase_G()[0]) == pytest.approx(wanted, abs=2e-6)
        assert float(bare[axis_name].increase_G()[0]) != pytest.approx(wanted, abs=2e-6)


def test_a_part_of_the_set_does_not_depend_on_its_batches():
    rows = torch.cat([batch["input_ids"] for batch in tiny.batches(3)])
    single, pair = ([{"input_ids": part} for part in rows.split(size)] for size in (1, 4))
    chosen = [torch.cat([b["input_ids"] for b in some(each, 3)]) for each in (single, pair)]
    assert torch.equal(*chosen)
    assert len(chosen[0]) == 3
    assert [len(some(single, count)) for count in (None, len(rows), 99)] == [len(rows)] * 3
    padded = [
        {
            "input_ids": torch.nn.functional.pad(row[None], (2, 0)),
            "attention_mask": torch.nn.functional.pad(torch.ones_like(row[None]), (2, 0)),
        }
        for row in rows
    ]
    kept = torch.cat([b["input_ids"] for b in some(padded, 3)])
    assert torch.equal(kept[:, 2:], chosen[0])


def curve(units: list[int], losses: list[float]) -> LossCurve:
    one = torch.tensor(1.0, dtype=torch.float64)
    return LossCurve(
        n=one,
        dense=one,
        loss_G=1 + torch.tensor(losses, dtype=torch.float64),
        units_G=torch.tensor(units, dtype=torch.float64),
    )


def test_marginal_losses_are_slopes_of_the_convex_hull():
    found = marginal_losses(curve([12, 8, 4], [4.0, 9.0, 24.0]), 16)
    assert bool((found[:-1] > found[1:]).all()), "the first unit is dearest"
    assert float(found[12:].mean()) == pytest.approx(1.0, rel=0.1)  # from 16 to 12: 4 for 4 units
    assert float(found[:2].mean()) == pytest.approx(15 / 4, rel=1e-3)
    bumpy = marginal_losses(curve([12, 8, 4], [9.0, 3.0, 24.0]), 16)
    assert float(bumpy[8:].mean()) < 9 / 4, "a bump is cut off"
    assert bool((bumpy[:-1] > bumpy[1:]).all())
    assert bool((marginal_losses(curve([12, 8], [-1.0, -2.0]), 16) >= 0).all())


def planted() -> torch.nn.Module:
    """Block 0 hardly uses its MLP."""
    model = tiny.model("llama-gqa").eval()
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight *= 1e-3
        model.model.layers[1].mlp.down_proj.weight *= 8
    return model


def test_the_budget_is_met_and_spent_where_the_loss_is():
    model = planted()
    spec = describe(model)
    budget = Budget(keep=0.7, base="prunable", widths={"kv_group": 3}, multiple_of={"mlp": 1})
    method = TransAct(allocation=MeasuredLoss())
    plan = oracles.plan_by(method, model, budget, BATCHES)
    first, second = plan.got["mlp"]
    assert first < second
    sizes = {edit.axis: len(edit.kept) for edit in plan.edits if isinstance(edit, Keep)}
    whole = price(spec, budget)
    assert price(spec, budget, sizes) <= 0.7 * whole
    one = whole - price(spec, budget, {"layers.0.mlp": spec.axes["layers.0.mlp"].size - 1})
    assert price(spec, budget, sizes) > 0.7 * whole - one


def doubled() -> torch.nn.Module:
    """Block 1 needs its MLP, but half of its channels would do."""
    model = tiny.model("llama-gqa").eval()
    mlp = model.model.layers[1].mlp
    half = mlp.down_proj.in_features // 2
    with torch.no_grad():
        mlp.gate_proj.weight[half:] = mlp.gate_proj.weight[:half]
        mlp.up_proj.weight[half:] = mlp.up_proj.weight[:half] / 100
        mlp.down_proj.weight *= 8
        mlp.down_proj.weight[:, half:] *= 100
    return model


def test_losses_are_asked_for_where_units_can_go():
    spec = describe(doubled())

    def asked(method: TransAct) -> set[str]:
        return {tap.module.rpartition(".")[2] for tap in method.taps(spec) if tap.stat.measured}

    allocation = MeasuredLoss()
    assert asked(TransAct(allocation=allocation)) == {"o_proj", "down_proj"}
    assert asked(TransAct(allocation=allocation, attention="none")) == {"down_proj"}
    assert asked(TransAct(allocation=allocation, mlp=False)) == {"o_proj"}


def test_losses_are_measured_on_some_sequences_and_after_compensation(
    monkeypatch: pytest.MonkeyPatch,
):
    seen: list[Setting] = []
    real = looks.measured

    def measured(source, batches, taps, scores, progress, setting):
        seen.append(setting)
        return real(source, batches, taps, scores, progress, setting)

    monkeypatch.setattr(looks, "measured", measured)
    method = TransAct(allocation=MeasuredLoss(sequences=1), skip_first_tokens=1)
    budget = Budget(keep=0.7, base="prunable", widths={"kv_group": 3}, multiple_of={"mlp": 1})
    refit = LeastSquares()
    plans = [
        oracles.plan_by(one, doubled(), budget, BATCHES)
        for one in (method, Compensated(method=method, compensation=refit))
    ]
    assert seen == [
        Setting(compensation=None, skip_first=1, sequences=1),
        Setting(compensation=refit, skip_first=1, sequences=1),
    ]
    bare, mended = (plan.got["mlp"][1] for plan in plans)
    assert mended < bare, "what a refit mends is cheap"
    with pytest.raises(ConfigError, match="sequences out of range"):
        MeasuredLoss(sequences=0)


def test_it_loses_less_than_a_threshold_on_scores():
    model = planted()
    budget = Budget(keep=0.7, base="prunable", widths={"kv_group": 3}, multiple_of={"mlp": 1})
    losses = {}
    for allocation in (MeasuredLoss(), GlobalThreshold()):
        small = copy.deepcopy(model)
        plan = oracles.plan_by(TransAct(allocation=allocation), small, budget, BATCHES)
        apply(small, plan, describe(small))
        losses[type(allocation).__name__] = loss_of(small, BATCHES)
    assert losses["MeasuredLoss"] < losses["GlobalThreshold"]


def test_divided_weights_are_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("plprune.drivers.looks.any_sharded", lambda _: True)
    model = tiny.model()
    tap = Tap(module="model.layers.0.mlp.down_proj", stat=LossCurve)
    with pytest.raises(ConfigError, match="losses of single cuts need complete weights"):
        costs(model, describe(model), [tap], {}, BATCHES)
