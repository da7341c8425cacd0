"""Blocks with more outliers lose less: D as it is defined, budgets met, nothing else matters."""

import copy
import json
import math
from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import oracles
import tiny
from interrupted import Killed, killed_at
from plprune.allocation import Allocation, GlobalThreshold, MeasuredLoss, Uniform
from plprune.budget import Budget
from plprune.count import price
from plprune.describe import describe
from plprune.drivers.in_memory import prune_model
from plprune.drivers.job import Job
from plprune.drivers.one_shot import prune
from plprune.drivers.whole import calibrate, view_of
from plprune.errors import BudgetError, ConfigError, ExportError
from plprune.methods.flap import FLAP
from plprune.methods.magnitude import Magnitude
from plprune.methods.random import Random
from plprune.methods.sparsegpt import SparseGPT
from plprune.methods.transact import TransAct
from plprune.methods.wanda import Wanda
from plprune.outliers import OutlierWeighed
from plprune.plan import Keep, Plan
from plprune.sparse import SparseMethod
from plprune.spec import Spec
from plprune.surgery.apply import apply
from plprune.surgery.lower import lower

HALF = Budget(keep=0.5, base="prunable")
OWL = OutlierWeighed(threshold=5.0, spread=0.1)
METHODS = [
    Magnitude(allocation=OWL),
    Wanda(allocation=OWL),
    Wanda(allocation=OWL, pattern="layer"),
    Wanda(allocation=OWL, variable_rows=True),
    SparseGPT(allocation=OWL),
    SparseGPT(allocation=OWL, true_sequential=True),
]
NAMES = ["magnitude", "wanda", "wanda layer", "wanda rows", "sparsegpt", "sparsegpt sequential"]
every_method = pytest.mark.parametrize("method", METHODS, ids=NAMES)


def planted(block: int = 3, blocks: int = 5, **changes: Any) -> Any:
    """One block has large weights here and there."""
    model = tiny.model("llama-gqa", num_hidden_layers=blocks, **changes)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for linear in describe(model).of_block(block).linears:
            weight = model.get_submodule(linear).weight
            weight[torch.rand(weight.shape, generator=generator) < 0.05] *= 12
    return model


def outlier_shares(model: nn.Module, threshold: float, batches: Any) -> list[float]:
    """D from all activations, in float64, by the formula."""
    spec = describe(model)
    with oracles.recorded(model, spec.linears) as seen, torch.no_grad():
        for batch in batches:
            model(**batch)
    found = []
    for block in range(len(spec.blocks)):
        scores = torch.cat(
            [
                (
                    model.get_submodule(name).weight.detach().abs()
                    * torch.cat([x.reshape(-1, x.shape[-1]) for x in seen[name]]).norm(dim=0)
                ).flatten()
                for name in spec.of_block(block).linears
            ]
        )
        found.append(float((scores > threshold * scores.mean()).double().mean()))
    return found


def notes_of(model: nn.Module, allocation: Allocation, batches: Any) -> dict[int, float]:
    spec, method = describe(model), TransAct(allocation=allocation)
    return allocation.notes(view_of(model, spec, calibrate(model, spec, method, batches)))


def zeros(model: nn.Module) -> dict[int, int]:
    """By block."""
    found: dict[int, int] = {}
    for name, linear in describe(model).linears.items():
        zero = int((model.get_submodule(name).weight == 0).sum())
        found[linear.block] = found.get(linear.block, 0) + zero
    return found


def weights(spec: Spec) -> dict[int, int]:
    """By block."""
    found: dict[int, int] = {}
    for linear in spec.linears.values():
        found[linear.block] = found.get(linear.block, 0) + linear.rows * linear.cols
    return found


# --- what D is -----------------------------------------------------------------------------------


@pytest.mark.parametrize("threshold", [1.5, 3.0, 5.0])
@pytest.mark.parametrize("name", ["llama-gqa", "phi3-gqa", "opt-mha-tied", "gpt_neox-mha"])
def test_the_share_of_outliers_is_that_of_the_formula(name: str, threshold: float):
    model, batches = tiny.model(name), tiny.batches(3)
    expected = outlier_shares(model, threshold, batches)
    found = notes_of(model, OutlierWeighed(threshold=threshold), batches)
    assert found == pytest.approx(dict(enumerate(expected)), abs=1e-12)
    assert threshold > 3 or min(expected) > 0


def test_the_oracle_sees_another_threshold_and_other_weights():
    model, batches = planted(), tiny.batches(2)
    expected = outlier_shares(model, OWL.threshold, batches)
    for other in (OutlierWeighed(threshold=5.2), OutlierWeighed(threshold=4.8)):
        assert list(notes_of(model, other, batches).values()) != pytest.approx(expected, abs=1e-9)
    with torch.no_grad():
        model.model.layers[1].mlp.gate_proj.weight[0] *= 9
    assert notes_of(model, OWL, batches)[1] != pytest.approx(expected[1], abs=1e-9)


def test_padding_and_first_tokens_that_do_not_count_do_not_count():
    ids = tiny.tokens(2, 12)
    padded = torch.cat([ids, torch.full((2, 5), 3)], 1)
    mask = torch.cat([torch.ones(2, 12), torch.zeros(2, 5)], 1).long()
    model = planted()
    one = notes_of(model, OWL, [{"input_ids": ids}])
    assert notes_of(model, OWL, [{"input_ids": padded, "attention_mask": mask}]) == one
    assert notes_of(model, OWL, [{"input_ids": padded}]) != one


def test_what_is_masked_is_not_there():
    """The plan of a masked model is that of the cut one."""
    model, batches = planted(), tiny.batches(2)
    spec = describe(model)
    plan = oracles.random_plan(spec, 4)
    small = copy.deepcopy(model)
    cut = apply(small, plan, spec).spec
    masked = spec.cut(lower(plan, spec), physical=False)
    method = Random(allocation=OWL)
    budget = Budget(keep=0.8, base="prunable", multiple_of={})
    with oracles.masked(model, lower(plan, spec)):
        found = method.plan(
            view_of(model, masked, calibrate(model, masked, method, batches)), budget
        )
    expected = method.plan(view_of(small, cut, calibrate(small, cut, method, batches)), budget)
    assert found.hash == expected.hash
    assert found.got == expected.got


# --- from D to what every block loses ------------------------------------------------------------

SPEC = describe(tiny.meta("llama-gqa", num_hidden_layers=6))


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    shares=st.lists(st.floats(0, 0.3), min_size=6, max_size=6),
    drop=st.floats(0, 0.999),
    spread=st.floats(0, 0.99),
)
def test_sparsities_are_within_bounds_around_an_exact_mean(
    shares: list[float], drop: float, spread: float
):
    allocation = OutlierWeighed(spread=spread)
    found = allocation.shares(SPEC, dict(enumerate(shares)), drop)
    by_block = [found[f"model.layers.{block}.mlp.up_proj"] for block in range(6)]
    assert sum(by_block) / 6 == pytest.approx(drop, abs=1e-9)
    assert all(drop - spread - 1e-9 <= one <= drop + spread + 1e-9 for one in by_block)
    assert all(-1e-9 <= one < 1 for one in by_block)
    assert len({round(one, 12) for one in found.values()}) <= 6
    order = sorted(range(6), key=lambda block: shares[block])
    falling = [by_block[block] for block in order]
    assert all(a >= b - 1e-9 for a, b in pairwise(falling))
    if 0.1 < drop < 0.8 and spread and max(shares) - min(shares) > 1e-6:
        reach = min(spread, drop, (1 - drop) / 2)
        assert max(abs(one - drop) for one in by_block) == pytest.approx(reach)


def test_blocks_of_other_sizes_count_by_their_weights():
    spec = describe(tiny.model("llama-gqa", num_hidden_layers=3))
    kept = {"layers.1.mlp": list(range(5))}
    cut = spec.cut(lower(oracles.plan_of(spec, kept), spec), physical=True)
    tilts = OWL.tilts(cut, {0: 0.1, 1: 0.3, 2: 0.0})
    sizes = weights(cut)
    assert sizes[1] < sizes[0]
    assert sum(tilts[block] * sizes[block] for block in tilts) == pytest.approx(0, abs=1e-9)
    assert max(map(abs, tilts.values())) == 1


@every_method
@pytest.mark.parametrize("keep", [0.3, 0.5, 0.7])
def test_zeros_are_as_many_as_asked_and_fewer_where_outliers_are(method: SparseMethod, keep: float):
    model, batches = planted(), tiny.batches(2)
    spec = describe(model)
    notes = dict(enumerate(outlier_shares(model, OWL.threshold, batches)))
    expected = OWL.shares(spec, notes, 1 - keep)
    prune_model(model, method, Budget(keep=keep, base="prunable"), batches)
    found, sizes = zeros(model), weights(spec)
    assert sum(found.values()) == math.ceil((1 - keep) * sum(sizes.values()) - 1e-6)
    for block, zero in found.items():
        wanted = expected[f"model.layers.{block}.mlp.up_proj"]
        # Every linear may be rounded by a weight.
        assert abs(zero - wanted * sizes[block]) <= 8
    assert min(found, key=found.__getitem__) == 3, "the block with planted outliers"
    assert found[3] / sizes[3] == pytest.approx(1 - keep - 0.1, abs=1e-3)


@every_method
def test_equal_outliers_are_uniform(method: SparseMethod):
    """Blocks that are alike but for noise below the threshold: D is 0 everywhere."""
    none = replace(method, allocation=replace(OWL, threshold=1e6))
    models = [tiny.model("llama-gqa", num_hidden_layers=3) for _ in range(2)]
    prune_model(models[0], none, HALF, tiny.batches(2))
    prune_model(models[1], replace(method, allocation=Uniform()), HALF, tiny.batches(2))
    one, two = (model.state_dict() for model in models)
    assert all(torch.equal(one[name], two[name]) for name in one)


@every_method
def test_batches_and_order_do_not_matter(method: SparseMethod):
    batches = tiny.batches(4)
    rows = [{"input_ids": row[None]} for batch in batches for row in batch["input_ids"]]
    models = []
    for given_batches in (batches, batches[::-1], rows):
        models.append(planted())
        prune_model(models[-1], method, HALF, given_batches)
    first = models[0].state_dict()
    for other in models[1:]:
        assert all(torch.equal(first[n] == 0, v == 0) for n, v in other.state_dict().items())


def test_it_is_the_dense_model_that_says_how_much_goes():
    """Not what pruned blocks make of the text: a second, later block decides alike."""
    model, batches = planted(), tiny.batches(2)
    dense = outlier_shares(model, OWL.threshold, batches)
    prune_model(model, Wanda(allocation=OWL), Budget(keep=0.4, base="prunable"), batches)
    assert outlier_shares(model, OWL.threshold, batches) != pytest.approx(dense, abs=1e-6)


@pytest.mark.parametrize("method", [Magnitude, Wanda, SparseGPT])
def test_spared_blocks_keep_every_weight(method: type[SparseMethod]):
    model = tiny.model("llama-gqa", num_hidden_layers=4)
    spec = describe(model)
    chosen = method(allocation=Uniform(spare=(1, 1)))
    prune_model(model, chosen, Budget(keep=0.7, base="prunable"), tiny.batches(2))
    found, sizes = zeros(model), weights(spec)
    assert found[0] == found[3] == 0
    assert sum(found.values()) == math.ceil(0.3 * sum(sizes.values()) - 1e-6)
    with pytest.raises(BudgetError, match="that the allocation does not spare"):
        prune_model(model, chosen, Budget(keep=0.45, base="prunable"), tiny.batches(2))


# --- widths --------------------------------------------------------------------------------------


def plan_with(model: nn.Module, allocation: Allocation, budget: Budget, kind: Any = Random) -> Plan:
    return oracles.plan_by(kind(allocation=allocation), model, budget, tiny.batches(2))


def sizes_in(plan: Plan) -> dict[str, int]:
    return {edit.axis: len(edit.kept) for edit in plan.edits if isinstance(edit, Keep)}


@pytest.mark.parametrize("kind", [Random, FLAP, TransAct])
@pytest.mark.parametrize("keep", [0.5, 0.7, 0.9])
@pytest.mark.parametrize("multiple", [1, 4])
def test_widths_are_the_largest_within_the_budget(kind: Any, keep: float, multiple: int):
    model = planted()
    spec = describe(model)
    budget = Budget(keep=keep, base="prunable", multiple_of={"mlp": multiple})
    plan = plan_with(model, OWL, budget, kind)
    sizes = {n: a.size for n, a in spec.axes.items() if a.kind in plan.got} | sizes_in(plan)
    target = keep * price(spec, budget)
    assert price(spec, budget, sizes) <= target * (1 + 1e-12)
    for name, size in sizes.items():
        axis = spec.axes[name]
        step = axis.groups * budget.multiple_of.get(axis.kind, 1)
        if size < axis.size:
            wider = {**sizes, name: min(axis.size, size + step)}
            assert price(spec, budget, wider) > target, f"{name} could be wider"
    assert plan.got["mlp"][3] == max(plan.got["mlp"]), "the block with planted outliers"
    assert len(set(plan.got["mlp"])) > 1


def test_widths_are_within_the_bounds():
    model = planted(intermediate_size=400)
    spec = describe(model)
    budget = Budget(keep=0.6, base="prunable", widths={"kv_group": 3}, multiple_of={})
    plan = plan_with(model, OWL, budget)
    even = plan_with(model, Uniform(), budget).got["mlp"][0] / 400
    tilts = OWL.tilts(spec, notes_of(model, OWL, tiny.batches(2)))
    shares = [width / 400 for width in plan.got["mlp"]]
    # Blocks are of one size, so that the mean is the uniform width.
    assert sum(shares) / 5 == pytest.approx(even, abs=1 / 400)
    for block, share in enumerate(shares):
        assert share == pytest.approx(even + OWL.spread * tilts[block], abs=1.5 / 400)


@pytest.mark.parametrize("keep", [0.45, 0.6, 0.8])
@pytest.mark.parametrize("multiple", [1, 8])
def test_widths_of_equal_outliers_are_uniform_but_for_what_multiples_leave(
    keep: float, multiple: int
):
    model = tiny.model("llama-gqa", num_hidden_layers=4)
    budget = Budget(keep=keep, base="prunable", multiple_of={"mlp": multiple})
    found = plan_with(model, replace(OWL, threshold=1e6), budget).got
    expected = plan_with(model, Uniform(), budget).got
    for kind, step in (("kv_group", 1), ("mlp", multiple)):
        for width, even in zip(found[kind], expected[kind], strict=True):
            assert width - even in (0, step)
    # Negative control: they are not when outliers differ.
    assert plan_with(planted(blocks=4), OWL, budget).got["mlp"] != found["mlp"]


def test_other_quantities_and_fixed_widths_are_met():
    model = planted()
    spec = describe(model)
    for budget in (
        Budget(keep=0.8, of="flops", base="blocks", multiple_of={}, context=64),
        Budget(keep=0.9, base="model", multiple_of={}),
        Budget(keep=0.7, base="prunable", widths={"kv_group": 2}, multiple_of={}),
    ):
        plan = plan_with(model, OWL, budget)
        got = price(spec, budget, sizes_in(plan)) / price(spec, budget)
        assert budget.keep - 0.01 < got <= budget.keep * (1 + 1e-12)
    assert plan.got["kv_group"] == (2,) * 5
    with pytest.raises(BudgetError, match="no widths meet the budget"):
        plan_with(model, OWL, Budget(keep=0.01, base="prunable"))
    with pytest.raises(BudgetError, match="needs a share to keep"):
        plan_with(model, OWL, Budget(widths={"mlp": 8}))


# --- a folder ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("dense")
    planted(dtype=torch.float32).save_pretrained(found)
    return found


JOBS: dict[str, dict[str, Any]] = {
    "magnitude": {"method": Magnitude(allocation=OWL), "budget": HALF},
    "wanda": {"method": Wanda(allocation=OWL), "budget": HALF},
    "sparsegpt": {"method": SparseGPT(allocation=OWL, true_sequential=True), "budget": HALF},
    "random": {
        "method": Random(allocation=OWL),
        "budget": Budget(keep=0.7, base="prunable", multiple_of={"mlp": 4}),
    },
}
every_job = pytest.mark.parametrize("name", list(JOBS))


def pruned(folder: Path, target: Path, name: str, **changed: Any) -> Mapping[str, Tensor]:
    job = Job(folder=folder, target=target, **{"batches": tiny.batches(3), **JOBS[name], **changed})
    done = prune(job)
    return {tensor: done.read(tensor) for tensor in done.source.places}


def assert_equal(one: Mapping[str, Tensor], two: Mapping[str, Tensor]) -> None:
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("name", ["magnitude", "wanda", "sparsegpt"])
def test_from_files_is_in_memory(folder: Path, tmp_path: Path, name: str):
    found = pruned(folder, tmp_path / "out", name)
    model = planted(dtype=torch.float32)
    prune_model(model, JOBS[name]["method"], HALF, tiny.batches(3))
    assert_equal(found, model.state_dict())
    assert zeros(model)[3] < min(zero for block, zero in zeros(model).items() if block != 3)


@pytest.mark.parametrize("name", ["magnitude", "wanda", "sparsegpt"])
@pytest.mark.parametrize("on_disk", [False, True])
@pytest.mark.parametrize(("what", "number"), [("keep_note", 0), ("keep_note", 3), ("keep", 2)])
def test_a_run_goes_on_where_it_was_killed(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, on_disk: bool,
    what: str, number: int,
):  # fmt: skip
    expected = pruned(folder, tmp_path / "whole", name)
    with monkeypatch.context() as patch:
        killed_at(patch, what, number)
        with pytest.raises(Killed):
            pruned(folder, tmp_path / "half", name, hidden_on_disk=on_disk)
    notes = tmp_path / ".half.unfinished" / "notes.json"
    known = json.loads(notes.read_text("utf-8")) if notes.is_file() else []
    assert len(known) == (number if what == "keep_note" else 5)
    looked: list[int] = []

    def shown(title: str) -> Any:
        first = title == "a first look over the dense model"
        return lambda done, total: looked.append(done) if first else None

    found = pruned(folder, tmp_path / "half", name, hidden_on_disk=on_disk, shown=shown)
    assert_equal(found, expected)
    assert looked == list(range(len(known) + 1, 6)), "blocks that were noted are not looked at"


def test_another_spread_is_not_continued(folder: Path, tmp_path: Path):
    pruned(folder, tmp_path / "out", "wanda")
    other = Wanda(allocation=replace(OWL, spread=0.05))
    with pytest.raises(ExportError, match="other settings is in the way: given hyper"):
        pruned(folder, tmp_path / "out", "wanda", method=other)


def test_a_pattern_refuses_another_budget(folder: Path, tmp_path: Path):
    with pytest.raises(BudgetError, match="the pattern 2:4 has a budget of its own"):
        prune(
            Job(
                folder=folder,
                target=tmp_path / "out",
                method=Magnitude(pattern="2:4"),
                budget=Budget(keep=0.6, base="prunable"),
            )
        )
    assert not any(tmp_path.iterdir())


# --- what can go wrong ---------------------------------------------------------------------------


@pytest.mark.parametrize("method", [Magnitude, Wanda, SparseGPT])
def test_patterns_and_allocations_that_do_not_go_together_are_refused(method: type[SparseMethod]):
    for allocation in (OWL, Uniform(spare=(1, 0))):
        with pytest.raises(ConfigError, match=r"pattern: 2:4 fixes how much of every linear goes"):
            method(pattern="2:4", allocation=allocation)
    for other in (GlobalThreshold(), MeasuredLoss()):
        with pytest.raises(ConfigError, match=r"does not divide single weights: .* Uniform, Outl"):
            method(allocation=other)
    with pytest.raises(ConfigError, match=r"method\.allocation is not of class Allocation"):
        method(allocation="Uniform")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "given_settings",
    [{"threshold": 0.0}, {"threshold": math.inf}, {"spread": -0.1}, {"spread": 1.0}],
)
def test_settings_out_of_range_are_refused(given_settings: dict[str, float]):
    with pytest.raises(ConfigError, match=r"allocation\.threshold or allocation\.spread out of"):
        OutlierWeighed(**given_settings)
    with pytest.raises(ConfigError, match=r"allocation\.spread is not a number"):
        OutlierWeighed(spread="0.1")  # type: ignore[arg-type]


def test_who_needs_data_is_what_the_allocation_says():
    assert not Magnitude().needs_data
    assert not Random().needs_data
    assert Magnitude(allocation=OWL).needs_data
    assert Random(allocation=MeasuredLoss()).needs_data
    assert Wanda().needs_data
