"""What every method that sets single weights to zero owes; a new file is tested without a line
here.
"""

import copy
from typing import Any

import pytest
import torch
from torch import nn

import tiny
from oracles import SPARSE
from plprune.budget import Budget
from plprune.describe import describe
from plprune.drivers.in_memory import prune_model
from plprune.errors import BudgetError, ConfigError, PlanError
from plprune.plan import Mask, Plan
from plprune.sparse import SparseMethod

every_method = pytest.mark.parametrize("kind", SPARSE, ids=[kind.__name__ for kind in SPARSE])
HALF = Budget(keep=0.5, base="prunable")


def pruned(
    kind: type[SparseMethod], model: nn.Module, budget: Budget | None = HALF, **given: Any
) -> list[Plan]:
    method = kind(**given.pop("settings", {}))
    budget = budget or method.own_budget()
    assert budget is not None
    return prune_model(model, method, budget, given.pop("batches", None) or tiny.batches())


def zeros(model: nn.Module) -> dict[str, int]:
    return {
        name: int((model.get_submodule(name).weight == 0).sum()) for name in describe(model).linears
    }


@every_method
@pytest.mark.parametrize("name", tiny.ONE_PER_FAMILY)
@pytest.mark.parametrize("keep", [0.5, 0.7])
def test_the_zeros_are_as_many_as_asked_and_nothing_else_changes(
    kind: type[SparseMethod], name: str, keep: float
):
    model = tiny.model(name)
    before, spec = copy.deepcopy(model.state_dict()), describe(model)
    pruned(kind, model, Budget(keep=keep, base="prunable"))
    weights = sum(linear.rows * linear.cols for linear in spec.linears.values())
    assert sum(zeros(model).values()) == -(-weights * round(10 * (1 - keep)) // 10)
    changed = {n for n, value in model.state_dict().items() if not torch.equal(before[n], value)}
    assert changed == {f"{name}.weight" for name in spec.linears}
    assert describe(model).fingerprint == spec.fingerprint


@every_method
def test_keep_everything(kind: type[SparseMethod]):
    model = tiny.model("llama-gqa-bias")
    before = copy.deepcopy(model.state_dict())
    plans = pruned(kind, model, Budget(keep=1.0, base="prunable"))
    assert all(plan.empty for plan in plans)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@every_method
@pytest.mark.parametrize("base", ["blocks", "non_embedding", "model"])
def test_a_budget_of_another_base_is_met_by_zeros(kind: type[SparseMethod], base: str):
    model = tiny.model("llama-gqa-bias")
    total = sum(p.numel() for p in model.parameters())
    pruned(kind, model, Budget(keep=0.7, base=base))
    spec = describe(model)
    outside = {"blocks": spec.embedding + spec.outside_rest, "non_embedding": spec.embedding}
    assert sum(zeros(model).values()) == -(-3 * (total - outside.get(base, 0)) // 10)


@every_method
@pytest.mark.parametrize("name", ["llama-gqa", "phi3-gqa", "opt-mha-tied"])
@pytest.mark.parametrize("pattern", ["2:4", "4:8", "1:4", "3:4"])
def test_n_of_m_keeps_n(kind: type[SparseMethod], name: str, pattern: str):
    n, m = map(int, pattern.split(":"))
    model = tiny.model(name)
    pruned(kind, model, None, settings={"pattern": pattern})
    for linear in describe(model).linears:
        weight = model.get_submodule(linear).weight
        assert bool(((weight != 0).reshape(-1, m).sum(1) == n).all()), linear


@every_method
def test_batches_and_order_do_not_matter(kind: type[SparseMethod]):
    batches = tiny.batches(4)
    rows = [{"input_ids": row[None]} for batch in batches for row in batch["input_ids"]]
    packed = [{"input_ids": torch.cat([batch["input_ids"] for batch in batches])}]
    models = []
    for given in (batches, batches[::-1], rows, packed):
        models.append(tiny.model("llama-gqa-bias"))
        pruned(kind, models[-1], batches=given)
    first = models[0].state_dict()
    for other in models[1:]:
        for name, value in other.state_dict().items():
            assert torch.equal(value == 0, first[name] == 0), name
            torch.testing.assert_close(value, first[name], rtol=1e-9, atol=1e-12)


@every_method
def test_padding_does_not_matter(kind: type[SparseMethod]):
    ids = tiny.tokens(2, 12)
    padded = torch.cat([ids, torch.full((2, 5), 3)], 1)
    mask = torch.cat([torch.ones(2, 12), torch.zeros(2, 5)], 1).long()
    models = []
    for batch in ({"input_ids": ids}, {"input_ids": padded, "attention_mask": mask}):
        models.append(tiny.model("llama-gqa-bias"))
        pruned(kind, models[-1], batches=[batch])
    one, two = (model.state_dict() for model in models)
    assert all(torch.equal(one[name] == 0, two[name] == 0) for name in one)


@every_method
def test_what_is_asked_of_later_blocks_depends_on_earlier_ones(kind: type[SparseMethod]):
    """The second block is judged on what the pruned first one makes of the text."""
    if not kind().needs_data:
        pytest.skip("looks at no data")
    model, other = tiny.model("llama-gqa"), tiny.model("llama-gqa")
    with torch.no_grad():
        for parameter in other.model.layers[0].parameters():
            parameter.copy_(parameter.roll(1, 0))
    plans = [
        [e for plan in pruned(kind, one) for e in plan.edits if isinstance(e, Mask)]
        for one in (model, other)
    ]
    last = [edits[-1] for edits in plans]
    assert last[0].module == last[1].module
    assert last[0].module.startswith("model.layers.1.")
    assert not torch.equal(last[0].keep, last[1].keep)


@every_method
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_refused(kind: type[SparseMethod], value: float):
    model = tiny.model("llama-gqa-bias")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] = value
    with pytest.raises(PlanError, match="not finite"):
        pruned(kind, model)


@every_method
def test_budgets_that_zeros_cannot_meet_are_refused(kind: type[SparseMethod]):
    model = tiny.model("llama-gqa")
    for budget, words in (
        (Budget(keep=0.5, of="flops"), "zeros cannot meet"),
        (Budget(widths={"mlp": 20}), "zeros cannot meet"),
        (Budget(keep=0.01, base="model"), "no zeros in the linears"),
    ):
        with pytest.raises(BudgetError, match=words):
            pruned(kind, model, budget)


@every_method
@pytest.mark.parametrize("pattern", ["4:2", "2:2", "0:4", "columns", "2-4"])
def test_patterns_that_are_none_are_refused(kind: type[SparseMethod], pattern: str):
    with pytest.raises(ConfigError, match=r"unknown method.pattern.*N kept of every M"):
        kind(pattern=pattern)


@every_method
def test_a_pattern_refuses_another_budget_and_odd_widths(kind: type[SparseMethod]):
    spec = describe(tiny.model("llama-gqa"))
    with pytest.raises(BudgetError, match="budget of its own"):
        kind(pattern="2:4").widths(spec, Budget(keep=0.6, base="prunable"))
    with pytest.raises(BudgetError, match="does not fit the model"):
        kind(pattern="4:16").widths(spec, Budget(keep=0.25, base="prunable"))
